#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# One shape's life cycle (sanitized.cpp) under one of compute-sanitizer's tools: says ok, or FAILED and how the log begins.
#
#   tests/cuda/tool.sh PROGRAM LOGS SHAPE TOOL      KVARN_SECONDS=100 at most
set -uo pipefail
program=$1 log=$2/$3.$4.log shape=$3 tool=$4
more=(--num-cuda-barriers 1024)  # attend has 148; synccheck counts fewer by itself and then loses some, with 256 too in 99 KB
[[ $tool != memcheck ]] || more+=(--leak-check full)
timeout "${KVARN_SECONDS:-100}" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 "${more[@]}" \
  "$program" "$shape" >"$log" 2>&1
status=$?
((status == 0)) && echo "ok $tool $shape" && exit 0
echo "FAILED $tool $shape (status $status)"
head -n 40 "$log"
exit 1
