#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The CUDA benchmarks, in one call: builds the library and speed.cu, checks every answer, times, times the rivals on the
# same machine, and writes bench/results/cuda-{attend,append,expand}.jsonl with a table last. About 4 minutes on 16
# cores and an H200, most of it compiling. Needs nvcc, cmake and python3; torch for the rivals.
#
#   bench/cuda/gpu.sh [word ..]      only benchmarks whose label has every word (speed.cu); results are then only printed
#   RESULTS=folder   in place of bench/results
#   BUILD=folder     keeps the build; LIBRARY=file links that libkvarn.a and builds none
#   SHAPES=list      of kernels to build, as k4v2_g128_d128;...
#   FLASH=file.tar   vLLM, or its vllm/vllm_flash_attn alone (rivals.py), packed; else whatever PYTHONPATH has
#   RIVALS=0         leaves the rivals out
#   COMMIT=hash      where there is no git
#   CHECK=1          times nothing
#   NCU=kernel       profiles the first launch of that kernel instead of timing: NCU=attend_kernel gpu.sh attend 32x8192
set -euo pipefail
cd "$(dirname "$0")/../.."
here=bench/cuda
export LC_ALL=C
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
build=${BUILD:-$temporary/build}
mkdir -p "$build"
shapes=k4v2_g128_d128
for shape in k3v3_g128_d128 k4v3_g128_d128 k2v2_g128_d128 k4v4_g128_d128 k8v4_g128_d128 k4v2_g128_d64 k4v2_g128_d96 k4v2_g128_d256; do
  shapes+=";$shape"
done
seconds() { echo "$1: $((SECONDS - started)) s" >&2; started=$SECONDS; }
started=$SECONDS
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw --format=csv,noheader >&2

nvcc -std=c++20 --expt-relaxed-constexpr -O2 -gencode=arch=compute_90a,code=sm_90a -Isrc -Iinclude \
  -c $here/speed.cu -o "$build/speed.o" &
compiling=$!
if [[ -z ${LIBRARY:-} ]]; then
  generator=()
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  cmake -S . -B "$build" "${generator[@]}" -DKVARN_CUDA=ON -DKVARN_CUDA_ARCHITECTURES=90a \
    "-DKVARN_CUDA_SHAPES=${SHAPES:-$shapes}" >"$build/cmake.log" || { cat "$build/cmake.log" >&2; exit 1; }
  cmake --build "$build" --target kvarn -j "$(nproc)" >"$build/build.log" 2>&1 || {
    grep -E -A5 'error|Error|FAILED' "$build/build.log" | head -60 >&2
    exit 1
  }
fi
wait $compiling
nvcc "$build/speed.o" "${LIBRARY:-$build/libkvarn.a}" -lpthread -o "$build/speed"
seconds build

status=0
options=()
if [[ ${CHECK:-} ]]; then options=(--check); fi
if [[ ${NCU:-} ]]; then
  sections=()
  for name in SpeedOfLight LaunchStats Occupancy WarpStateStats InstructionStats MemoryWorkloadAnalysis; do
    sections+=(--section "$name")
  done
  ncu --clock-control none -k "regex:$NCU" -c 1 "${sections[@]}" --print-details all "$build/speed" --check --pool 3 "$@"
  exit
fi
: >"$build/speed.jsonl"
# A process each, so that a fault in one verb costs only its own lines.
verbs=(attend sustained plan step layer expand append)
if (($#)) && [[ " ${verbs[*]} " == *" $1 "* ]]; then verbs=("$1"); fi
for verb in "${verbs[@]}"; do
  timeout 150 "$build/speed" "${options[@]}" "$verb " "$@" >>"$build/speed.jsonl" || status=1
done
seconds kvarn

: >"$build/rivals.jsonl"
if [[ ${RIVALS:-1} != 0 && -z ${CHECK:-} ]]; then
  if [[ ${FLASH:-} ]]; then
    mkdir -p "$build/site"
    tar xf "$FLASH" -C "$build/site"
    export PYTHONPATH=$build/site${PYTHONPATH:+:$PYTHONPATH}
  fi
  timeout 200 python3 $here/rivals.py >"$build/rivals.jsonl" || status=1
  seconds rivals
fi

results=${RESULTS:-bench/results}
if (($#)); then results=; fi
python3 $here/speed_summary.py --commit "${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}" \
  --results "$results" "$build/speed.jsonl" "$build/rivals.jsonl"
nvidia-smi --query-gpu=clocks.sm,temperature.gpu,power.draw --format=csv,noheader >&2
exit $status
