# SPDX-License-Identifier: Apache-2.0
"""Which pages hold which row of a batch: one block table for all kvarn layers of a cache. Knows no tensors.

Rows may share pages: after a beam search step two beams go on from one. Packed pages never change, so they stay shared;
what a row is going to write is copied before it writes (`extend` says which pages).
"""

from __future__ import annotations

import numpy as np


class Sequences:
    """Rows of a batch, each a sequence of tokens in pages.

    page_tokens          G;  pages_ahead: m;  raw_tokens_per_page: n, of docs/specification.md section 3
    lengths              int64 [rows], tokens of each
    block_table          int32 [rows, width]; entries beyond a row's pages are 0 and never used
    capacity             pages that a layer must have
    """

    def __init__(self, rows: int, page_tokens: int, pages_ahead: int, raw_tokens_per_page: int):
        self.page_tokens, self.pages_ahead, self.raw_tokens_per_page = page_tokens, pages_ahead, raw_tokens_per_page
        self.lengths = np.zeros(rows, np.int64)
        self.block_table = np.zeros((rows, pages_ahead + 1), np.int32)
        self.capacity = 0
        self._held = np.zeros(rows, np.int64)  # pages of each row
        self._raw_from = np.zeros(rows, np.int64)  # the first tile whose raw tokens are all in their places
        self._owners = np.zeros(0, np.int64)  # rows that hold a page
        self._free: list[int] = []

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        """Makes room for `tokens` [rows] more tokens of each row, pages of their own wherever they will write.

        Returns int64 [copies, 2]: (from, to), pages that every layer has to copy before it writes.
        """
        first, copies = self.lengths // self.page_tokens, []
        for row in np.flatnonzero(tokens):
            for column in range(first[row], self._held[row]):
                page = self.block_table[row, column]
                if self._owners[page] > 1:
                    self._owners[page] -= 1
                    self._reserve(1)
                    self.block_table[row, column] = own = self._take()
                    copies.append((page, own))
        self.lengths = self.lengths + tokens
        needed = self._needed()
        if (width := needed.max(initial=0)) > self.block_table.shape[1]:
            more = max(width - self.block_table.shape[1], self.block_table.shape[1] // 4)
            self.block_table = np.pad(self.block_table, ((0, 0), (0, more)))
        self._reserve(np.maximum(needed - self._held, 0).sum())
        for row in np.flatnonzero(needed > self._held):
            for column in range(self._held[row], needed[row]):
                self.block_table[row, column] = self._take()
            self._held[row] = needed[row]
        # Raw tokens are written for tiles t with length - G (t + 1) <= n, and gone for those before.
        kept = -(-(self.lengths - self.raw_tokens_per_page) // self.page_tokens) - 1
        self._raw_from = np.where(tokens > 0, np.maximum(self._raw_from, kept), self._raw_from)
        return np.array(copies, np.int64).reshape(-1, 2)

    def check_crop(self, tokens: np.ndarray) -> None:
        """Raises ValueError if `tokens` [rows] cannot be taken off the rows' ends such that no trace remains."""
        left = self.lengths - tokens
        if (left < 0).any():
            row = int(np.flatnonzero(left < 0)[0])
            raise ValueError(f"cannot crop {tokens[row]} tokens off row {row}: it has {self.lengths[row]}")
        tile = left // self.page_tokens
        lost = (left % self.page_tokens > 0) & (tile < self._raw_from)
        if lost.any():
            row = int(np.flatnonzero(lost)[0])
            raise ValueError(
                f"cannot crop row {row} from {self.lengths[row]} to {left[row]} tokens: the tile of tokens "
                f"{tile[row] * self.page_tokens} .. {(tile[row] + 1) * self.page_tokens - 1} is packed and its 16-bit "
                f"tokens are gone. Crop at most {self.raw_tokens_per_page} tokens of the last step (so keep "
                f"prompt_lookup_num_tokens and num_assistant_tokens at {self.raw_tokens_per_page} or less), or to a "
                f"multiple of {self.page_tokens}"
            )

    def crop(self, tokens: np.ndarray) -> None:
        """Takes `tokens` [rows] off the rows' ends, see check_crop; pages beyond are free again."""
        self.check_crop(tokens)
        self.lengths = self.lengths - tokens
        self._raw_from = np.minimum(self._raw_from, self.lengths // self.page_tokens)
        needed = self._needed()
        for row in np.flatnonzero(needed < self._held):
            self._release(self.block_table[row, needed[row] : self._held[row]])
            self._held[row] = needed[row]

    def select(self, rows: np.ndarray) -> None:
        """Row i becomes what row rows[i] is now; any number of rows, any of them repeatedly."""
        before, held = self.block_table, self._held
        self.block_table, self._held = before[rows], held[rows]
        self.lengths, self._raw_from = self.lengths[rows], self._raw_from[rows]
        for row, count in zip(self.block_table, self._held, strict=True):
            np.add.at(self._owners, row[:count], 1)
        for row, count in zip(before, held, strict=True):
            self._release(row[:count])

    def _needed(self) -> np.ndarray:
        return np.where(self.lengths > 0, -(-self.lengths // self.page_tokens) + self.pages_ahead, 0)

    def _reserve(self, pages: int) -> None:
        """Grows to `pages` free ones, if at all then by a sixteenth: little lies idle, and a page is copied 16 times at
        most on average, where transformers' DynamicCache copies at every token."""
        if (lacking := int(pages) - len(self._free)) > 0:
            grown = self.capacity + max(lacking, self.capacity // 16)
            self._free = list(range(grown - 1, self.capacity - 1, -1)) + self._free
            self._owners = np.pad(self._owners, (0, grown - self.capacity))
            self.capacity = grown

    def _take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _release(self, pages: np.ndarray) -> None:
        for page in pages:
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(int(page))
