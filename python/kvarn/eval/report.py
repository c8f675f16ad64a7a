# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown: a table of each run, then the paired ratios."""

from collections.abc import Mapping

HEAD = (
    "| cache | bits per value | mean KLD | trimmed | median | p99 | p99.9 | same top-1 % | perplexity % |\n"
    "|---|---|---|---|---|---|---|---|---|"
)

PASTS = {"decoded": "errors accumulate", "prompt": "the past as an exact prompt's"}


def markdown(result: Mapping) -> str:
    """The tables of one run, by bits per value; kvarn's default encoder in bold."""
    return "\n".join([title(result), "", table(result), "", ratios(result), ""])


def title(result: Mapping) -> str:
    tokens = max((row["tokens"] for row in result["rows"]), default=0)
    return (
        f"**{result['model']}**: head_dim {result['head_dim']}, {result['kv_heads']} KV heads, "
        f"{result['packed_layers']} of {result['layers']} layers packed; {result['text']}, contexts of "
        f"{result['context']:,}, {tokens:,} scored tokens; "
        f"{PASTS[result.get('past', 'decoded')]}; {result['date']}, commit {result['commit']}, "
        f"{result.get('where', 'cpu float32')}, {result['target']}."
    )


def table(result: Mapping) -> str:
    lines = [HEAD]
    for row in sorted(result["rows"], key=lambda row: -row["bits_per_value"]):
        name = f"**{row['name']}**" if row["name"].endswith(" weighted") else row["name"]
        lines.append(
            f"| {name} | {row['bits_per_value']:.4g} | {_interval(row['mean'], '.5f')} | {row['trimmed']:.5f} "
            f"| {_interval(row['median'], '.5f')} | {row['p99']:.3f} | {row['p999']:.3f} "
            f"| {row['same_top_percent']['value']:.2f} | {_interval(row['perplexity_percent'], '+.2f')} |"
        )
    return "\n".join(lines)


def ratios(result: Mapping) -> str:
    lines = ["| KLD of | over that of | mean | median |", "|---|---|---|---|"]
    lines += [
        f"| {pair['ours']} | {pair['other']} | {_interval(pair['mean'], '.2f')} | {_interval(pair['median'], '.2f')} |"
        for pair in result["pairs"]
    ]
    return "\n".join(lines)


def _interval(x: Mapping, form: str) -> str:
    return f"{x['value']:{form}} [{x['low']:{form}}, {x['high']:{form}}]"
