#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# On the GPU machine, in one call of some two minutes on 16 cores: what tests/cuda/pack.sh made in FOLDER is linked and
# checked (attend_test, tests/cuda, compute-sanitizer's four tools on five shapes), then timed beside its rivals.
#
#   tests/cuda/packed.sh FOLDER [check] [time]     both, if none is named
#
#   FLASH=file.tar.xz   vLLM, or its vllm/vllm_flash_attn alone, for the rivals   RESULTS=folder  for speed.jsonl, rivals.jsonl, logs
#   SANITIZE="shape .." TOOLS="memcheck racecheck initcheck synccheck"            WORK=/tmp/kvarn-packed  JOBS=8
#
# Then bench/cuda/speed_summary.py makes tables of speed.jsonl and rivals.jsonl.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd) from=$(cd "$1" && pwd)
shift
what=${*:-check time} work=${WORK:-/tmp/kvarn-packed} status=0 begun=$SECONDS
export work results=${RESULTS:-$PWD/packed-results} JOBS=${JOBS:-8}
mkdir -p "$work/site" "$results"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,temperature.gpu --format=csv,noheader
xz -dc "$from/libkvarn.a.xz" >"$work/libkvarn.a" &
rm -rf "$work/site/kvarn" && cp -r "$root/python/kvarn" "$work/site/" && rm -f "$work"/site/kvarn/_core*
xz -dc "$from/_core.so.xz" >"$work/site/kvarn/_core$(python3 -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"
wait
programs=(speed attend_test sanitized)
rm -f "${programs[@]/#/$work/}"
for program in "${programs[@]}"; do nvcc "$from/$program.o" "$work/libkvarn.a" -lpthread -o "$work/$program" & done
wait
for program in "${programs[@]}"; do [[ -x $work/$program ]] || { echo "$program does not link: pack again"; exit 2; }; done
echo "linked in $((SECONDS - begun)) s"
cd "$root"

of_test() {
  local log=$results/$(basename "$1").log
  PYTHONPATH=$work/site timeout 300 python3 -m pytest -q -p no:cacheprovider --tb=short -rfE "$1" >"$log" 2>&1 && state=ok || state=FAILED
  echo "$state $1: $(tail -n 1 "$log")"
  [[ $state == ok ]]
}
export -f of_test
if [[ $what == *check* ]]; then
  "$work/attend_test" >"$results/attend_test.log" 2>&1 || status=1
  tail -n 1 "$results/attend_test.log"
  printf '%s\n' tests/cuda/test_*.py | xargs -P "$JOBS" -I{} bash -c 'of_test {}' || status=1
  for tool in ${TOOLS:-memcheck racecheck initcheck synccheck}; do
    for shape in ${SANITIZE:-k4v2_g128_d128 k4v3_g64_d96 k2v2_g64_d64 k4v2_g128_d256 k3v3_g128_d64}; do echo "$shape $tool"; done
  done | KVARN_SECONDS=200 xargs -P "$JOBS" -L 1 tests/cuda/tool.sh "$work/sanitized" "$results" || status=1
  echo "checked after $((SECONDS - begun)) s, status $status"
fi
if [[ $what == *time* ]]; then
  : >"$results/speed.jsonl"
  for verb in attend sustained plan step layer expand append pack; do  # a process each: a fault in one verb costs only its own lines
    timeout 150 "$work/speed" "$verb " >>"$results/speed.jsonl" || status=1
  done
  if [[ ${FLASH:-} ]]; then
    mkdir -p "$work/flash" && tar xf "$FLASH" -C "$work/flash"
    PYTHONPATH=$work/flash timeout 200 python3 bench/cuda/rivals.py >"$results/rivals.jsonl" || status=1
  fi
  python3 bench/cuda/speed_summary.py --commit "$(cat "$from/commit")" "$results/speed.jsonl" $(ls "$results/rivals.jsonl" 2>/dev/null)
  echo "timed after $((SECONDS - begun)) s, status $status"
fi
nvidia-smi --query-gpu=clocks.sm,temperature.gpu,power.draw --format=csv,noheader
exit $status
