# SPDX-License-Identifier: Apache-2.0
"""Simulated formats: bytes counted by hand, round trips worked out by hand, and what is published about them."""

import pytest

torch = pytest.importorskip("torch", reason="the simulators need torch")

from kvarn.rivals import RIVALS, Recent  # noqa: E402
from kvarn.rivals.llama_cpp import round_blocks  # noqa: E402
from kvarn.rivals.nvfp4 import to_e2m1  # noqa: E402
from kvarn.rivals.per_token_head import Int4PerTokenHead  # noqa: E402
from kvarn.rivals.rounding import hadamard, half_away, min_max, rotate  # noqa: E402
from kvarn.rivals.turboquant import codebook  # noqa: E402


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("fp8", 256),
        ("fp8, calibrated", 256),
        ("fp8_per_token_head", 2 * 132),
        ("int8_per_token_head", 2 * 132),
        ("int4_per_token_head", 2 * 68),
        ("nvfp4", 2 * (64 + 8)),
        ("q8_0", 2 * 4 * 34),
        ("q8_0/q4_0", 4 * (34 + 18)),
        ("q5_0", 2 * 4 * 22),
        ("q4_0", 2 * 4 * 18),
        ("KIVI-4", 2 * (64 + 16)),
        ("KIVI-2", 2 * (32 + 16)),
        ("turboquant_k8v4", 128 + 64 + 4),
        ("turboquant_4bit_nc", 64 + 2 + 64 + 4),
        ("turboquant_k3v4_nc", 48 + 2 + 64 + 4),
        ("turboquant_3bit_nc", 48 + 2 + 48 + 4),
    ],
)
def test_bytes_at_head_dim_128(name, bytes_per_token):
    assert RIVALS[name].bytes_per_token(128) == bytes_per_token


def test_bits_per_value_count_layers_that_stay_raw():
    rival = RIVALS["turboquant_4bit_nc"]
    assert rival.bits_per_value(128) == 8 * 134 / 256
    assert rival.mean_bits(128, range(28), 28) == (4 * 16 + 24 * 8 * 134 / 256) / 28
    assert rival.mean_bits(128, [5, 11, 17], 18) == (16 + 2 * 8 * 134 / 256) / 3
    assert [layer for layer in range(28) if not rival.packs(layer, 28)] == [0, 1, 26, 27]
    assert RIVALS["turboquant_4bit_nc, all layers"].mean_bits(128, range(28), 28) == rival.bits_per_value(128)


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_error_is_what_the_bits_allow(name, head_dim):
    """Gaussian data: the relative squared error falls by about 4 for each bit, and no format is far from its peers."""
    x = torch.randn(256, 2, head_dim, generator=torch.Generator().manual_seed(1))
    for through, bound in ((RIVALS[name].keys, 0.16), (RIVALS[name].values, 0.16)):
        y = through(x)
        assert y.shape == x.shape and y.dtype == x.dtype
        error = ((y - x).square().mean() / x.square().mean()).item()
        assert 0 < error < (bound if "2" in name or "3" in name else 0.012)
    zeros = torch.zeros(64, 2, head_dim)
    assert RIVALS[name].keys(zeros).abs().max() < 1e-4
    assert RIVALS[name].values(zeros).abs().max() < 1e-4


def test_rotation_is_its_own_inverse_and_half_rounds_away():
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(rotate(rotate(x, 64), 64), x)
    torch.testing.assert_close(
        hadamard(4), torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    )
    with pytest.raises(ValueError, match="power of two"):
        hadamard(96)
    assert half_away(torch.tensor([0.5, -0.5, 1.5, 2.5, -2.4])).tolist() == [1, -1, 2, 3, -2]


def test_fp8_by_hand():
    """e4m3 has 8 steps per octave: 17 lies between 16 and 18, 300 between 288 and 320; above 448 it saturates."""
    x = torch.tensor([1.0, 17.0, 300.0, -1000.0])
    assert RIVALS["fp8"].keys(x).tolist() == [1, 16, 288, -448]
    scaled = RIVALS["fp8_per_token_head"].keys(torch.tensor([896.0, 2.0, 600.0]))
    assert scaled.tolist() == [896, 2, 576]  # 600 / 2 = 300 -> 288


def test_min_max_by_hand():
    """From -1 to 2 in 4 levels: a step of 1."""
    assert min_max(torch.tensor([-1.0, -0.4, 0.4, 0.6, 2.0]), 2).tolist() == [-1, 0, 0, 1, 2]


def test_int8_per_token_head_by_hand():
    x = torch.tensor([127.0, 0.5, -0.4, -63.5])
    assert RIVALS["int8_per_token_head"].keys(x).tolist() == [127, 1, 0, -64]


def test_int4_per_token_head_by_hand():
    """From -3 to 12: a step of 1, zero point 3, which takes the scale's lowest 4 bits: 1 becomes 1 + 3 * 2^-23."""
    rounded = Int4PerTokenHead.round(torch.tensor([-3.0, 0.4, 1.5, 12.0]))
    assert torch.equal(rounded, torch.tensor([-3.0, 0, 2, 12]) * torch.tensor(1 + 3 * 2.0**-23))


def test_q4_0_by_hand():
    """The largest magnitude, -8, gets code 0 of 16: a scale of 1, and a positive 8 would be cut to 7."""
    x = torch.zeros(32)
    x[:4] = torch.tensor([-8.0, 7.9, 0.4, -3.6])
    assert round_blocks(x, "q4_0")[:4].tolist() == [-8, 7, 0, -4]
    assert round_blocks(-x, "q4_0")[:4].tolist() == [8, -7, 0, 4]
    assert round_blocks(x * 2, "q5_0")[:4].tolist() == [-16, 15, 1, -7]
    assert round_blocks(x / 8 * 127, "q8_0")[0] == -127


def test_nvfp4_by_hand():
    assert to_e2m1(torch.tensor([0.2, 0.25, 0.75, 1.25, 2.4, 2.5, 3.5, 5.0, -9.0])).tolist() == [
        0, 0, 1, 1, 2, 2, 4, 4, -6,
    ]  # fmt: skip
    x = torch.tensor([12.0, 1.0] + 14 * [0.0])
    assert RIVALS["nvfp4"].keys(x)[:2].tolist() == [12, 1]  # scale 2


def test_kivi_groups_keys_by_tokens_and_values_by_channels():
    """Four values in each group of 32: two bits hold them exactly, in either direction."""
    rival = RIVALS["KIVI-2"]
    assert rival.recent is Recent.KIVI
    steps = (torch.arange(64) % 4).float()
    keys = steps[:, None, None] * torch.arange(1.0, 33)
    torch.testing.assert_close(rival.keys(keys), keys, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(rival.values(keys), keys, rtol=1e-3, atol=1e-3)
    values = steps * torch.arange(1.0, 33)[:, None, None]
    torch.testing.assert_close(rival.values(values), values, rtol=1e-3, atol=1e-3)


def test_turboquant_keeps_the_norm():
    k = torch.randn(50, 1, 128, generator=torch.Generator().manual_seed(3)) * 7
    torch.testing.assert_close(RIVALS["turboquant_3bit_nc"].keys(k).norm(dim=-1), k.norm(dim=-1), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("bits", "published"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_codebooks_reach_the_published_distortion(bits, published):
    """Max 1960, table I; the TurboQuant paper has the same, rounded (0.36, 0.117, 0.03, 0.009)."""
    x = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    x = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0).icdf(x)
    levels = codebook(bits).double()
    nearest = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    assert (x - nearest).square().mean().item() == pytest.approx(published, rel=2e-3)
