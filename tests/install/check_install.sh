#!/bin/sh
# An installed kvarn can be found and linked: the examples are built through find_package and through pkg-config, and run.
set -eu
build=$1 source=$2 cmake=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$cmake" --install "$build" --prefix "$work/prefix" > /dev/null
"$cmake" -S "$source/examples" -B "$work/examples" -DCMAKE_PREFIX_PATH="$work/prefix" > /dev/null
"$cmake" --build "$work/examples" > /dev/null
"$work/examples/cache_c"
"$work/examples/cache_cpp"
if command -v pkg-config > /dev/null; then
  export PKG_CONFIG_PATH="$work/prefix/lib/pkgconfig:$work/prefix/lib/x86_64-linux-gnu/pkgconfig"
  cc -std=c11 "$source/examples/cache.c" $(pkg-config --cflags --libs --static kvarn) -o "$work/cache_pc"
  "$work/cache_pc"
fi
