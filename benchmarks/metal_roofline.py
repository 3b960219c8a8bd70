"""Compute the times of the Metal path on Apple GPUs: counts divided by public rates.

    python benchmarks/metal_roofline.py

It prints the table of docs/metal.md. Nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from sessa_common.markdown import markdown_table

# Rows of a block row, and of a tile in it, as in the Metal source.
BLOCK, TILE = 256, 32
BANDWIDTH = 400e9  # bytes/s, the same on the three
# Multiply-adds of 8x8 matrices: 102 of a core's 128 lanes, measured by others on M1 and M2.
LANES, MATRIX_LANES = 128, 102
# Assumed seconds of a command in MLX's stream, of a load, multiply and barrier, of a diagonal tile.
LAUNCH, TURN, DIAGONAL = 4e-6, 0.65e-6, 1.35e-6
LAUNCHES = {"forward": 6, "backward": 14}
COLUMNS = (
    "forward products",
    "forward passes",
    "chain",
    "forward",
    "backward products",
    "backward passes",
    "backward",
)


@dataclass(frozen=True)
class Chip:
    """An Apple GPU by its public figures."""

    name: str
    cores: int
    clock: float  # Hz

    @property
    def peak(self) -> float:
        """Float32 operations a second."""
        return 2 * self.cores * LANES * self.clock

    @property
    def matrix_rate(self) -> float:
        """Operations a second of simdgroup matrix products, float32 and half alike."""
        return self.peak * MATRIX_LANES / LANES


CHIPS = (Chip("M1 Max", 32, 1.296e9), Chip("M2 Max", 38, 1.398e9), Chip("M3 Max", 40, 1.38e9))


def times(chip: Chip, T: int, D: int) -> dict[str, float]:
    """Seconds of one sequence at K = D in half storage, by part, forward and backward."""
    seen = T * T / 2 * (1 + BLOCK / T)  # scores computed, upper halves of diagonal blocks included
    solved = T * T / 2 - T * BLOCK / 2  # of those, columns of earlier block rows
    tiles, rows = BLOCK // TILE, T / BLOCK
    chain = rows * (tiles * (tiles - 1) / 2 * TURN + tiles * DIAGONAL)
    # Bytes a score: float32 written once and read twice, half weights written and read.
    bytes_of = {"forward": 4 + 8 + 2 + 2, "backward": (4 + 8 + 2 + 2 + 2) + (4 + 8) + (2 + 4)}
    # u and dk of earlier rows: half product written and read, float32 sum read and written.
    sums = {"forward": 0.0, "backward": 2 * (2 + 2 + 4 + 4) * D * T * T / (2 * BLOCK)}
    operations = {
        "forward": 2 * D * (seen + solved),
        "backward": 2 * D * (4 * seen + solved),
    }
    result = {}
    for kind in ("forward", "backward"):
        result[f"{kind} products"] = operations[kind] / chip.matrix_rate
        result[f"{kind} passes"] = (bytes_of[kind] * seen + sums[kind]) / BANDWIDTH
        launches = rows * LAUNCHES[kind] * LAUNCH
        parts = result[f"{kind} products"] + result[f"{kind} passes"]
        result[kind] = chain + launches + parts
    return result | {"chain": chain}


def step_time(P: int, D: int) -> float:
    """Seconds of one decode step: keys in half, states in float32, partial sums out and in."""
    return P * D * (2 + 4 + 8 / TILE) / BANDWIDTH


def main() -> None:
    lines = []
    for chip in CHIPS:
        for T, D in ((4096, 512), (4096, 1024), (16384, 1024)):
            found = times(chip, T, D)
            cells = [f"{1e3 * found[column]:.3g}" for column in COLUMNS]
            lines.append([chip.name, str(T), str(D), *cells])
    # The columns of the table are named without the pass that they belong to.
    names = [column.removeprefix("forward ").removeprefix("backward ") for column in COLUMNS]
    print(markdown_table(["chip", "T", "D", *names], lines))
    for P, D in ((4096, 512), (4096, 1024), (16384, 1024)):
        print(f"decode step at P {P}, D {D}: {1e6 * step_time(P, D):.0f} us")


if __name__ == "__main__":
    main()
