#!/bin/sh
# Installs the build into a fresh prefix, builds the consumer against it and runs it with the installed
# daemon.
# Arguments: cmake, build folder, source folder, C++ compiler.
set -eu
cmake=$1 build=$2 source=$3 compiler=$4
work=$(mktemp -d)
daemon=
cleanup() {
  [ -z "$daemon" ] || kill "$daemon" 2>/dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT
"$cmake" --install "$build" --prefix "$work/prefix" >/dev/null
"$cmake" -S "$source/tests/client/consumer" -B "$work/build" -G Ninja -DCMAKE_PREFIX_PATH="$work/prefix" \
  -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_BUILD_TYPE=Release >/dev/null
"$cmake" --build "$work/build" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$work/prefix/bin/kvseekd" --listen "unix:$work/socket" --workers 1 --log-level warn &
daemon=$!
tries=0
while [ ! -S "$work/socket" ]; do
  tries=$((tries + 1))
  [ "$tries" -lt 100 ] || { echo "the daemon did not start"; exit 1; }
  sleep 0.1
done
"$work/build/consumer" "unix:$work/socket"
[ ! -x "$work/build/decoder_consumer" ] || "$work/build/decoder_consumer"
