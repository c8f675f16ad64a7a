#!/bin/sh
# No instruction of a SIMD target may reach another CPU: its object files define no weak (shared inline) function outside
# their own namespace, which the linker could pick for everybody.
set -eu
library=$1
found=$(nm -A -C --defined-only "$library" | grep -E 'avx(2|512)\.cpp\.o' | grep -E ' [WVu] ' | grep -vE ' [WVu] (.* )?kvarn::avx(2|512)::' || true)
if [ -n "$found" ]; then
  echo "shared symbols compiled with SIMD flags:"
  echo "$found"
  exit 1
fi
