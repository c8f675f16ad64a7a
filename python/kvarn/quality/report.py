# SPDX-License-Identifier: Apache-2.0
"""Results as JSON (bench/results/quality-DATE.json) and as the page docs/quality.md."""

import dataclasses
import json
import subprocess
from datetime import date
from pathlib import Path

import kvarn
from kvarn.quality import statistics
from kvarn.quality.run import ENCODERS, FIRST_SCORED, LENGTH, Result
from kvarn.quality.statistics import Estimate

# What the default encoder must reach at the main preset (mean KLD, median KLD), as a part of varnorm's.
GOAL_MEAN, GOAL_MEDIAN = 0.6, 0.55

PAGE = """\
# Quality

What each preset changes in a real model's predictions. One command makes this page: `make quality`.

| | |
|---|---|
| date, commit | {date}, {commit} |
| model | {model}, float32 weights, {layers} layers, head_dim {head_dim}, {kv_heads} KV heads |
| text | {text}, separate contexts of {length:,} tokens, scored from position {first} |
| library | kvarn {version}, target {target} |

Every context goes through `kvarn.append` and `kvarn.attend` in all layers: the compiled library, tile-causal as in
serving (a token sees its own tile of 128 raw, all earlier tiles packed). The reference is the same model with its keys
and values unrounded. KLD is the Kullback-Leibler divergence of the next-token distribution from the reference's, in
nats per token; *trimmed* is the mean without the worst 1 % of the tokens. Brackets are 95 % intervals, by bootstrap
over blocks of 128 tokens.

{table}

The first rows are not kvarn: bf16 is the 16-bit cache; fp8 rounds each value to e4m3, with vLLM's default scale of 1
and with one scale per layer for K and one for V, taken from the largest value of the same context (ideal calibration).
An fp8 cache rounds the newest tokens too, where kvarn keeps them raw until their tile is full: part of fp8's loss.

## The encoders, paired on the same tokens

{ratios}

Goal for {main}: at most {goal_mean} of varnorm's mean KLD and {goal_median} of its median. {verdict}

## How to read it

- KLD says more than perplexity: it sees every changed prediction, also where the text's own token stays as likely.
- The mean hangs on rare tokens: 1 % of them carry a seventh to a quarter of it. Compare medians and trimmed means too.
- V at 2 bits carries most of k4v2's KLD: the next bits belong to V (k4v3, k4v4), and k8v4 adds what is left of K's.
- A model of 135M parameters with head_dim 64 is a hard case.
"""


def ratios(results: list[Result]) -> dict[str, tuple[Estimate, Estimate]]:
    """preset -> (mean ratio, median ratio) of the encoders weighted / varnorm."""
    scores = {result.setting.name: result.scores for result in results}
    weighted, varnorm = ENCODERS
    return {
        preset: (statistics.mean_ratio(one, other), statistics.median_ratio(one, other))
        for preset in kvarn.presets()
        if (one := scores.get(f"{preset} {weighted}")) and (other := scores.get(f"{preset} {varnorm}"))
    }


def markdown(results: list[Result], facts: dict) -> str:
    """The page. `facts`: commit, model, layers, head_dim, kv_heads, text, main (a preset)."""
    lines = [
        "| cache | bits per value | tokens | mean KLD | trimmed | median | p99 | p99.9 | same top-1 % | perplexity % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        row, bits = statistics.summary(result.scores), result.setting.bits_per_value
        change = row.perplexity_percent
        lines.append(
            f"| {result.setting.name} | {bits:.4g} | {row.tokens:,} "
            f"| {row.mean:.5f} | {row.trimmed:.5f} | {row.median:.5f} | {row.p99:.3f} | {row.p999:.3f} "
            f"| {row.same_top_percent:.2f} | {change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}] |"
        )
    pairs = ratios(results)
    ratio_lines = ["| preset | mean KLD, weighted / varnorm | median |", "|---|---|---|"]
    ratio_lines += [f"| {preset} | {_text(mean)} | {_text(median)} |" for preset, (mean, median) in pairs.items()]
    return PAGE.format(
        **facts,
        date=date.today().isoformat(),
        version=kvarn.__version__,
        target=kvarn.target(),
        length=LENGTH,
        first=FIRST_SCORED,
        table="\n".join(lines),
        ratios="\n".join(ratio_lines),
        goal_mean=GOAL_MEAN,
        goal_median=GOAL_MEDIAN,
        verdict=verdict(pairs[facts["main"]]),
    )


def verdict(pair: tuple[Estimate, Estimate]) -> str:
    mean, median = pair
    reached = mean.value <= GOAL_MEAN and median.value <= GOAL_MEDIAN
    return f"{'Reached' if reached else 'Missed'}: {_text(mean)} and {_text(median)}."


def write(results: list[Result], facts: dict, root: Path) -> tuple[Path, Path]:
    """Writes both files below `root`, the repository; returns their paths (JSON, Markdown)."""
    described = {
        **facts,
        "date": date.today().isoformat(),
        "version": kvarn.__version__,
        "target": kvarn.target(),
        "rows": [
            {"name": r.setting.name, "bits_per_value": r.setting.bits_per_value}
            | dataclasses.asdict(statistics.summary(r.scores))
            for r in results
        ],
        "weighted_over_varnorm": {
            preset: {"mean": dataclasses.asdict(mean), "median": dataclasses.asdict(median)}
            for preset, (mean, median) in ratios(results).items()
        },
    }
    data = root / "bench" / "results" / f"quality-{date.today().isoformat()}.json"
    page = root / "docs" / "quality.md"
    for path, content in ((data, json.dumps(described, indent=1) + "\n"), (page, markdown(results, facts))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return data, page


def commit() -> str:
    """The short name of the commit in the current folder, marked where files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "no commit yet"


def _text(x: Estimate) -> str:
    return f"{x.value:.2f} [{x.low:.2f}, {x.high:.2f}]"
