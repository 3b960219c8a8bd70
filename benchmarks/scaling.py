"""Print what training of 1 and 7 billion parameters on many GPUs should reach, and the assumptions.

    python benchmarks/scaling.py [--utilisation 0.36] [--peak 989e12] [--nvlink 3.1e11]
                                 [--network 4e10]

This is arithmetic from one measured utilisation, not a measurement; docs/scaling.md says more.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from measure import table

from sessa_common.config import SessaConfig, parameter_count
from sessa_common.presets import PRESETS
from sessa_common.training.operations import PEAKS, operations_per_token

# sessa-1b, 8 rows of 4,096 tokens, vocabulary 32,768, bfloat16, compiled, layers checkpointed, on
# one H200 and sharded over two, with PyTorch 2.11 on 2026-11-30: tokens/s.
MEASURED = dataclasses.replace(PRESETS["sessa-1b"], vocab_size=32_768)
ON_ONE, ON_TWO, MEASURED_BATCH = 36_530, 65_758, 8 * 4096
MODELS = {
    "1B": SessaConfig(
        vocab_size=32_768, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16
    ),
    "7B": SessaConfig(
        vocab_size=32_768, hidden_size=4096, num_hidden_layers=44, num_attention_heads=32
    ),
}
T, MACHINE, BATCH, MOST_TOKENS = 4096, 8, 2**22, 2**15
GPUS = (8, 64, 1024)


def point(name: str, gpus: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return a row of the table: weights sharded in a machine, copies between machines."""
    config = MODELS[name]
    N, machines = parameter_count(config), gpus // MACHINE
    tokens = min(MOST_TOKENS, BATCH // gpus)
    done = operations_per_token(config, T) * tokens
    compute = done / (options.peak * options.utilisation)
    inside = seconds_inside(config, MACHINE, options)
    # All-reduce of a float32 shard between the copies.
    between = 2 * 4 * N / MACHINE * (machines - 1) / machines / options.network
    apart, together = compute + inside + between, max(compute, inside + between)
    return {
        "model": name,
        "GPUs": gpus,
        "tokens a GPU and pass": tokens,
        "compute s": round(compute, 3),
        "in the machine s": round(inside, 3),
        "between machines s": round(between, 3),
        "utilisation": " to ".join(f"{done / options.peak / t:.2f}" for t in (apart, together)),
        "tokens/s": " to ".join(f"{tokens * gpus / t:,.0f}" for t in (apart, together)),
        "weights, gradients, moments GiB a GPU": round(16 * N / MACHINE / 2**30, 1),
    }


def seconds_inside(config: SessaConfig, gpus: int, options: argparse.Namespace) -> float:
    """Return the time to send bfloat16 weights for both passes and float32 gradients to shards."""
    return (2 + 2 + 4) * parameter_count(config) * (gpus - 1) / gpus / options.nvlink


def measured_utilisation() -> float:
    """Return the utilisation of one GPU."""
    return ON_ONE * operations_per_token(MEASURED, T) / PEAKS["H200"]


def two_gpus(options: argparse.Namespace) -> str:
    """Return what the same arithmetic says of the step that was measured on two GPUs."""
    compute, inside = MEASURED_BATCH / ON_ONE / 2, seconds_inside(MEASURED, 2, options)
    said = (MEASURED_BATCH / seconds for seconds in (compute + inside, max(compute, inside)))
    return f"{' to '.join(f'{x:,.0f}' for x in said)} tokens/s; measured: {ON_TWO:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--utilisation", type=float, default=measured_utilisation())
    parser.add_argument("--peak", type=float, default=PEAKS["H200"], help="operations/s of a GPU")
    parser.add_argument("--nvlink", type=float, default=3.1e11, help="bytes/s a GPU, one way")
    parser.add_argument("--network", type=float, default=4e10, help="bytes/s a GPU, one way")
    options = parser.parse_args()
    print(
        f"utilisation {options.utilisation:.3f}; {options.peak:.3g} operations/s; "
        f"{options.nvlink:.3g} bytes/s in a machine of {MACHINE}, {options.network:.3g} between; "
        f"rows of {T:,} tokens, at most {MOST_TOKENS:,} tokens a GPU and pass, "
        f"at most {BATCH:,} in all\n"
    )
    print(table([point(name, gpus, options) for name in MODELS for gpus in GPUS]))
    print(f"\nsessa-1b on two GPUs, by the same arithmetic: {two_gpus(options)}")


if __name__ == "__main__":
    main()
