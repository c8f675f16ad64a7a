#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# For a GPU machine whose time is scarce: builds here, where there is nvcc and need be no GPU, all that tests/cuda/packed.sh
# runs there, into FOLDER (about 20 MB): the library, the Python module, and objects of the test programs and of the benchmark.
#
#   tests/cuda/pack.sh FOLDER
#
#   KVARN_BUILD=/tmp/kvarn-pack     where to build        KVARN_CUDA_ARCHITECTURES=90a     of the GPU
#   KVARN_CUDA_SHAPES=...           14 of them, those of the benchmark among them; all takes long
#   PYTHON=python3                  with nanobind         HEADERS=/usr/include/python3.12  of the GPU machine's Python
#
# On a Hopper GPU, what an Ampere or Ada GPU runs: KVARN_CUDA_ARCHITECTURES=80@90 KVARN_CUDA_SHARED_LIMIT=101376
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1" && out=$(cd "$1" && pwd)
build=${KVARN_BUILD:-/tmp/kvarn-pack} python=${PYTHON:-python3} architecture=${KVARN_CUDA_ARCHITECTURES:-90a}
headers=${HEADERS:-$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')}
shapes="k4v2_g128_d128;k4v3_g128_d128;k2v2_g128_d128;k4v4_g128_d128;k8v4_g128_d128;k4v2_g128_d64;k4v2_g128_d96"
shapes+=";k4v2_g128_d256;k4v2_g64_d128;k4v3_g64_d96;k2v2_g64_d64;k4v4_g128_d64;k3v3_g128_d128;k3v3_g128_d64"
mkdir -p "$build"
rm -f "$out"/{commit,_core.so.xz,libkvarn.a.xz,*.o}  # what fails leaves nothing behind
cmake -G Ninja -S "$root" -B "$build" -DKVARN_CUDA=ON -DKVARN_TESTS=OFF -DCMAKE_POSITION_INDEPENDENT_CODE=ON \
  -DKVARN_CUDA_ARCHITECTURES="$architecture" "-DKVARN_CUDA_SHAPES=${KVARN_CUDA_SHAPES:-$shapes}" \
  -DKVARN_CUDA_SHARED_LIMIT="${KVARN_CUDA_SHARED_LIMIT:-}" \
  "-DCMAKE_CUDA_FLAGS=-lineinfo -Xptxas=-v" >"$build/configure.log" || { cat "$build/configure.log"; exit 1; }
cmake --build "$build" --target kvarn >"$build/build.log" 2>&1 || { grep -E 'error|FAILED' "$build/build.log" | head -30; exit 1; }
nvcc=(nvcc -std=c++20 --expt-relaxed-constexpr -O2 "-gencode=arch=compute_${architecture%@*},code=sm_${architecture#*@}"
  -I"$root/src" -I"$root/include" -I"$root/tests" -I"$build/cuda")
for source in bench/cuda/speed.cu tests/cuda/attend_test.cu tests/cuda/sanitized.cpp; do
  "${nvcc[@]}" -c "$root/$source" -o "$out/$(basename "${source%.*}").o"
done
nanobind=$("$python" -c 'import nanobind; print(nanobind.__path__[0])')
cuda=${CUDA_HOME:-/usr/local/cuda}
runtime=$(find -L "$cuda" -name libcudart_static.a | head -n 1)
g++ -std=c++20 -O2 -fPIC -shared -fvisibility=hidden -fno-strict-aliasing -DNDEBUG -DKVARN_HAS_CUDA \
  -DNB_COMPACT_ASSERTIONS -I"$nanobind/include" -I"$nanobind/ext/robin_map/include" -I"$headers" -I"$cuda/include" \
  -I"$root/include" "$root"/python/csrc/*.cpp "$nanobind/src/nb_combined.cpp" "$build/libkvarn.a" "$runtime" \
  -fopenmp -lpthread -ldl -lrt -Wl,-s -o "$build/_core.so"
xz -T0 -1 -c "$build/_core.so" >"$out/_core.so.xz"
xz -T0 -1 -c "$build/libkvarn.a" >"$out/libkvarn.a.xz"
git -C "$root" rev-parse --short HEAD >"$out/commit"
du -sh "$out"
