"""A layer's bits: whatever the batch, the padding, the chunks, the crops and the beams, a row is what it is alone."""

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import kvarn  # noqa: E402
from kvarn import reference  # noqa: E402
from play import PAD, SCALE, Player, alone, layout, states  # noqa: E402

PRESETS = ["kvarn_k4v2_g128", "kvarn_k4v3_g64"]


def random_tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 997, shape, generator=torch.Generator().manual_seed(seed))


def assert_rows_alone(player: Player, outs, histories, news, where) -> None:
    """The tokens that the last step brought, `news` [batch] of each row's history, have the bits of a row alone."""
    for row, (history, new) in enumerate(zip(histories, news, strict=True)):
        if not new:
            continue
        for out, exact in zip(outs, alone(history, player), strict=True):
            assert torch.equal(out[row][where[row]], exact[-new:]), f"row {row} of {len(history)} tokens"


@pytest.mark.parametrize("preset", PRESETS)
def test_padded_batch_is_each_row_alone(preset, device):
    player = Player(preset, layers=2, device=device)
    tokens, starts = random_tokens(1, 4, 301), [0, 1, 130, 300]
    padding = torch.arange(301) >= torch.tensor(starts)[:, None]
    outs = player.step(tokens.where(padding, PAD), padding)
    histories = [tokens[row, start:].tolist() for row, start in enumerate(starts)]
    assert_rows_alone(player, outs, histories, [len(h) for h in histories], padding)
    for out in outs:
        assert not out[~padding].any(), "padded places are zero"


def test_holes_and_padding_on_the_right_are_no_tokens(device):
    player = Player(device=device)
    tokens, padding = random_tokens(2, 2, 200), torch.rand(2, 200, generator=torch.Generator().manual_seed(3)) < 0.7
    outs = player.step(tokens, padding)
    histories = [tokens[row][padding[row]].tolist() for row in range(2)]
    assert_rows_alone(player, outs, histories, [len(h) for h in histories], padding)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 250])
def test_chunks_do_not_matter(preset, chunk, device):
    tokens, player = random_tokens(4, 1, 400), Player(preset, device=device)
    whole = alone(tokens[0].tolist(), player)[0]
    parts = [player.step(part)[0][0] for part in tokens.split(chunk, dim=1)]
    assert torch.equal(torch.cat(parts), whole)


def test_agrees_with_the_reference_over_the_dequantized_cache():
    tokens, player = random_tokens(5, 1, 333), Player()
    out = player.step(tokens)[0][0].numpy()
    q, k, v = (states(tokens, heads, salt)[0].transpose(0, 1).numpy() for salt, heads in enumerate((4, 2, 2)))
    count = 3 + layout().pages_ahead
    pages = np.zeros((count, layout().page_bytes), np.uint8)
    step = np.arange(count, dtype=np.int32)[None], np.array([333], np.int32), np.array([0, 333], np.int32)
    reference.append(layout(), pages, *step, k, v, workspace=(workspace := {}))
    exact = reference.attend(layout(), pages, *step, q, scale=SCALE, workspace=workspace)
    # tests/python/tolerance.py: 4.8e-4 at most on targets that multiply in fixed point.
    assert np.linalg.norm(out - exact) <= 4.8e-4 * np.linalg.norm(exact)
    packed = player.layers[0].pages[player.rows.sequences.block_table[0, :2]].cpu().numpy()
    assert np.array_equal(packed, pages[:2]), "the bytes of the packed tiles"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, device):
    """The same 16-bit inputs, given as such and widened: only the output's rounding lies between."""
    exact = Player(device=device, through=dtype).step(random_tokens(6, 1, 300))[0]
    ours = Player(device=device, through=dtype, dtype=dtype).step(random_tokens(6, 1, 300))[0]
    assert ours.dtype == dtype
    # A GPU multiplies in the queries' dtype: tests/cuda/gpu.py has the same bounds.
    allowed = 2e-3 if dtype == torch.float16 else 6e-3
    assert torch.linalg.norm(ours.float() - exact) <= allowed * torch.linalg.norm(exact)


@pytest.mark.parametrize("preset", PRESETS)
def test_crop_goes_back_as_far_as_raw_tokens_remain(preset, device):
    n, tile = layout(preset).raw_tokens_per_page, layout(preset).page_tokens
    tokens = random_tokens(7, 1, 3 * tile).tolist()[0]
    player = Player(preset, device=device)
    player.step(torch.tensor([tokens[: 2 * tile + 9]]))
    player.rows.check_crop(9 + 5)  # nine tokens past the edge: the tile before is still there
    player.step(torch.tensor([tokens[2 * tile + 9 : 2 * tile + n + 1]]))
    for columns in (1, n, n + 1, n + 1 + tile, 2 * tile + n + 1):
        player.rows.check_crop(columns)
    for columns in (n + 2, n + tile, n + tile + 2):
        with pytest.raises(ValueError, match=f"at most {n} tokens"):
            player.rows.check_crop(columns)
    with pytest.raises(ValueError, match="cannot crop"):
        player.rows.check_crop(2 * tile + n + 2)
    player.rows.crop(tile + n + 1)
    player.layers[0].columns = player.rows.columns
    player.step(torch.tensor([tokens[tile : tile + 9]]))
    player.rows.check_crop(5)  # this tile was packed once, but is new since


@pytest.mark.parametrize("seed", range(6))
def test_any_life_of_a_batch(seed, device):
    """Steps of any length with padding, crops, beams: after each, what it brought has the bits of a row alone."""
    dice = random.Random(seed)
    preset = dice.choice(["kvarn_k4v2_g128", "kvarn_k2v2_g64", "kvarn_k4v4_g64"])
    player, batch = Player(preset, layers=2, device=device), dice.choice([1, 3])
    histories, padding = [[] for _ in range(batch)], torch.zeros(batch, 0, dtype=torch.bool)
    refused = 0
    for turn in range(40):
        columns = dice.choice([1, 1, 1, 2, 5, 17, 40, 90, 150])
        new = random_tokens(1000 * seed + turn, len(histories), columns)
        valid = torch.rand(new.shape, generator=torch.Generator().manual_seed(turn)) < dice.choice([0.5, 1, 1, 1])
        padding = torch.cat([padding, valid], dim=1)
        for row, history in enumerate(histories):
            history += new[row][valid[row]].tolist()
        outs = player.step(new, padding)
        assert_rows_alone(player, outs, histories, valid.sum(1).tolist(), valid)
        if dice.random() < 0.4:
            cut = dice.choice([1, 3, 15, columns, 64, 128])
            gone = padding[:, max(0, padding.shape[1] - cut) :].sum(1).tolist()
            try:
                player.rows.crop(cut)
            except ValueError:
                refused += 1
            else:
                padding = padding[:, : padding.shape[1] - cut]
                histories = [h[: len(h) - g] for h, g in zip(histories, gone, strict=True)]
                for layer in player.layers:
                    layer.columns = player.rows.columns
        if dice.random() < 0.4:
            chosen = torch.tensor([dice.randrange(len(histories)) for _ in range(dice.choice([1, 2, 4]))])
            player.rows.select(chosen)
            padding, histories = padding[chosen], [list(histories[i]) for i in chosen]
        player.poison()
        if max(map(len, histories)) > 900:
            break
    held = {page for row, count in enumerate(player.rows.sequences._held) for page in
            player.rows.sequences.block_table[row, :count].tolist()}  # fmt: skip
    free = player.rows.sequences._free
    assert len(free) == len(set(free)) and held.isdisjoint(free)
    assert len(held) + len(free) == player.rows.sequences.capacity, "no page is lost"


def test_beams_share_what_is_packed():
    player = Player()
    player.step(random_tokens(8, 1, 1000))
    one = player.rows.sequences.capacity
    player.rows.select(torch.zeros(4, dtype=torch.long))
    player.step(random_tokens(9, 4, 1))
    # Each beam but one takes its unfinished tile and the pages ahead: 1 + m pages.
    assert player.rows.sequences.capacity - len(player.rows.sequences._free) == one + 3 * (1 + layout().pages_ahead)


def test_pages_grow_by_a_sixteenth(device):
    player, sizes = Player(device=device), set()
    for part in random_tokens(10, 1, 4000).split(100, dim=1):
        player.step(part)
        sizes.add(len(player.layers[0].pages))
    assert len(sizes) <= 30 and max(sizes) <= 17 / 16 * (-(-4000 // 128) + layout().pages_ahead)


def test_a_mask_that_hides_nothing_may_be_left_out():
    tokens, player = random_tokens(13, 2, 12), Player()
    player.step(tokens[:, :5], torch.ones(2, 5, dtype=torch.bool))
    player.step(tokens[:, 5:10])
    out = player.step(tokens[:, 10:], torch.ones(2, 12, dtype=torch.bool))
    assert_rows_alone(player, out, tokens.tolist(), [2, 2], torch.ones(2, 2, dtype=torch.bool))


def test_replaced_elements_are_told():
    layer = Player().layers[0]
    k = torch.zeros(1, 2, 3, 64)
    k[0, 1, 2, :5] = torch.inf
    layer.update(k, k)
    with pytest.warns(UserWarning, match="10 keys or values were not finite"):
        out = layer.attend(torch.ones(1, 4, 3, 64), (k, k), None, scale=SCALE)
    assert out.isfinite().all()


def test_wrong_batches_and_masks_are_refused():
    player, mask = Player(), torch.ones(2, 10, dtype=torch.bool)
    mask[0, :3] = False
    player.step(random_tokens(11, 2, 10), mask)
    with pytest.raises(ValueError, match="holds 2 rows, this forward pass has 3"):
        player.step(random_tokens(11, 3, 1))
    with pytest.raises(ValueError, match="give it one of 11 columns"):
        player.step(random_tokens(11, 2, 1))
    with pytest.raises(ValueError, match="it must have 11"):
        player.step(random_tokens(11, 2, 1), mask)
    with pytest.raises(ValueError, match="differs from that of earlier steps"):
        player.step(random_tokens(11, 2, 1), torch.ones(2, 11, dtype=torch.bool))
    assert player.rows.columns == 10 and kvarn.__version__


def test_layers_must_be_alike():
    player = Player(layers=2)
    player.step(random_tokens(14, 1, 3))
    player.rows.shape = (128, 2)
    with pytest.raises(NotImplementedError, match="full-attention layers are alike"):
        player.step(random_tokens(14, 1, 3))


def test_an_interrupted_pass_is_noticed():
    player = Player(layers=2)
    player.step(random_tokens(12, 1, 10))
    second, player.layers = player.layers.pop(), player.layers[:1]
    player.step(random_tokens(12, 1, 1))
    player.step(random_tokens(12, 1, 1))
    player.layers.append(second)
    with pytest.raises(RuntimeError, match="did not finish"):
        player.step(random_tokens(12, 1, 1))
