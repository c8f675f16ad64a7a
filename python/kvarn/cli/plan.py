# SPDX-License-Identifier: Apache-2.0
"""How far a given memory goes: tokens and users per cache dtype, by the same arithmetic as the pages themselves."""

import re
from dataclasses import asdict, dataclass

import kvarn
from kvarn.cli.model_config import ModelShape, Unsupported

# What vLLM hands out at once of a 16-bit or fp8 cache.
BLOCK_TOKENS = 16
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Row:
    """One cache dtype. `users` hold `context` tokens each at the same time, pages ahead included."""

    dtype: str
    bits_per_value: float
    bytes_per_token: float
    bytes_per_user: int
    tokens: int
    users: int
    smaller: float


@dataclass(frozen=True)
class Plan:
    model: ModelShape
    memory: int
    context: int
    drafts: int
    rows: list[Row]
    notes: list[str]

    def to_dict(self) -> dict:
        return asdict(self)


def parse_memory(text: str) -> int:
    """Bytes of "16GiB", "80 GB", "512MiB", "1e9" or a plain number. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    try:
        amount = float(match[1]) * UNITS[match[2].lower()] if match else 0
    except (KeyError, ValueError):
        amount = 0
    if amount < 1:
        raise ValueError(f"memory {text!r} is not an amount; write it as 16GiB, 80GB or a number of bytes")
    return int(amount)


def plan(model: ModelShape, memory: int, context: int, drafts: int = 0, presets: list[str] | None = None) -> Plan:
    """What fits into `memory` bytes of KV cache. Raises Unsupported when no preset covers the model's heads."""
    if context < 1 or drafts < 0:
        raise ValueError(f"context {context}, drafts {drafts}: a context of at least 1 token and no negative drafts")
    rows = [
        _plain(model, memory, context + drafts, "auto (16-bit)", 2),
        _plain(model, memory, context + drafts, "fp8", 1),
    ]
    notes = []
    sixteen_bit = rows[0].bytes_per_token
    for preset in presets or kvarn.presets():
        try:
            layout = kvarn.Layout(preset, head_dim=model.head_dim, kv_heads=model.kv_heads)
        except ValueError as error:
            raise Unsupported(
                f"{model.name} has head_dim {model.head_dim} and {model.kv_heads} KV heads: {error}"
            ) from None
        if drafts > layout.raw_tokens_per_page:
            notes.append(
                f"{preset} takes at most {layout.raw_tokens_per_page} drafts; {drafts} are refused at start-up."
            )
            continue
        rows.append(_packed(model, memory, context + drafts, layout, sixteen_bit))
    return Plan(model, memory, context, drafts, rows, notes + _notes(model, context))


def _plain(model: ModelShape, memory: int, context: int, dtype: str, value_bytes: int) -> Row:
    token = 2 * model.kv_heads * model.head_dim * value_bytes * model.full_layers
    user = -(-context // BLOCK_TOKENS) * BLOCK_TOKENS * token + _window_bytes(model, context, value_bytes)
    tokens = memory // (BLOCK_TOKENS * token) * BLOCK_TOKENS
    return Row(dtype, 8.0 * value_bytes, float(token), user, tokens, memory // user, 2 / value_bytes)


def _packed(model: ModelShape, memory: int, context: int, layout: kvarn.Layout, sixteen_bit: float) -> Row:
    page = layout.page_bytes * model.full_layers
    user = (-(-context // layout.page_tokens) + layout.pages_ahead) * page + _window_bytes(model, context, 2)
    token = page / layout.page_tokens
    tokens = memory // page * layout.page_tokens
    return Row(layout.preset, layout.bits_per_value, token, user, tokens, memory // user, sixteen_bit / token)


def _window_bytes(model: ModelShape, context: int, value_bytes: int) -> int:
    """Sliding layers hold their window only; kvarn leaves them in 16 bits."""
    return 2 * value_bytes * model.kv_heads * model.head_dim * min(model.window, context) * model.window_layers


def _notes(model: ModelShape, context: int) -> list[str]:
    notes = []
    if model.window_layers:
        notes.append(
            f"{model.window_layers} more layers slide over {model.window:,} tokens and stay in 16 bits by themselves: "
            "counted per user, not in the bytes per token."
        )
    if model.other_layers:
        notes.append(
            f"{model.other_layers} more layers keep a state of fixed size, not counted here; "
            "the vLLM plugin serves such models on GPUs only."
        )
    if model.max_context and context > model.max_context:
        notes.append(f"The model was made for {model.max_context:,} tokens; {context:,} is beyond that.")
    if context < 300:
        notes.append("Contexts under about 300 tokens gain nothing: a running request holds pages ahead of its tokens.")
    return notes
