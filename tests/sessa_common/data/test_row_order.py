"""Orders of rows: permutations in bounded memory, and mixtures that keep their shares."""

import numpy as np
import pytest

from sessa_common.data.row_order import PERIOD, MixtureOrder, RowOrder, permutation
from sessa_common.errors import SessaError


@pytest.mark.parametrize("count", [1, 2, 5, 16, 1000, 1025])
@pytest.mark.parametrize("largest_array", [0, 10_000])
def test_a_permutation_meets_every_number_once(count, largest_array):
    rng = np.random.default_rng(3)
    order = permutation(count, rng, largest_array)
    found = [order(i) for i in range(count)]
    assert sorted(found) == list(range(count))
    if count >= 1000:
        assert found != sorted(found)
        # No trace of the order in which the numbers are asked for.
        assert abs(np.corrcoef(np.arange(count), found)[0, 1]) < 0.1


def test_the_order_of_trillions_of_rows_is_computed_row_by_row():
    first, second = (RowOrder(10**15, 1000, seed) for seed in (0, 1))
    starts = [first.start(i) for i in range(200)]
    assert len(set(starts)) == 200 and max(starts) < 10**15 - 1001
    assert starts == [RowOrder(10**15, 1000, 0).start(i) for i in range(200)]
    assert starts != [second.start(i) for i in range(200)]


def test_a_mixture_has_exact_shares_and_every_row_of_a_part_once():
    order = MixtureOrder([7, 2, 1], seed=4)
    places = [order.locate(i) for i in range(2 * PERIOD)]
    for part, share in enumerate((0.7, 0.2, 0.1)):
        own = [row for where, row in places if where == part]
        assert own == list(range(round(share * 2 * PERIOD)))
    # The row's number alone decides.
    again = MixtureOrder([7, 2, 1], seed=4)
    for i in (PERIOD + 5, 3, 2 * PERIOD - 1):
        assert again.locate(i) == places[i]
    assert [part for part, _ in places[:50]] != [
        MixtureOrder([7, 2, 1], seed=5).locate(i)[0] for i in range(50)
    ]


def test_a_part_without_a_row_is_refused():
    with pytest.raises(SessaError, match=r"less than 1/10,000 of the rows"):
        MixtureOrder([1, 1e-6], seed=0)
