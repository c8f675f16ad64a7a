# SPDX-License-Identifier: Apache-2.0
"""A batch as transformers sees it, rows times columns with padding in between, and as kvarn sees it, tokens in pages.

A padded place is no token: it takes no room in the pages and is not counted, so a padded row has the very bits that it
would have alone. Each forward pass of the model is one Step, worked out when its first kvarn layer attends.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

import kvarn

from .sequences import Sequences


class Step:
    """What the verbs need for the new columns of one forward pass, for all layers.

    batch, columns  of the new keys and queries;  end: columns of the cache with them
    valid           bool [batch, columns], True where there is a token; None: everywhere
    tokens          how many there are
    copies          int64 [copies, 2]: pages to copy first, see Sequences.extend
    capacity        pages that a layer must have
    """

    def __init__(self, batch: int, columns: int, end: int, valid: np.ndarray | None, sequences: Sequences):
        self.batch, self.columns, self.end = batch, columns, end
        self.tokens = batch * columns
        starts = np.arange(0, self.tokens + 1, columns, dtype=np.int32)
        if valid is not None:
            self.tokens = int(valid.sum())
            starts = np.concatenate([[0], np.cumsum(valid.sum(1))]).astype(np.int32)
        self.copies = sequences.extend(np.diff(starts).astype(np.int64))
        self.capacity = sequences.capacity
        self._longest = int(np.diff(starts).max(initial=0))
        tables = sequences.block_table, sequences.lengths.astype(np.int32), starts
        self._tables = [torch.from_numpy(table) for table in tables]
        self._valid = None if valid is None else torch.from_numpy(np.flatnonzero(valid))
        self._on: dict = {}

    def tables(self, device: torch.device) -> list[torch.Tensor]:
        """block_table, seq_lens, query_starts, on `device`."""
        return self._there(device, "tables", lambda: [table.to(device) for table in self._tables])

    def plan(self, device: torch.device, layout: kvarn.Layout, query_heads: int):
        """On CUDA the plan of this step, shared by layers that are alike; None on the CPU."""
        if device.type != "cuda":
            return None
        plan = self._on.get((device, "plan"))
        if plan is None or (plan.layout, plan.query_heads) != (layout, query_heads):  # one: they share the workspace
            plan = self._on[device, "plan"] = kvarn.plan(
                layout, *self.tables(device), tokens=self.tokens, query_heads=query_heads, max_query_len=self._longest
            )
        return plan

    def tokens_of(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, heads, columns, head_dim] -> [tokens, heads, head_dim], padding left out."""
        flat = x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])
        return flat if self._valid is None else flat.index_select(0, self._places(x.device))

    def columns_of(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, heads, head_dim] -> [batch, columns, heads, head_dim], padding zero."""
        if self._valid is not None:
            flat = x.new_zeros(self.batch * self.columns, *x.shape[1:])
            x = flat.index_copy_(0, self._places(x.device), x)
        return x.view(self.batch, self.columns, *x.shape[1:])

    def _places(self, device: torch.device) -> torch.Tensor:
        return self._there(device, "valid", lambda: self._valid.to(device))

    def _there(self, device, what, make):
        """Once per device: the layers of a model may be spread over several."""
        if (device, what) not in self._on:
            self._on[device, what] = make()
        return self._on[device, what]


class Rows:
    """The batch of a cache, shared by its kvarn layers.

    columns    transformers' length of the cache, padding counted
    presets    those of the layers
    sequences  None before the first step, and so is shape, (head_dim, kv_heads) of every layer
    """

    step: Step | None = None  # of the forward pass in progress; copies of a cache do without

    def __init__(self, presets: Iterable[str]):
        self.columns = 0
        self.presets = tuple(dict.fromkeys(presets))
        self.shape: tuple[int, int] | None = None
        self.sequences: Sequences | None = None
        self._padding: torch.Tensor | None = (
            None  # bool [batch, columns], True where there is a token; None: everywhere
        )

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "step"}

    def begin(self, layout: kvarn.Layout, batch: int, columns: int, padding: torch.Tensor | None) -> Step:
        """The step of `columns` new columns; padding bool [batch, all columns] or None.

        Raises ValueError if the batch or what was padding before is not as it was.
        """
        if self.sequences is None:
            self.shape = layout.head_dim, layout.kv_heads
            layouts = [kvarn.Layout(preset, *self.shape) for preset in self.presets]
            ahead, raw = max(x.pages_ahead for x in layouts), min(x.raw_tokens_per_page for x in layouts)
            self.sequences = Sequences(batch, layout.page_tokens, ahead, raw)
        if batch != (had := len(self.sequences.lengths)):
            raise ValueError(
                f"the cache holds {had} rows, this forward pass has {batch}; make a new cache, or reset() it"
            )
        end = self.columns + columns
        valid = self._new_columns(padding, end)
        self.step = Step(batch, columns, end, valid, self.sequences)
        if valid is not None or self._padding is not None:
            self._padding = padding
        self.columns = end
        return self.step

    def _new_columns(self, padding: torch.Tensor | None, end: int) -> np.ndarray | None:
        """bool [batch, new columns] of the tokens among them, None: all."""
        before = self._padding
        if padding is None:
            if before is not None and not before.all():
                raise ValueError(
                    f"the cache has padded rows, and this forward pass has no attention_mask; give it one of "
                    f"{end} columns, those of the cache included"
                )
            return None
        if padding.shape[1] != end:
            raise ValueError(
                f"attention_mask has {padding.shape[1]} columns; it must have {end}: {self.columns} in the cache and "
                f"{end - self.columns} new ones"
            )
        old = padding[:, : self.columns]
        if not (bool(old.all()) if before is None else torch.equal(old, before.to(old.device))):
            raise ValueError(
                "attention_mask differs from that of earlier steps in columns that are in the cache already: a token "
                "cannot be hidden once others have attended to it"
            )
        valid = padding[:, self.columns :].cpu().numpy()
        return None if valid.all() else valid

    def check_crop(self, columns: int) -> None:
        if self.sequences is not None:
            self.sequences.check_crop(self._tokens_of_last(columns))

    def crop(self, columns: int) -> None:
        """Takes `columns` columns off the end, see Sequences.check_crop."""
        if self.sequences is not None:
            self.sequences.crop(self._tokens_of_last(columns))
            self.columns -= columns
            self._padding = None if self._padding is None else self._padding[:, : self.columns]

    def _tokens_of_last(self, columns: int) -> np.ndarray:
        if columns > self.columns:
            raise ValueError(f"cannot crop {columns} columns off a cache of {self.columns}")
        if self._padding is None:
            return np.full(len(self.sequences.lengths), columns)
        return self._padding[:, self.columns - columns :].sum(1).cpu().numpy()

    def select(self, indices: torch.Tensor) -> None:
        """Row i becomes what row indices[i] is."""
        if self.sequences is not None:
            self.sequences.select(indices.cpu().numpy())
            if self._padding is not None:
                self._padding = self._padding[indices.to(self._padding.device)]

    def reset(self) -> None:
        self.columns, self.shape, self.sequences, self._padding, self.step = 0, None, None, None, None
