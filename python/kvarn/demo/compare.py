# SPDX-License-Identifier: Apache-2.0
"""How far two greedy answers agree."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Agreement:
    """`same_until`: tokens before the first difference. `equal` of `tokens` positions hold the same token."""

    same_until: int
    equal: int
    tokens: int

    @property
    def identical(self) -> bool:
        return self.equal == self.tokens


def agreement(one: list[int], other: list[int]) -> Agreement:
    """Compares position by position; where one answer is longer, its rest counts as different."""
    pairs = list(zip(one, other, strict=False))
    same_until = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return Agreement(same_until, sum(a == b for a, b in pairs), max(len(one), len(other)))
