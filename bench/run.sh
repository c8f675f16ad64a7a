#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# All CPU benchmarks, each of which checks its answers first. `make bench` calls it with the build folder; the tables go to
# bench/results/. Leave the machine alone meanwhile: about 10 minutes on 2 cores.
set -euo pipefail
build=$1
cd "$(dirname "$0")"
"../$build/bench/bench_verbs" --benchmark_min_time=0.05 --benchmark_format=json 2>/dev/null >"../$build/verbs.json"
python cpu/verbs_summary.py <"../$build/verbs.json" | tee results/cpu-verbs.jsonl
"../$build/bench/bench_fragment_order"
python cpu/attention.py
python serve/decode.py
