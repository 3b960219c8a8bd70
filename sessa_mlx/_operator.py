"""Operators with gradients of their own, whose results a layer that is computed again can keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

Arrays = tuple[mx.array, ...]
# How operators are called; None where they just compute.
_way: ContextVar[Callable[[Operator, Arrays], Arrays] | None] = ContextVar("way", default=None)


class Operator:
    """A function of arrays that gives a tuple of results.

    `backward` gives the gradients of the arrays, from (arrays, cotangents, results).
    """

    def __init__(
        self,
        forward: Callable[..., Arrays],
        backward: Callable[[Arrays, Arrays, Arrays], Arrays],
    ) -> None:
        self.backward = backward
        self.function: Any = mx.custom_function(forward)
        self.function.vjp(backward)

    def __call__(self, *arrays: mx.array) -> Arrays:
        """Return the results, computed or kept."""
        way = _way.get()
        results: Arrays = self.function(*arrays) if way is None else way(self, arrays)
        return results

    def again(self, results: Arrays, arrays: Arrays) -> Arrays:
        """Return results that were computed before as those of the arrays, with gradients."""
        count = len(arrays)

        def backward(both: Arrays, cotangents: Arrays, _: Arrays) -> Arrays:
            gradients = self.backward(both[:count], cotangents, both[count:])
            return (*gradients, *map(mx.zeros_like, both[count:]))

        given: Any = mx.custom_function(lambda *both: both[count:])
        given.vjp(backward)
        found: Arrays = given(*arrays, *results)
        return found


@contextmanager
def recorded() -> Iterator[list[Arrays]]:
    """A context that gives the results of the operators that are called in it, in their order."""
    found: list[Arrays] = []

    def record(operator: Operator, arrays: Arrays) -> Arrays:
        found.append(operator.function(*arrays))
        return found[-1]

    token = _way.set(record)
    try:
        yield found
    finally:
        _way.reset(token)


@contextmanager
def replayed(results: Iterable[Arrays]) -> Iterator[None]:
    """A context in which the same operators, called again, give results of `recorded`."""
    rest = iter(results)
    token = _way.set(lambda operator, arrays: operator.again(next(rest), arrays))
    try:
        yield
    finally:
        _way.reset(token)
