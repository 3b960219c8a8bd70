#!/usr/bin/env bash
# Train a small model, convert it, export it, compare all runtimes, and generate text with each.
set -euo pipefail
out=${1:-demo}
prompt="The"
rm -rf "$out"
set -x
sessa train --backend torch --out "$out/torch" --steps 400
sessa convert "$out/torch" "$out/mlx" --to mlx
sessa convert "$out/mlx" "$out/back" --to torch
cmp "$out/torch/model.safetensors" "$out/back/model.safetensors"
sessa export "$out/mlx" "$out/onnx"
sessa check "$out/mlx"
sessa generate "$out/torch" --backend torch --prompt "$prompt" --max-tokens 80 --temperature 0
sessa generate "$out/mlx" --backend mlx --prompt "$prompt" --max-tokens 80 --temperature 0
sessa generate "$out/onnx" --backend onnx --prompt "$prompt" --max-tokens 80 --temperature 0
set +x
echo "PyTorch checkpoint and loss curve: $out/torch"
echo "MLX checkpoint:                    $out/mlx"
echo "ONNX folder:                       $out/onnx"
