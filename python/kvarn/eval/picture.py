# SPDX-License-Identifier: Apache-2.0
"""Mean KL divergence against bits per value, one panel for each run, in SVG.

Filled points read their own tile of 128 tokens in 16 bits, or more; hollow ones round the newest tokens too. A rival
that was run both ways has its name at the hollow one and a line to the other. kvarn's names stand left of its points.
"""

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 860, 400, 62, 40, 44
_FIRST_BITS, _LAST_BITS = 1, 9
_OWN_TILE = ", own tile raw"
_COLOURS = {"weighted": "#0b7a75", "varnorm": "#d1495b", "rival": "#6b7785"}


def draw(results: Sequence[Mapping]) -> str:
    height = _HEIGHT * len(results)
    panels = "\n".join(_panel(result, _HEIGHT * number) for number, result in enumerate(results))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n{panels}\n</svg>\n'
    )


def _panel(result: Mapping, top: int) -> str:
    rows = [row for row in result["rows"] if row["bits_per_value"] <= _LAST_BITS and row["mean"]["value"] > 0]
    if not rows:
        raise ValueError(f"{result['model']}: no row below {_LAST_BITS} bits per value to draw")
    means = [row["mean"]["value"] for row in rows]
    low, high = floor(log10(min(means))), ceil(log10(max(means)))
    high = max(high, low + 1)

    def x(bits: float) -> float:
        return _LEFT + (bits - _FIRST_BITS) / (_LAST_BITS - _FIRST_BITS) * (_WIDTH - _LEFT - 150)

    def y(mean: float) -> float:
        return top + _TOP + (high - log10(mean)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    heading = f"{result['model']}: mean KL divergence (nats) against bits per value, contexts of {result['context']:,}"
    parts = [f'<text x="8" y="{top + 20}" font-size="14" font-weight="bold">{escape(heading)}</text>']
    for bits in range(_FIRST_BITS, _LAST_BITS + 1):
        parts.append(_line(x(bits), y(10.0**low), x(bits), y(10.0**high)))
        parts.append(f'<text x="{x(bits):.1f}" y="{y(10.0**low) + 16:.1f}" text-anchor="middle">{bits}</text>')
    for power in range(low, high + 1):
        parts.append(_line(x(_FIRST_BITS), y(10.0**power), x(_LAST_BITS), y(10.0**power)))
        parts.append(f'<text x="{_LEFT - 6}" y="{y(10.0**power) + 4:.1f}" text-anchor="end">1e{power}</text>')
    places = {row["name"]: (x(row["bits_per_value"]), y(row["mean"]["value"])) for row in rows}
    both = [name for name in places if name + _OWN_TILE in places]
    parts += [_line(*places[name], *places[name + _OWN_TILE], "#aab3bd") for name in both]
    taken = list(places.values())
    for row in sorted(rows, key=lambda row: row["mean"]["value"]):
        parts.append(_point(row, *places[row["name"]], row["name"].removesuffix(_OWN_TILE) == row["name"], taken))
    return "\n".join(parts)


def _point(row: Mapping, x: float, y: float, named: bool, taken: list[tuple[float, float]]) -> str:
    """A point, and unless it hangs on another its name, where it covers no other name or point near it."""
    colour = _COLOURS[row["name"].rsplit(" ", 1)[-1] if row["kind"] == "kvarn" else "rival"]
    fill = "white" if row["recent"] == "none" else colour
    point = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.5"/>'
    if not named:
        return point
    left = row["kind"] == "kvarn"
    others = [place for place in taken if place != (x, y)]
    free = (
        text
        for text in sorted(range(round(y) - 120, round(y) + 120, 2), key=lambda text: abs(text - y))
        if not any(
            -12 < (x - other_x if left else other_x - x) < 150 and abs(text - other_y) < 11
            for other_x, other_y in others
        )
    )
    text = next(free, y)
    taken.append((x - 8 if left else x + 8, text))
    name = row["name"].removeprefix("kvarn_").replace("_per_token_head", "_pth")
    weight = ' font-weight="bold"' if colour == _COLOURS["weighted"] else ""
    anchor = f'x="{x - 8:.1f}" text-anchor="end"' if left else f'x="{x + 8:.1f}"'
    return f'{point}<text {anchor} y="{text + 4:.1f}" fill="{colour}"{weight}>{escape(name)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = "#dde3e9") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
