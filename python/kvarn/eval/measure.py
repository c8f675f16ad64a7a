# SPDX-License-Identifier: Apache-2.0
"""One context through one cache: the scores of every token against the reference."""

from dataclasses import dataclass

import numpy as np
import torch

from kvarn.eval.attention import Cache, Past, attending

# Rows of logits at a time: 256 x 49,152 float32 are 50 MB.
ROWS = 256


@dataclass(frozen=True)
class Scores:
    """Of each scored token, [contexts, tokens]: float32 kld (reference || cache), nll and reference_nll of the text,
    bool same_top."""

    kld: np.ndarray
    nll: np.ndarray
    reference_nll: np.ndarray
    same_top: np.ndarray

    @classmethod
    def stack(cls, parts: list["Scores"], axis: int = 0) -> "Scores":
        """Contexts, or with axis 1 pieces of the same contexts, one after the other."""
        names = cls.__dataclass_fields__
        return cls(*(np.concatenate([getattr(part, name) for part in parts], axis) for name in names))

    def save(self, path) -> None:
        np.savez(path, **{name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def load(cls, path) -> "Scores":
        with np.load(path) as file:
            return cls(**{name: file[name] for name in cls.__dataclass_fields__})


@torch.inference_mode()
def hidden_states(model, tokens: np.ndarray, cache: Cache, past: Past = Past.DECODED) -> torch.Tensor:
    """[tokens, hidden], of the model's dtype: what goes into the output layer after reading `tokens` with `cache`."""
    batch = torch.as_tensor(tokens, device=model.device).expand(2 if past is Past.PROMPT else 1, -1)
    with attending(model, cache):
        return model.base_model(batch, use_cache=False).last_hidden_state[-1]


@torch.inference_mode()
def compare(model, reference: torch.Tensor, hidden: torch.Tensor, tokens: np.ndarray, first: int) -> Scores:
    """Scores of positions first .. len(tokens) - 2 of one context: each predicts the token after it.

    reference, hidden  [len(tokens) - 1, hidden] from `hidden_states`
    """
    head = model.get_output_embeddings()
    next_tokens = torch.as_tensor(tokens[1:], device=hidden.device)
    parts = []
    for begin in range(first, len(tokens) - 1, ROWS):
        rows = slice(begin, min(begin + ROWS, len(tokens) - 1))
        p, q = (torch.log_softmax(head(states[rows]).float(), dim=-1) for states in (reference, hidden))
        target = next_tokens[rows].unsqueeze(1)
        scores = {
            "kld": (p.exp() * (p - q)).sum(-1),
            "nll": -q.gather(1, target).squeeze(1),
            "reference_nll": -p.gather(1, target).squeeze(1),
            "same_top": p.argmax(-1) == q.argmax(-1),
        }
        parts.append(Scores(**{name: score.cpu().numpy()[None] for name, score in scores.items()}))
    return Scores.stack(parts, axis=1)
