# SPDX-License-Identifier: Apache-2.0
"""Energies of queries (kvarn.energy): fixed tokens, mean squares by KV head, powers of two."""

import pytest

torch = pytest.importorskip("torch")

from kvarn import energy  # noqa: E402


def test_tokens_are_fixed_and_of_the_vocabulary():
    drawn = energy.tokens(997)
    assert drawn.tolist() == energy.tokens(997).tolist() and len(drawn) == energy.TOKENS
    assert drawn[:4].tolist() == [623, 658, 944, 486]
    assert 0 <= drawn.min() and drawn.max() < 997 and len(drawn.unique()) > 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energies_are_mean_squares_of_the_group_rounded_to_powers_of_two(dtype):
    query = torch.zeros(6, 4, 3, dtype=dtype)
    query[:, 0, 0], query[:, 1, 0] = 3, 1  # mean square 5: nearer to 4 than to 8
    query[0, 2, 1] = 12  # 144 / 6 / 2 = 12: as logarithms nearer to 16
    found = energy.of_queries(query, kv_heads=2)
    assert found.dtype == torch.float32
    assert found[0, 0] == 4 and found[1, 1] == 16
    assert (found[0, 1:] == 2.0**-60).all(), "a channel without queries has almost none, not none"


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_of_layers_that_are_not_packed(window, soft_cap, with_sinks):
    made = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(9, heads, dim, generator=made) for heads, dim in ((4, 8), (2, 8), (2, 6)))
    sinks = torch.randn(4, generator=made) if with_sinks else None
    found = energy.attention(query, key, value, 0.4, window, sinks, soft_cap)
    assert found.shape == (9, 4, 6)
    for token in range(9):
        seen = slice(0 if window is None else max(0, token - window + 1), token + 1)
        for head in range(4):
            scores = key[seen, head // 2] @ query[token, head] * 0.4
            if soft_cap:
                scores = soft_cap * (scores / soft_cap).tanh()
            weights = scores.exp()
            weights = weights / (weights.sum() + (sinks[head].exp() if with_sinks else 0))
            torch.testing.assert_close(found[token, head], weights @ value[seen, head // 2])
    halves = energy.attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), 0.4, window, sinks, soft_cap)
    assert halves.dtype == torch.bfloat16
