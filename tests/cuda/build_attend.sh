#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds attend_test into $1 without cmake, for one architecture: build_attend.sh FOLDER [SHAPES...]
set -euo pipefail
out=$1; shift
cd "$(dirname "$0")/../.."
mkdir -p "$out"
shapes=("$@")
if ((${#shapes[@]} == 0)); then
  for kv in "4 2" "4 3" "4 4" "2 2" "8 4"; do for g in 128 64; do for d in 64 96 128 256; do shapes+=("$kv $g $d"); done; done; done
fi
flags=(-std=c++20 --expt-relaxed-constexpr -fmad=false -gencode=arch=compute_90a,code=sm_90a -Isrc -lineinfo -Iinclude "-I$out")
: > "$out/built_shapes.inc"
for shape in "${shapes[@]}"; do
  read -r k v g d <<<"$shape"
  echo "SHAPE($k, $v, $g, $d)" >> "$out/built_shapes.inc"
  sed "s/@K_BITS@/$k/; s/@V_BITS@/$v/; s/@PAGE_TOKENS@/$g/; s/@HEAD_DIM@/$d/" src/cuda/instances/attend.cu.in > "$out/attend_k${k}v${v}_g${g}_d${d}.cu"
done
cpu=(src/api/check.cpp src/api/error.cpp src/api/kvarn.cpp src/codec/*.cpp src/cpu/*.cpp src/pages/*.cpp src/target/*.cpp)
{
  for file in "$out"/attend_k*.cu src/cuda/plan.cu src/cuda/attend.cu tests/cuda/attend_test.cu src/cuda/plan.cpp; do
    echo "nvcc ${flags[*]} -Xptxas -v -c $file -o $out/$(basename "$file").o > $out/$(basename "$file").log 2>&1 || cat $out/$(basename "$file").log"
  done
  for file in "${cpu[@]}"; do
    extra=
    [[ $file == */avx2.cpp ]] && extra="-mavx2 -mf16c"
    [[ $file == */avx512.cpp ]] && extra="-mavx2 -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512"
    echo "g++ -std=c++20 -O2 -ffp-contract=off $extra -Isrc -Iinclude -c $file -o $out/$(tr / _ <<<"$file").o"
  done
} | xargs -P "$(nproc)" -d '\n' -I{} bash -c '{}'
nvcc -o "$out/attend_test" "$out"/*.o -lpthread
