# SPDX-License-Identifier: Apache-2.0
"""What a cache costs in accuracy: KL divergence, top-1 agreement and perplexity of a real model on a real text, and how
many questions it still answers.

kvarn's presets go through `kvarn.append` and `kvarn.attend` as in serving; other formats are simulated (kvarn.rivals).
`kvarn eval run`, `ask` and `layers` measure, `kvarn eval report` draws. Needs torch and transformers.

    model       the model, on a device
    text        a text file -> contexts of token ids
    attention   how a transformers model is made to attend through a cache
    caches      the caches that are compared
    rows        which caches make up a run, under which names
    measure     one context through one cache -> scores of every token
    statistics  scores -> figures with bootstrap intervals
    run         all rows over all contexts, resumable
    layers      what each layer loses by itself, and the best preset for each within a budget
    tasks       questions and the rules by which their sources count answers right
    generation  greedy answers through transformers caches
    answers     all rows over all questions, resumable
    keys        what is done already, and under which names
    results     one JSON object per run
    report      results -> Markdown
    picture     results -> SVG
"""
