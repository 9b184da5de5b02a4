#!/usr/bin/env bash
# Installs what is missing, builds kvseek and kvseekd, and runs the demo on the recorded traces of tests/data. Arguments
# go to `kvseek demo`; the picture is written to demo.svg in the current directory unless --plot says otherwise.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
"$root/scripts/setup.sh"
"$root/scripts/build.sh" release kvseek kvseekd
exec "$root/build/release/bin/kvseek" demo \
  --daemon "$root/build/release/bin/kvseekd" --data "$root/tests/data" "$@"
