"""Tensors that are computed when they are read, so that a large model needs memory for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial

import numpy as np


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class LazyTensors(MutableMapping[str, np.ndarray]):
    """Tensors by name, each an array or a function that makes it at every access.

    A changed element of an array that a function made is lost; assign the whole array instead.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        self._specs: dict[str, Spec] = {}
        self._makers: dict[str, Callable[[], np.ndarray]] = {}
        self._readers: dict[str, Callable[[slice], np.ndarray]] = {}
        for name in arrays or {}:
            self.link(name, arrays or {}, name)

    def defer(
        self,
        name: str,
        spec: Spec,
        make: Callable[[], np.ndarray],
        read_rows: Callable[[slice], np.ndarray] | None = None,
    ) -> None:
        """Add a tensor of this shape and dtype that `make` returns, and `read_rows` in part."""
        self._specs[name], self._makers[name] = spec, make
        self._readers.pop(name, None)
        if read_rows is not None:
            self._readers[name] = read_rows

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Some rows of a tensor, without reading the others where that is possible."""
        read_rows = self._readers.get(name)
        return self[name][rows] if read_rows is None else read_rows(rows)

    def link(self, name: str, other: Mapping[str, np.ndarray], there: str) -> None:
        """Add the tensor that has the name `there` in another mapping."""
        self.defer(name, spec_of(other, there), partial(other.__getitem__, there))

    def spec(self, name: str) -> Spec:
        """Shape and dtype, without computing the tensor."""
        return self._specs[name]

    def __getitem__(self, name: str) -> np.ndarray:
        return self._makers[name]()

    def __setitem__(self, name: str, array: np.ndarray) -> None:
        self.defer(name, Spec(array.shape, array.dtype), lambda: array)

    def __delitem__(self, name: str) -> None:
        del self._specs[name], self._makers[name]
        self._readers.pop(name, None)

    def __contains__(self, name: object) -> bool:
        # Inherited, it would compute the tensor.
        return name in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def rows_of(tensors: Mapping[str, np.ndarray], name: str, rows: slice) -> np.ndarray:
    """Some rows of a tensor, as `LazyTensors.rows` reads them."""
    return tensors.rows(name, rows) if isinstance(tensors, LazyTensors) else tensors[name][rows]


def spec_of(tensors: Mapping[str, np.ndarray], name: str) -> Spec:
    """Shape and dtype of a tensor, which is not computed for it."""
    if isinstance(tensors, LazyTensors):
        return tensors.spec(name)
    return Spec(tensors[name].shape, tensors[name].dtype)
