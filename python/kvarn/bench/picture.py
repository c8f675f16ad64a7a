# SPDX-License-Identifier: Apache-2.0
"""The figures of a `kvarn bench serve` run, or others, as bars in SVG."""

from html import escape

from kvarn.bench.mix import Mix
from kvarn.bench.serve import value

_WIDTH, _LEFT, _BAR, _GAP = 720, 190, 18, 26
_OURS, _OTHERS = "#0b7a75", "#9aa5b1"


def draw(lines: list[dict], mixes: list[Mix]) -> str:
    """A panel for the tokens that fit and one for each mix: its decode step, or its first tokens where the prompts are
    found in the prefix cache but for their ends. kvarn's bars are coloured."""
    panels = [("tokens that fit (more is better)", _bars(lines, "fit_tokens"), "{:,.0f}")]
    for mix in mixes:
        least, key = (f"{mix.least:,} to ", "step_mean_ms") if mix.least else ("", "step_ms")
        what, new, form = "ms per decode step", "", "{:.2f}"
        if mix.new:  # then it is about the first tokens
            what, new, key, form = "s to the first tokens", f", the last {mix.new:,} new", "prefill_s", "{:.3f}"
        title = f"{what}, {mix.requests} x {least}{mix.context:,} tokens{new} (less is better)"
        panels.append((title, _bars(lines, key, mix), form))
    return panels_of_bars(panels)


def panels_of_bars(panels: list[tuple[str, list[tuple[str, float]], str]]) -> str:
    """Of each panel the title, its bars (name, value), and how a value is written; all panels one below the other."""
    parts, top = [], 16
    for title, bars, form in panels:
        parts.append(f'<text x="8" y="{top}" font-weight="bold">{escape(title)}</text>')
        most = max((shown for _, shown in bars), default=1)
        for name, shown in bars:
            top += _GAP
            length = max(2, (_WIDTH - _LEFT - 110) * shown / most)
            colour = _OURS if name.startswith("kvarn") else _OTHERS
            parts.append(f'<text x="{_LEFT - 8}" y="{top + 4}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<rect x="{_LEFT}" y="{top - 9}" width="{length:.0f}" height="{_BAR}" fill="{colour}"/>')
            parts.append(f'<text x="{_LEFT + length + 6:.0f}" y="{top + 4}">{form.format(shown)}</text>')
        top += 44
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}" font-family="sans-serif" '
        f'font-size="13">\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _bars(lines: list[dict], key: str, mix: Mix | None = None) -> list[tuple[str, float]]:
    return [(line["kv_cache_dtype"], found) for line in lines if (found := value(line, key, mix)) is not None]
