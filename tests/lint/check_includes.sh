#!/bin/sh
# Arrows point one way: api -> pages -> target -> format; codec and cpu -> target, format, and never to each other.
set -eu
cd "$1/src"
status=0
forbid() {  # folder, folders it may not include
  if grep -nE "#include \"($2)/" -r "$1"; then
    echo "src/$1 must not include $2"
    status=1
  fi
}
forbid format 'api|pages|target|codec|cpu'
forbid codec 'api|pages|cpu'
forbid cpu 'api|pages|codec'
forbid pages 'api|codec|cpu'
exit $status
