"""Compute the times of the Metal path on Apple GPUs: counts divided by public rates.

    python benchmarks/metal_roofline.py

It prints the tables of docs/metal.md. Nothing is measured: the launches are those of the graphs
that MLX exports, the rest is arithmetic.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.mlx_launches import launches, solve_graphs

from sessa_common.markdown import markdown_table
from sessa_mlx.feedback import metal

TILE = 32  # rows of a tile within a block, as in the Metal source
# Multiply-adds of 8x8 matrices: 102 of a core's 128 lanes, measured by others on M1 and M2. MLX's
# products are assumed to reach three quarters of that.
LANES, MATRIX_LANES, PRODUCT_SHARE = 128, 102, 0.75
# Assumed seconds of a command in MLX's stream, of a load, multiply and barrier, of a diagonal tile.
LAUNCH, TURN, DIAGONAL = 4e-6, 0.65e-6, 1.35e-6
# Launches of the batch of inverses in sessa_mlx/feedback/gpu.py, at least.
INVERSE_LAUNCHES = 45
COLUMNS = ("products", "passes", "chain", "launches", "sum")


@dataclass(frozen=True)
class Chip:
    """An Apple GPU by its public figures."""

    name: str
    cores: int
    clock: float  # Hz
    bandwidth: float  # bytes/s
    # Rate of products of 16 bits and of float32 (TF32) relative to float32 lanes, where the chip
    # has matrix units: the maker's "four times", and half of that.
    matrix_units: tuple[float, float] = (1.0, 1.0)

    def product_rate(self, *, wide: bool) -> float:
        """Operations a second of a matrix product, of float32 operands if `wide`."""
        lanes = 2 * self.cores * MATRIX_LANES * self.clock
        return lanes * PRODUCT_SHARE * self.matrix_units[wide]


CHIPS = (
    Chip("M1 Max", 32, 1.296e9, 400e9),
    Chip("M2 Max", 38, 1.398e9, 400e9),
    Chip("M3 Max", 40, 1.38e9, 400e9),
    Chip("M4 Max", 40, 1.578e9, 546e9),
    Chip("M5 Max", 40, 1.62e9, 614e9, matrix_units=(4.0, 2.0)),
)


@cache
def launch_counts(T: int) -> tuple[int, int]:
    """Launches of the forward and of the backward pass of one sequence in bfloat16."""
    _, forward, both = solve_graphs(metal, T, 64, mx.bfloat16)
    return launches(forward), launches(both) - launches(forward)


def times(chip: Chip, T: int, D: int) -> dict[str, dict[str, float]]:
    """Seconds of one sequence at K = D in 16 bits, by pass and part."""
    rows = metal._block_rows(T)
    n = rows[0][1]
    block = min(n, metal.BLOCK)
    # Columns of scores that block rows compute, in all; and those before the block rows.
    seen = sum((stop - start) * metal._columns(stop, 0, T) for start, stop in rows)
    earlier = sum((stop - start) * start for start, stop in rows) + T * (n - block) / 2
    tiles = block // TILE
    chain = T / block * (tiles * (tiles - 1) / 2 * TURN + tiles * DIAGONAL)
    # Bytes a score: float32 written once and read twice, 16 bits of a weight written and read.
    forward_bytes = (4 + 8 + 2 + 2) * seen
    # Twice the reads of weights, u s^T written and read twice, 16 bits of a slope written and read
    # twice. A sum of u or dk: 16 bits written and read, float32 read and written. (In two steps, as
    # MLX takes them unless they are compiled into one, it is 20 bytes instead of 12.)
    sums = 2 * (2 + 2 + 4 + 4) * D * sum(start for start, _ in rows)
    backward_bytes = (4 + 8 + 2 + 2 + 2 + 2 + 4 + 8 + 2 + 2 + 2) * seen + sums
    narrow, wide = chip.product_rate(wide=False), chip.product_rate(wide=True)
    parts = {
        "forward": (2 * D * (seen / wide + earlier / narrow), forward_bytes),
        "backward": (2 * D * (2 * seen / wide + (2 * seen + earlier) / narrow), backward_bytes),
    }
    result = {}
    for (name, (products, moved)), count in zip(parts.items(), launch_counts(T), strict=True):
        found = {"products": products, "passes": moved / chip.bandwidth, "chain": chain}
        found["launches"] = count * LAUNCH
        result[name] = found | {"sum": sum(found.values())}
    return result


def first_sums_gain(chip: Chip, T: int, D: int) -> float:
    """Seconds that computing the row sums first would save forward, if all goes well.

    The inverses of all blocks are then one batch of `gpu.LEAF` and its merges: the chain is gone, a
    block row takes four launches. It costs one more product q k^T, whose scores are written and
    read once.
    """
    rows = len(metal._block_rows(T))
    saved = (launch_counts(T)[0] - 4 * rows - INVERSE_LAUNCHES) * LAUNCH
    saved += times(chip, T, D)["forward"]["chain"]
    extra = T * T / 2
    return saved - 2 * D * extra / chip.product_rate(wide=True) - 8 * extra / chip.bandwidth


def step_time(chip: Chip, P: int, D: int) -> float:
    """Seconds of one decode step: keys in 16 bits, states in float32, partial sums out and in."""
    return P * D * (2 + 4 + 8 / TILE) / chip.bandwidth


def main() -> None:
    lines, recursion = [], []
    for chip in CHIPS:
        for T, D in ((2048, 512), (4096, 1024), (16384, 1024)):
            for name, found in times(chip, T, D).items():
                cells = [f"{1e3 * found[column]:.3g}" for column in COLUMNS]
                lines.append([chip.name, str(T), str(D), name, *cells])
            gain = 1e3 * first_sums_gain(chip, T, D)
            recursion.append([chip.name, str(T), str(D), f"{gain:.2f}"])
    print("computed, not measured: milliseconds")
    print(markdown_table(["chip", "T", "D", "pass", *COLUMNS], lines))
    print("computed, not measured: milliseconds that row sums first would save forward")
    print(markdown_table(["chip", "T", "D", "saved"], recursion))
    for T in (2048, 4096, 16384):
        rows = len(metal._block_rows(T))
        forward, backward = (count / rows for count in launch_counts(T))
        print(f"T {T}: {rows} block rows, {forward:.1f} and {backward:.1f} launches a block row")
    for P, D in ((4096, 512), (4096, 1024), (16384, 1024)):
        spent = ", ".join(f"{chip.name} {1e6 * step_time(chip, P, D):.0f} us" for chip in CHIPS)
        print(f"decode step at P {P}, D {D}, computed: {spent}")


if __name__ == "__main__":
    main()
