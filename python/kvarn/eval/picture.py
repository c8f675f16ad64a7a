# SPDX-License-Identifier: Apache-2.0
"""Mean KL divergence against bits per value, one panel for each model and length of contexts, in SVG.

Filled points read their own tile of 128 tokens in 16 bits, or more; hollow ones round the newest tokens too. A rival
that was run both ways has its name at the hollow one and a line to the other. Names stand beside their points where
there is room, kvarn's to the left; those that had to move away are tied to their points by a line.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from html import escape
from math import ceil, floor, log10

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 860, 400, 62, 40, 44
_FIRST_BITS, _LAST_BITS = 0, 9
_OWN_TILE = ", own tile raw"
Box = tuple[float, float, float, float]  # left, top, right, bottom
_COLOURS = {  # by the last word of kvarn's rows
    "weighted": "#0b7a75", "feedback": "#3c9d4e", "fit": "#c98a1b", "varnorm": "#d1495b", "min-max": "#8d6e97",
    "own": "#3d5a98", "rival": "#6b7785",
}  # fmt: skip


def draw(results: Sequence[Mapping], only: str = "*") -> str:
    """Rows of runs of the same model and length share a panel; of rows of the same name the first is drawn, if it
    matches one of the patterns in `only` (shell wildcards, separated by ";")."""
    patterns = [pattern.strip() for pattern in only.split(";")]
    results = _panels(results)
    for panel in results:
        panel["rows"] = [row for row in panel["rows"] if any(fnmatchcase(row["name"], p) for p in patterns)]
    height = _HEIGHT * len(results)
    panels = "\n".join(_panel(result, _HEIGHT * number) for number, result in enumerate(results))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n{panels}\n</svg>\n'
    )


def _panels(results: Sequence[Mapping]) -> list[dict]:
    panels = {}
    for result in results:
        panel = panels.setdefault(
            (result["model"], result["context"], result.get("past", "decoded")), {**result, "rows": []}
        )
        drawn = {row["name"] for row in panel["rows"]}
        panel["rows"] += [row for row in result["rows"] if row["name"] not in drawn]
    return list(panels.values())


def _panel(result: Mapping, top: int) -> str:
    rows = [row for row in result["rows"] if row["bits_per_value"] <= _LAST_BITS and row["mean"]["value"] > 0]
    if not rows:
        raise ValueError(f"{result['model']}: no row below {_LAST_BITS} bits per value to draw that was asked for")
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
    # What names must not cover: points, and names already placed.
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places.values()]
    area = (_LEFT, top + _TOP - 8, _WIDTH, y(10.0**low))
    for row in sorted(rows, key=lambda row: (row["kind"] != "kvarn", row["mean"]["value"])):
        named = row["name"].removesuffix(_OWN_TILE) == row["name"]
        parts.append(_point(row, *places[row["name"]], named, taken, area))
    return "\n".join(parts)


def _point(row: Mapping, x: float, y: float, named: bool, taken: list[Box], area: Box) -> str:
    """A point, and unless it hangs on another its name."""
    colour = _COLOURS[row["name"].rsplit(" ", 1)[-1] if row["kind"] == "kvarn" else "rival"]
    fill = "white" if row["recent"] == "none" else colour
    point = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.5"/>'
    if not named:
        return point
    name = row["name"].removeprefix("kvarn_").replace("_per_token_head", "_pth").replace("turboquant", "tq")
    bold = colour == _COLOURS["weighted"]
    box = _place(x, y, len(name) * (6.4 if bold else 5.8), row["kind"] == "kvarn", taken, area)
    taken.append(box)
    left, text = box[2] < x, (box[1] + box[3]) / 2
    edge = box[2] if left else box[0]
    tie = _line(x, y, edge, text, "#c3cad1") if abs(text - y) > 12 or abs(edge - x) > 12 else ""
    anchor = f'x="{edge:.1f}" text-anchor="{"end" if left else "start"}" y="{text + 4:.1f}"'
    weight = ' font-weight="bold"' if bold else ""
    return f'{tie}{point}<text {anchor} fill="{colour}"{weight}>{escape(name)}</text>'


def _place(x: float, y: float, width: float, left: bool, taken: Sequence[Box], area: Box) -> Box:
    """Where a name of that width goes: the nearest free place, its side first; beside the point where none is free."""

    def box(side: int, away: float, down: float) -> Box:
        near = x + side * (8 + away)
        return (min(near, near + side * width), y + down - 5.5, max(near, near + side * width), y + down + 5.5)

    def free(box: Box) -> bool:
        inside = area[0] <= box[0] and area[1] <= box[1] and box[2] <= area[2] and box[3] <= area[3]
        return inside and not any(
            box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
        )

    first = -1 if left else 1
    tried = [
        (abs(down) + away + (0 if side == first else 24), side, away, down)
        for side in (first, -first)
        for away in range(0, 121, 8)
        for down in range(-120, 121, 2)
    ]
    return next(filter(free, (box(*place) for _, *place in sorted(tried))), box(first, 0, 0))


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = "#dde3e9") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
