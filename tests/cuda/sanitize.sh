#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# A small life cycle of every verb under compute-sanitizer's four tools, one after the other per shape, several at a time.
# Builds outside the tree; needs nvcc, cmake, ninja and compute-sanitizer; no network.
#
#   tests/cuda/sanitize.sh [tool ...]    memcheck racecheck initcheck synccheck
#
#   KVARN_BUILD=/tmp/kvarn-sanitize   KVARN_CUDA_SHAPES=k4v2_g128_d128;k8v4_g64_d256 or all   KVARN_CUDA_ARCHITECTURES=90a
#   KVARN_JOBS=6    KVARN_SECONDS=100 at most, for each run
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${KVARN_BUILD:-/tmp/kvarn-sanitize}
mkdir -p "$build"
cmake -G Ninja -S "$root" -B "$build" -DKVARN_CUDA=ON -DCMAKE_CUDA_FLAGS="${CUDAFLAGS:-} -lineinfo" \
  -DKVARN_CUDA_ARCHITECTURES="${KVARN_CUDA_ARCHITECTURES:-90a}" \
  -DKVARN_CUDA_SHAPES="${KVARN_CUDA_SHAPES:-k4v2_g128_d128;k2v2_g64_d96;k4v3_g128_d64;k8v4_g64_d256}" \
  > "$build/configure.log" 2>&1 || { cat "$build/configure.log"; exit 1; }
cmake --build "$build" --target kvarn > "$build/build.log" 2>&1 ||
  { grep -E 'error|FAILED' "$build/build.log" | head -30; exit 1; }
program=$build/kvarn_sanitized
nvcc -std=c++20 -I"$root/include" -I"$root/tests" "$root/tests/cuda/sanitized.cpp" "$build/libkvarn.a" -o "$program"
shapes=$(sed -n 's/^SHAPE(\(.*\), \(.*\), \(.*\), \(.*\))/k\1v\2_g\3_d\4/p' "$build/cuda/built_shapes.inc")
tools=("$@")
((${#tools[@]})) || tools=(memcheck racecheck initcheck synccheck)

"$program" $shapes > "$build/plain.log" || { echo "FAILED without a tool"; tail -n 3 "$build/plain.log"; exit 1; }
for tool in "${tools[@]}"; do for shape in $shapes; do echo "$shape $tool"; done; done |
  xargs -P "${KVARN_JOBS:-6}" -L 1 "$root/tests/cuda/tool.sh" "$program" "$build"
