#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds fragment_order.cu, checks and times every variant, and prints one JSON line each with the instructions that a
# warp takes for a record (the loop's SASS). Needs a GPU of compute capability 9.0, nvcc, cuobjdump and python3.
#   SASS=file   keeps the disassembly
#   NCU=1       counts bank conflicts with Nsight Compute instead
set -euo pipefail
cd "$(dirname "$0")"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

nvcc -arch=sm_90a -std=c++20 -O3 -I../../src -I../../include fragment_order.cu -o "$build/fragment_order"
if [[ ${NCU:-} ]]; then
  metrics=smsp__inst_executed_op_shared_ld.sum
  metrics+=,l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum
  metrics+=,l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum
  ncu --clock-control none --csv --page raw --print-kernel-base mangled --metrics $metrics "$build/fragment_order" check
  exit
fi

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >&2
echo "nvcc $(nvcc --version | grep -o 'V[0-9.]*$'), $(date +%F)" >&2
cuobjdump -sass "$build/fragment_order" > "${SASS:=$build/sass}"
"$build/fragment_order" > "$build/lines"
python3 - "$SASS" "$build/lines" <<'PY'
import collections, json, re, sys

GROUPS = "HMMA IMMA LOP3 PRMT SHF LDS MOVM F2FP HADD2 HMUL2 HFMA2 FADD FMUL FFMA IADD3 IMAD MOV".split()
functions, code = {}, None
for line in open(sys.argv[1]):
    if match := re.search(r"Function : (\S+)", line):
        code = functions[match[1]] = []
    elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(\S*)\s*(.*?);", line):
        code.append((int(match[1], 16), match[2], match[4]))


def loop(code):
    """The instructions of the longest loop: from a branch's earlier target to the branch."""
    branches = [(re.search(r"(?:^|\s)0x([0-9a-f]+)", rest), last) for last, name, rest in code if name == "BRA"]
    spans = [(last - int(target[1], 16), int(target[1], 16), last) for target, last in branches if target]
    _, first, last = max(spans)
    return collections.Counter(name for address, name, _ in code if first <= address <= last)


for line in open(sys.argv[2]):
    row = json.loads(line)
    counts = loop(functions[row.pop("symbol")])
    row["instructions"] = sum(counts.values())
    row |= {name: counts.pop(name) for name in GROUPS if counts[name]}
    print(json.dumps(row | {"other": sum(counts.values())}))
PY
