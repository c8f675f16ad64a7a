"""A toy server over one pool of pages, and the oracle that knows only tokens.

`Server` plays operations as an engine would: requests start (perhaps on another's complete tiles), run in batches with
chunks and drafts, are preempted and computed again, end; their pages go to others as they are, rubbish and all. After
every step each row that attention produced is compared bit for bit with the oracle: the same tokens alone, in a fresh
pool, as one prompt in one step. So the oracle needs no staging, no rejected drafts and no shared pages.
"""

from dataclasses import dataclass, field

import numpy as np
from cases import Step, assert_same_pages, hashed, pages_needed, pool
from kvarn import reference
from tolerance import assert_close

VOCABULARY = 61
LONGEST = 1100  # tokens; a request that would grow beyond it ends


class Mismatch(AssertionError):
    """The server's rows or records are not the oracle's."""


class Model:
    """Vectors of a token: k, v, q [tokens][heads][D] from (token id, position), as a first layer would make them; of
    deviation 1.16, but k and v of position 0 are small: the attention sink."""

    def __init__(self, layout, group, dtype):
        H, D = layout.kv_heads, layout.head_dim
        self.by_token = [hashed((VOCABULARY, heads, D), seed) for seed, heads in enumerate((H, H, H * group))]
        self.by_position = [hashed((LONGEST, heads, D), seed + 9) for seed, heads in enumerate((H, H, H * group))]
        self.dtype, self.scale = dtype, D**-0.5

    def vectors(self, tokens, start):
        ids, stop = np.asarray(tokens), start + len(tokens)
        k, v, q = (
            (by_token[ids] + by_position[start:stop]) * np.float32(0.5**0.5)
            for by_token, by_position in zip(self.by_token, self.by_position, strict=True)
        )
        if start == 0:
            k[0], v[0] = k[0] / 16, v[0] / 16
        return [x.astype(self.dtype) for x in (k, v, q)]


class Oracle:
    """Rows and expanded tiles of a token sequence by itself."""

    def __init__(self, verbs, layout, model, encoder):
        self.verbs, self.layout, self.model, self.encoder = verbs, layout, model, encoder
        count = pages_needed(layout, LONGEST + layout.raw_tokens_per_page)
        self.pages, self.table = pool(layout, count, seed=1), [list(range(count))]
        self.known, self.rows, self.tiles = [], None, None

    def of(self, tokens):
        """(rows [len(tokens)][query heads][D], expanded k, expanded v)."""
        if self.known[: len(tokens)] != tokens:
            self.known = list(tokens)
            step = Step.of(self.table, [len(tokens)], [len(tokens)])
            k, v, q = self.model.vectors(tokens, 0)
            self.verbs.append(self.layout, self.pages, *step, k, v, encoder=self.encoder)
            self.rows = self.verbs.attend(self.layout, self.pages, *step, q, scale=self.model.scale)
            self.tiles = self.verbs.expand(self.layout, self.pages, step.block_table, step.seq_lens)
        packed = len(tokens) // self.layout.page_tokens * self.layout.page_tokens
        return self.rows[: len(tokens)], *(side[:packed] for side in self.tiles)


@dataclass
class Request:
    tokens: list[int]
    table: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose vectors are in the pages


class Server:
    """verbs, layout: what to run. fault: a mistake to plant, see `start`, `_tables` and `_append`."""

    def __init__(self, verbs, layout, *, group=2, dtype="float32", encoder="weighted", pool_pages=90, fault=None):
        self.verbs, self.layout, self.encoder, self.fault = verbs, layout, encoder, fault
        self.model = Model(layout, group, dtype)
        self.oracle = Oracle(verbs, layout, self.model, encoder)
        self.pages = pool(layout, pool_pages, seed=2)
        self.users, self.free = [0] * pool_pages, list(range(pool_pages))
        self.requests: list[Request] = []
        self.steps = self.salt = 0

    # Operations. An operation that does not fit the present state does nothing, so that every schedule is valid.

    def start(self, share: int, tiles: int) -> None:
        """A new request; with the first `tiles` complete tiles of request `share`, as far as it has them."""
        request = Request([])
        if self.requests and tiles:
            parent = self.requests[share % len(self.requests)]
            complete = parent.computed // self.layout.page_tokens
            shared = min(tiles, complete + (self.fault == "incomplete tile shared"), len(parent.table))
            request.table = parent.table[:shared]
            request.computed = shared * self.layout.page_tokens
            request.tokens = (parent.tokens + [0] * self.layout.page_tokens)[: request.computed]
            for page in request.table:
                self.users[page] += 1
        self.requests.append(request)

    def step(self, parts: list[tuple[int, int, int]]) -> None:
        """One step of several requests: (which, new tokens, how many of them are rejected drafts)."""
        batch: list[tuple[Request, int, int]] = []
        for which, new, rejected in parts:
            if not self.requests:
                break
            request = self.requests[which % len(self.requests)]
            if any(request is other for other, _, _ in batch):
                continue
            new = min(new, LONGEST - request.computed)
            if new <= 0 or not self._grow(request, request.computed + new):
                continue
            self._generate(request, request.computed + new)
            beyond = request.computed + new == len(request.tokens)
            batch.append((request, new, min(rejected, new - 1, self.layout.raw_tokens_per_page) if beyond else 0))
        if batch:
            self._run([(request, new) for request, new, _ in batch])
        for request, new, rejected in batch:
            request.computed += new - rejected
            if rejected:
                del request.tokens[request.computed :]

    def end(self, which: int) -> None:
        if self.requests:
            request = self.requests.pop(which % len(self.requests))
            self._check_tiles(request)
            self._release(request)

    def preempt(self, which: int) -> None:
        """Gives the pages back and keeps the tokens: they are computed again."""
        if self.requests:
            request = self.requests[which % len(self.requests)]
            self._release(request)
            request.table, request.computed = [], 0

    def finish(self) -> None:
        while self.requests:
            self.end(0)

    # Parts.

    def _generate(self, request, length):
        while len(request.tokens) < length:
            self.salt = (self.salt * 1103515245 + 12345) % 2**31
            request.tokens.append((self.salt >> 8) % VOCABULARY)

    def _grow(self, request, length) -> bool:
        missing = pages_needed(self.layout, length) - len(request.table)
        if missing > len(self.free):
            return False
        for _ in range(missing):
            page = self.free.pop()
            self.users[page] = 1
            request.table.append(page)
        return True

    def _release(self, request):
        for page in request.table:
            self.users[page] -= 1
            if self.users[page] == 0:
                self.free.append(page)

    def _tables(self, batch):
        tables = [list(request.table) for request, _ in batch]
        if self.fault == "no pages ahead":  # an engine that knows only ceil(L / G) blocks, and pads with its null block
            for table, (request, new) in zip(tables, batch, strict=True):
                own = -(-(request.computed + new) // self.layout.page_tokens)
                table[own:] = [0] * (len(table) - own)
        return tables

    def _run(self, batch):
        self.steps += 1
        lengths, news = [request.computed + new for request, new in batch], [new for _, new in batch]
        tables = self._tables(batch)
        rows = [self.model.vectors(r.tokens[r.computed : r.computed + new], r.computed) for r, new in batch]
        if self.steps % 3 == 0:  # a padded batch: two rows of a request that takes no part
            tables, lengths, news = [*tables, []], [*lengths, 0], [*news, 2]
            rows.append(self.model.vectors([0, 1], 5))
        step = Step.of(tables, lengths, news)
        k, v, q = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        self._append(step, k, v)
        out = self.verbs.attend(self.layout, self.pages, *step, q, scale=self.model.scale)
        for (request, new), first in zip(batch, step.query_starts, strict=False):
            start, ours = request.computed, out[first : first + new]
            expected = self.oracle.of(request.tokens[: start + new])[0][start:]
            if not np.array_equal(ours, expected):
                row = int(np.argwhere((ours != expected).any((1, 2)))[0, 0])
                raise Mismatch(f"step {self.steps}: position {start + row}, {new} new tokens from {start}")

    def _append(self, step, k, v):
        if self.fault == "no staging":  # new raw tokens reach the pages before the older ones are safe
            for row, stop in enumerate(step.query_starts[1:]):
                tail = min(stop - step.query_starts[row], step.seq_lens[row] % self.layout.page_tokens)
                if tail:
                    only, last, starts = slice(row, row + 1), slice(stop - tail, stop), np.array([0, tail], np.int32)
                    late = Step(step.block_table[only], step.seq_lens[only], starts)
                    self.verbs.append(self.layout, self.pages, *late, k[last], v[last])
        self.verbs.append(self.layout, self.pages, *step, k, v, encoder=self.encoder)

    def _check_tiles(self, request):
        tokens = request.tokens[: request.computed]
        if not tokens:
            return
        step = Step.of([request.table], [len(tokens)], [0])
        ours = self.verbs.expand(self.layout, self.pages, step.block_table, step.seq_lens)
        for name, mine, theirs in zip("kv", ours, self.oracle.of(tokens)[1:], strict=True):
            if not np.array_equal(mine, theirs):
                raise Mismatch(f"expanded {name} of {len(tokens)} tokens")


def check_oracle(verbs, layout, model, tokens, encoder, target):
    """The oracle itself against the reference: same pages to the bit, rows as far as attend's arithmetic allows."""
    count = pages_needed(layout, len(tokens))
    step, (k, v, q) = Step.of([list(range(count))], [len(tokens)], [len(tokens)]), model.vectors(tokens, 0)
    ours, theirs = pool(layout, count), pool(layout, count)
    verbs.append(layout, ours, *step, k, v, encoder=encoder)
    reference.append(layout, theirs, *step, k, v, encoder=encoder)
    assert_same_pages(layout, ours, theirs, "oracle")
    rows = verbs.attend(layout, ours, *step, q, scale=model.scale)
    exact = reference.attend(layout, theirs, *step, q, scale=model.scale)
    assert_close(rows, exact, target, "oracle", dtype=model.dtype)
