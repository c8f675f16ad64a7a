"""A cache layer without a model, and the oracle for it: every row alone, whole, in one step of a fresh cache.

Tokens are integers; a token's keys, values and queries are hashes of it, so a history of tokens says all.
"""

import kvarn
import torch
from kvarn.hf.layer import Layer
from kvarn.hf.rows import Rows

KV_HEADS, QUERY_HEADS, HEAD_DIM = 2, 4, 64
SCALE = HEAD_DIM**-0.5
PAD = -1


def states(tokens: torch.Tensor, heads: int, salt: int) -> torch.Tensor:
    """[batch, columns] integers -> [batch, heads, columns, HEAD_DIM], about normal; the same token, the same values."""
    generator = torch.Generator().manual_seed(salt)
    table = torch.randn(997, heads, HEAD_DIM, generator=generator)
    return table[tokens % 997].transpose(1, 2)


class Player:
    """A batch with `layers` layers that share their rows, all of them fed with the same tokens but other hashes."""

    def __init__(
        self, preset: str = "kvarn_k4v2_g128", layers: int = 1, device="cpu", dtype=torch.float32, through=None
    ):
        """through: a dtype that what is fed is rounded to first"""
        self.rows = Rows([preset])
        self.layers = [Layer(preset, "weighted", self.rows) for _ in range(layers)]
        self.device, self.dtype, self.through = device, dtype, through or dtype

    def step(self, tokens: torch.Tensor, padding: torch.Tensor | None = None) -> list[torch.Tensor]:
        """tokens [batch, columns], PAD where there is none; padding bool [batch, all columns]. Outputs of each layer,
        [batch, columns, QUERY_HEADS, HEAD_DIM]."""
        outs = []
        for index, layer in enumerate(self.layers):
            q, k, v = (
                states(tokens, heads, 10 * index + salt).to(self.through).to(self.device, self.dtype)
                for salt, heads in enumerate((QUERY_HEADS, KV_HEADS, KV_HEADS))
            )
            pending, _ = layer.update(k, v)
            padding = None if padding is None else padding.to(self.device)
            outs.append(layer.attend(q, pending.step_states, padding, scale=SCALE).cpu())
        return outs

    def poison(self) -> None:
        """Rubbish in every page that no row holds, NaN in any scale: whoever reads it is found out."""
        owners = self.rows.sequences._owners
        for layer in self.layers:
            layer.pages[torch.from_numpy(owners[: len(layer.pages)] == 0).to(self.device)] = 0xFF


def alone(history: list[int], like: Player) -> list[torch.Tensor]:
    """Outputs of all tokens of one row, [tokens, QUERY_HEADS, HEAD_DIM] of each layer."""
    fresh = Player(like.layers[0].preset, len(like.layers), like.device, like.dtype)
    return [out[0] for out in fresh.step(torch.tensor([history]))]


def layout(preset: str = "kvarn_k4v2_g128") -> kvarn.Layout:
    return kvarn.Layout(preset, HEAD_DIM, KV_HEADS)
