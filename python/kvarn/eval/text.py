# SPDX-License-Identifier: Apache-2.0
"""Contexts of token ids, cut from a text at even distances."""

from pathlib import Path

import numpy as np

# Far apart, so that contexts come from different articles.
SPACING = 16_384


def contexts(path: str | Path, tokenizer, count: int, length: int) -> np.ndarray:
    """int64 [count, length + 1]: `count` separate contexts; the last token of each is only predicted, never read.

    Each begins as the tokenizer begins a text: with <bos> where the model was trained so.
    The first contexts stay the same when `count` grows, as long as the text has room for them at the usual distance.
    Raises FileNotFoundError, or ValueError if the text is too short.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no text at {path}; give one with --text (UTF-8; the table uses WikiText-2's test set)"
        )
    begin = np.asarray(tokenizer("")["input_ids"], dtype=np.int64)
    tokens = np.asarray(tokenizer(path.read_text(encoding="utf-8"))["input_ids"], dtype=np.int64)[len(begin) :]
    cut = length + 1 - len(begin)
    room = len(tokens) - cut
    if room < 0 or (count > 1 and room // (count - 1) < cut):
        raise ValueError(
            f"{path} has {len(tokens)} tokens, too few for {count} contexts of {length + 1}; "
            "ask for fewer or shorter contexts (--contexts, --length) or give a longer text"
        )
    spacing = min(SPACING, room // (count - 1)) if count > 1 else 0
    starts = (i * spacing for i in range(count))
    return np.stack([np.concatenate([begin, tokens[start : start + cut]]) for start in starts])
