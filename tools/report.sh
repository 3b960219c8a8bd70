#!/usr/bin/env bash
# What this machine does, to keep or to paste into an issue: the tables of `sessa selftest`, a short
# training run and generated text.
#
#     bash tools/report.sh BACKEND FOLDER
#
# It needs `sessa` on the PATH. All parts run even if one fails; then the exit code is 1.
set -uo pipefail
backend=$1
out=$2/$1
mkdir -p "$out"
failed=0
part() {
    local name=$1
    shift
    echo "== $*"
    "$@" 2>&1 | tee "$out/$name.txt" || failed=1
}
part selftest sessa selftest --backend "$backend"
part train sessa train --backend "$backend" --steps 60 --out "$out/run" --force
part generate sessa generate "$out/run" --backend "$backend" --prompt "The list" --max-tokens 60
exit $failed
