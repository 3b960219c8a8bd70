"""Batches made on a thread while the device trains."""

import threading

import pytest

from sessa_common.training.trainer import made_ahead


def test_batches_are_made_ahead_in_order_and_not_too_far():
    made, asked = [], threading.Event()

    def make(number):
        made.append((number, threading.current_thread().name))
        if number == 7:
            raise ValueError("seven")
        if len(made) == 4:
            asked.set()
        return number

    batches = made_ahead(make, range(3, 9), 3)
    assert next(batches) == 3 and asked.wait(10)
    assert [number for number, _ in made] == [3, 4, 5, 6]
    assert threading.current_thread().name not in dict(map(reversed, made))
    assert [next(batches) for _ in range(3)] == [4, 5, 6]
    with pytest.raises(ValueError, match="seven"):
        next(batches)
    short = made_ahead(make, range(3), 3)
    assert next(short) == 0
    short.close()
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())
