#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds the Python module with CUDA kernels outside the tree and runs the GPU tests, several files at a time. It needs
# nvcc, cmake, ninja, and a Python with torch, nanobind, pytest and hypothesis; no network.
#
#   tests/cuda/run.sh [test files or -k expressions for pytest]
#
#   KVARN_BUILD=/tmp/kvarn-cuda          where to build
#   KVARN_CUDA_ARCHITECTURES=90a         of this machine's GPU
#   KVARN_CUDA_SHAPES=all                or some, as k4v2_g128_d128;k4v2_g64_d64
#   KVARN_JOBS=6                         test processes at a time
#   PYTHON=python3
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${KVARN_BUILD:-/tmp/kvarn-cuda} python=${PYTHON:-python3}
nanobind=$("$python" -m nanobind --cmake_dir)
mkdir -p "$build"
start=$SECONDS
cmake -G Ninja -S "$root" -B "$build" -DKVARN_CUDA=ON -DKVARN_PYTHON=ON -DKVARN_TESTS=OFF \
  -DKVARN_CUDA_ARCHITECTURES="${KVARN_CUDA_ARCHITECTURES:-90a}" -DKVARN_CUDA_SHAPES="${KVARN_CUDA_SHAPES:-all}" \
  -Dnanobind_DIR="$nanobind" -DPython_EXECUTABLE="$(command -v "$python")" > "$build/configure.log" 2>&1 ||
  { cat "$build/configure.log"; exit 1; }
cmake --build "$build" > "$build/build.log" 2>&1 || { grep -E 'error|FAILED' "$build/build.log" | head -50; exit 1; }
site=$build/site
rm -rf "$site" && mkdir -p "$site"
cp -r "$root/python/kvarn" "$site/"
cp "$build"/python/csrc/_core*.so "$site/kvarn/"
echo "built in $((SECONDS - start)) s: $(grep 'with CUDA kernels' "$build/configure.log")"

cd "$root"
export PYTHONPATH=$site PYTHONDONTWRITEBYTECODE=1
files=() options=()
for argument in "$@"; do
  if [[ $argument == *.py* ]]; then files+=("$argument"); else options+=("$argument"); fi
done
((${#files[@]})) || files=(tests/cuda/test_*.py)
run() {
  local log=$1/$(basename "$2" | tr -c 'A-Za-z0-9_\n' '_').log
  "$python" -m pytest -q -p no:cacheprovider --tb=short -rfE "$2" "${@:3}" > "$log" 2>&1 && state=ok || state=FAILED
  echo "$state $2: $(tail -n 1 "$log")"
  [[ $state == ok ]] || grep -vE '^(\.|F|s|E)+ *\[' "$log" | tail -n "${KVARN_TAIL:-60}"
  [[ $state == ok ]]
}
export -f run
export python KVARN_TAIL
start=$SECONDS status=0
printf '%s\n' "${files[@]}" |
  xargs -P "${KVARN_JOBS:-6}" -I{} bash -c 'run "$0" "$@"' "$build" {} "${options[@]}" || status=1
echo "tested in $((SECONDS - start)) s, status $status"
exit $status
