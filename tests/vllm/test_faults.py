# SPDX-License-Identifier: Apache-2.0
"""Planted faults: the identity test has teeth. Each breaks one rule of the page scheme and must be noticed."""

from types import SimpleNamespace

import kvarn
import pytest
from engine import Engine, first_difference
from kvarn.vllm.spec import KvarnManager
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

pytestmark = pytest.mark.usefixtures("row_by_row")


def test_no_pages_ahead(small_model, prompts, base, monkeypatch):
    for method in ("get_num_blocks_to_allocate", "allocate_new_blocks"):
        monkeypatch.setattr(KvarnManager, method, getattr(FullAttentionManager, method))
    with Engine(small_model) as engine:
        assert first_difference(engine.run(prompts), base) is not None


@pytest.mark.parametrize("tiles", [None, 1], ids=["never", "past the next tile only"])
def test_no_staging(small_model, prompts, base, monkeypatch, tiles):
    """A chunk that runs n tokens past the tile in which it starts loses that tile's older tokens.

    tiles  1: only where it stays within the next tile, the case that a careless condition forgets
    """
    forgotten = []
    append = kvarn.append

    def append_without_staging(layout, pages, block_table, seq_lens, query_starts, *args, **kwargs):
        step = kwargs.get("plan") or SimpleNamespace(
            block_table=block_table, seq_lens=seq_lens, query_starts=query_starts
        )
        lengths, counts = step.seq_lens.tolist(), step.query_starts.diff().tolist()
        for row, length, queries in zip(step.block_table, lengths, counts, strict=True):
            tile, offset = divmod(length - queries, layout.page_tokens)
            past = length - (tile + 1) * layout.page_tokens
            if offset and past > layout.raw_tokens_per_page and (tiles is None or past <= tiles * layout.page_tokens):
                pages[row[tile + 1 : tile + 1 + layout.pages_ahead].long()] = 0  # where these tokens lie
                forgotten.append(length)
        return append(layout, pages, block_table, seq_lens, query_starts, *args, **kwargs)

    monkeypatch.setattr(kvarn, "append", append_without_staging)
    with Engine(small_model, max_num_batched_tokens=200 if tiles is None else 90) as engine:
        ours = engine.run(prompts)
    assert forgotten
    assert first_difference(ours, base) is not None


@pytest.mark.slow
def test_the_switch_itself_changes_nothing(small_model, prompts, base, monkeypatch):
    """The patches above replace the function that the backend calls: without a fault they give the base run."""
    calls = []
    append = kvarn.append
    monkeypatch.setattr(kvarn, "append", lambda *args, **kwargs: calls.append(1) or append(*args, **kwargs))
    with Engine(small_model, max_num_batched_tokens=200) as engine:
        assert first_difference(engine.run(prompts), base) is None
    assert calls
