"""Launches and memory of the solve on a GPU, counted in the graphs that MLX exports."""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx
import pytest
from support.mlx_launches import launches, solve_graphs
from support.mlx_pool import VIEWS, Pool, replay

from sessa_mlx.feedback import gpu, metal

modules = pytest.mark.parametrize("module", [metal, gpu], ids=["metal", "gpu"])

# Launches a block row: 256 rows up to T 2048, 512 then. Sums over earlier rows lie in pieces, of
# which long sequences have more.
BUDGETS = {
    ("bfloat16", 2048): (7, 18),
    ("bfloat16", 4096): (12, 28),
    ("bfloat16", 16384): (14, 29),
    ("float32", 2048): (7, 13),
    ("float32", 4096): (11, 21),
    ("float32", 16384): (13, 21),
}


@pytest.mark.parametrize(("dtype", "T"), BUDGETS)
def test_launches_of_a_block_row_in_metal(dtype: str, T: int) -> None:
    forward_most, backward_most = BUDGETS[dtype, T]
    _, forward, both = solve_graphs(metal, T, 64, getattr(mx, dtype))
    rows = len(metal._block_rows(T))
    assert launches(forward) <= forward_most * rows
    assert launches(both) - launches(forward) <= backward_most * rows


@pytest.mark.parametrize("B", [1, 3])
def test_metal_kernels_read_no_slices(B: int) -> None:
    """MLX would copy a slice of several sequences before a kernel: one more launch."""
    _, _, both = solve_graphs(metal, 4096, 32, mx.bfloat16, B)
    views = {name for r in both if r["name"] in VIEWS for name, *_ in r["outputs"]}
    kernels = [record for record in both if record["name"] == "CustomKernel"]
    ours = [r for r in kernels if "custom_kernel_sessa" in r["arguments"][0]]
    # In 8 block rows: weights twice, two blocks twice, the gradients of the scores.
    assert len(ours) == 8 * (2 + 4 + 1)
    assert not [r for r in ours if views & {name for name, *_ in r["inputs"]}]


@pytest.mark.parametrize(("T", "most"), [(2048, 280), (8192, 420), (16384, 680)])
def test_launches_of_both_passes_on_cuda(T: int, most: int) -> None:
    """`blocked` takes 7,376 at T 8192."""
    _, _, both = solve_graphs(gpu, T, 64, mx.bfloat16)
    assert launches(both) <= most


class PeakPool(Pool):
    """A pool that remembers the most bytes in use, and the most in use or kept."""

    most_live = most = 0

    def allocate(self, size: int) -> int:
        found = super().allocate(size)
        self.most_live = max(self.most_live, self.live)
        self.most = max(self.most, self.live + self.pooled)
        return found


@modules
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("T", [4096, 8192, 16384])
def test_the_pool_holds_at_most_twice_what_is_in_use(
    module: ModuleType, T: int, dtype: mx.Dtype
) -> None:
    """Over two training steps of one layer, D 1024, with its inputs."""
    arrays, _, both = solve_graphs(module, T, 1024, dtype)
    pool, given = PeakPool(), sum(x.nbytes for x in arrays)
    for _ in range(2):
        replay(both, pool)
    assert pool.most + given <= 2 * (pool.most_live + given)
