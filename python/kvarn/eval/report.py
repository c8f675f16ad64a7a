# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown: of a text a table of each run and the paired ratios, of tasks a table for each."""

from collections.abc import Mapping

HEAD = (
    "| cache | bits per value | mean KLD | trimmed | median | p99 | p99.9 | same top-1 % | perplexity % |\n"
    "|---|---|---|---|---|---|---|---|---|"
)

PASTS = {"decoded": "errors accumulate", "prompt": "the past as an exact prompt's"}


def markdown(result: Mapping) -> str:
    """The tables of one run, by bits per value; kvarn's default encoder in bold."""
    if "tasks" in result:
        return "\n".join(part for task in result["tasks"] for part in (*task_table(result, task), ""))
    paired = [ratios(result), ""] if result["pairs"] else []
    return "\n".join([title(result), "", table(result), "", *paired])


def task_table(result: Mapping, task: Mapping) -> list[str]:
    """The lines of one task of a result of `kvarn eval ask`."""
    lines = [
        f"**{result['model']}, {task['name']}** ({task['source']}): {task['questions']} questions, at most "
        f"{task['new_tokens']} tokens of an answer; {_made(result)}.",
        "",
        "| cache | bits per value | right % | difference to 16 bits, paired | lost, won | same text % | mean tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in _by_bits(result):
        if found := row["tasks"].get(task["name"]):
            lines.append(
                f"| {_name(row)} | {row['bits_per_value']:.4g} | {_interval(found['right_percent'], '.1f')} "
                f"| {_interval(found['difference_percent'], '+.1f')} | {found['lost']}, {found['won']} "
                f"| {found['same_text_percent']['value']:.1f} | {found['mean_tokens']:.1f} |"
            )
    return lines


def title(result: Mapping) -> str:
    tokens = max((row["tokens"] for row in result["rows"]), default=0)
    return (
        f"**{result['model']}**: head_dim {result['head_dim']}, {result['kv_heads']} KV heads, "
        f"{result['packed_layers']} of {result['layers']} layers packed; {result['text']}, contexts of "
        f"{result['context']:,}, {tokens:,} scored tokens; "
        f"{perplexity(result)}{PASTS[result.get('past', 'decoded')]}; {_made(result)}."
    )


def perplexity(result: Mapping) -> str:
    """That of the model without a cache: whether it is a working model at all."""
    if not result["rows"]:
        return ""
    row = result["rows"][0]  # any would do: each has its own perplexity and how far that is from the one asked for
    return f"perplexity {row['perplexity'] / (1 + row['perplexity_percent']['value'] / 100):.4g} without a cache; "


def table(result: Mapping) -> str:
    lines = [HEAD]
    for row in _by_bits(result):
        lines.append(
            f"| {_name(row)} | {row['bits_per_value']:.4g} | {_interval(row['mean'], '.5f')} | {row['trimmed']:.5f} "
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


def _made(result: Mapping) -> str:
    where = result.get("where", "cpu float32")
    text_by = f", {result['text_by']}" if "text_by" in result else ""
    return f"{result['date']}, commit {result['commit']}, {where}, {result['target']}{text_by}"


def _by_bits(result: Mapping) -> list[Mapping]:
    return sorted(result["rows"], key=lambda row: -row["bits_per_value"])


def _name(row: Mapping) -> str:
    return f"**{row['name']}**" if row["name"].endswith(" weighted") else row["name"]


def _interval(x: Mapping, form: str) -> str:
    return f"{x['value']:{form}} [{x['low']:{form}}, {x['high']:{form}}]"
