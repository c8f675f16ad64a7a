# SPDX-License-Identifier: Apache-2.0
"""What a preset costs in quality: KL divergence, top-1 agreement and perplexity of a real model on a real text.

Every key and value of every layer goes through `kvarn.append` and `kvarn.attend` as in serving; nothing is simulated.
`kvarn quality` (or `make quality`) runs it and writes docs/quality.md. Needs torch and transformers.

    text        a text file -> contexts of token ids
    attention   the caches that are compared, as attention functions of a transformers model
    measure     one context through one cache -> scores of every token
    statistics  scores -> a row of the table, bootstrap intervals
    run         all of it, resumable
    report      rows -> JSON and Markdown
"""
