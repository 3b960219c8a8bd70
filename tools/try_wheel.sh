#!/usr/bin/env bash
# Install the wheel in dist/ into a new environment and use it in an empty folder.
#
#     bash tools/try_wheel.sh [PYTHON] [EXTRAS]
#
# The sources cannot be imported there, so a file that the wheel lacks is an error. Everything runs on
# the CPU: a wheel is good or bad whatever the GPU does.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${1:-python3}
extras=${2:-mlx,torch,onnx}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$python" -m venv "$place/venv"
wheel=$(echo "$root"/dist/*.whl)
"$place/venv/bin/pip" install --quiet --constraint "$root/constraints.txt" "$wheel[$extras]"
export PATH="$place/venv/bin:$PATH"
mkdir "$place/empty"
cd "$place/empty"
set -x
sessa --version
for backend in mlx torch; do
    case ",$extras," in
        *",$backend,"*) ;;
        *) continue ;;
    esac
    sessa selftest --backend "$backend" --device cpu --no-timings
    sessa train --backend "$backend" --device cpu --preset sessa-400k --steps 5 --batch-size 2 \
        --sequence-length 64 --out "$backend"
    sessa generate "$backend" --backend "$backend" --device cpu --prompt "The" --max-tokens 10
    sessa convert "$backend" "$backend-4bit" --quantize 4
    sessa export "$backend" "$backend-onnx"
    sessa check "$backend"
done
sessa build-op --force --output operator
