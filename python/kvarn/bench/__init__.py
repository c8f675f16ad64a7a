# SPDX-License-Identifier: Apache-2.0
"""`kvarn bench serve`: what vLLM does with one KV cache or another, on this machine, in one run.

shapes   model configurations without weights
mix      what requests it gets
run      one mix through an engine, step by step
engine   one cache dtype in a process of its own: starts vLLM, runs every mix, prints JSON lines
serve    one engine after the other, and the table
"""
