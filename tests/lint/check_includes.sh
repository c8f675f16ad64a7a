#!/bin/sh
# Arrows point one way: api -> pages -> target -> format; codec and cpu -> target, format, and never to each other;
# api -> cuda -> format.
set -eu
cd "$1/src"
status=0
forbid() {  # folder, folders it may not include
  if grep -nE "#include \"($2)/" -r "$1"; then
    echo "src/$1 must not include $2"
    status=1
  fi
}
forbid format 'api|pages|target|codec|cpu|cuda'
forbid codec 'api|pages|cpu|cuda'
forbid cpu 'api|pages|codec|cuda'
forbid pages 'api|codec|cpu|cuda'
forbid cuda 'api|pages|target|codec|cpu'
# Host code alone: what a build without CUDA includes must not need the toolkit.
if grep -nE 'cuda_runtime|cuda_fp16|cuda_bf16' -r format codec cpu pages target api/check.* api/cuda_check.* api/cuda_absent.cpp \
    api/error.* api/kvarn.cpp cuda/plan.hpp cuda/shape.hpp; then
  echo "the files above are compiled without the CUDA toolkit, too"
  status=1
fi
exit $status
