"""The solve of a diagonal block: what GPUs compute by products, against substitution."""

from __future__ import annotations

import pytest
import torch

from sessa_torch.feedback.blocked import _solve_block, _solve_by_inverse


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 31, 64, 257])
def test_products_equal_substitution_at_every_number_of_rows(rows, transposed):
    rng = torch.Generator().manual_seed(rows)
    N = torch.randn(2, rows, rows, generator=rng, dtype=torch.float64).tril(-1) / rows
    rhs = torch.randn(2, rows, 5, generator=rng, dtype=torch.float64)
    found = _solve_by_inverse(N, rhs, transposed=transposed)
    torch.testing.assert_close(found, _solve_block(N, rhs, transposed=transposed))
