"""MLX's buffer pool, simulated: which sizes a computation asks for and what is left over.

MLX keeps freed buffers. A request takes the smallest kept buffer of at least its size, unless that
buffer is as large as twice the request or 32 KiB larger, whichever is less; else a new one is made.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx

SLACK = 32 * 1024
# Primitives whose result is another view of their first input.
VIEWS = {
    "AsStrided",
    "Broadcast",
    "BroadcastAxes",
    "Depends",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
    "Unflatten",
}


class Pool:
    """Bytes in use and bytes that are kept for reuse."""

    def __init__(self) -> None:
        self.kept: list[int] = []
        self.live = self.pooled = 0

    def allocate(self, size: int) -> int:
        """Return the size of the buffer that serves a request of `size` bytes."""
        place = bisect.bisect_left(self.kept, size)
        if place < len(self.kept) and self.kept[place] < min(2 * size, size + SLACK):
            found = self.kept.pop(place)
            self.pooled -= found
        else:
            found = size
        self.live += found
        return found

    def free(self, buffer: int) -> None:
        """Keep a buffer that is no longer used."""
        self.live -= buffer
        self.pooled += buffer
        bisect.insort(self.kept, buffer)

    def clear(self) -> None:
        """Give back what is kept, like `mx.clear_cache`."""
        self.kept.clear()
        self.pooled = 0


def primitives(function: Callable[..., Any], *arrays: Any) -> list[dict[str, Any]]:
    """The primitives that a function makes of arrays, in the order in which they run."""
    records: list[dict[str, Any]] = []
    mx.export_function(records.append, function, *arrays)
    return [record for record in records if record["type"] == "primitive"]


def replay(graph: list[dict[str, Any]], pool: Pool) -> None:
    """Allocate what a graph asks for and free it after its last use, its results at the end.

    The arrays that go into the graph are not counted. An update takes over the buffer of its input.
    """
    made = {output[0] for record in graph for output in record["outputs"]}
    uses = Counter(name for record in graph for name, *_ in record["inputs"])
    holder: dict[str, str] = {}  # the array whose buffer a view has
    buffers: dict[str, int] = {}
    pending: Counter[str] = Counter()
    for record in graph:
        inputs = [holder.get(name, name) for name, *_ in record["inputs"]]
        for position, (name, shape, dtype) in enumerate(record["outputs"]):
            source = inputs[min(position, len(inputs) - 1)] if inputs else ""
            if record["name"] in VIEWS or record["name"].endswith("SliceUpdate"):
                holder[name] = source
            else:
                size = dtype.size
                for length in shape:
                    size *= length
                buffers[name] = pool.allocate(size)
                holder[name] = name
            pending[holder[name]] += uses[name] + (0 if uses[name] else 1)
        for name, source in zip((n for n, *_ in record["inputs"]), inputs, strict=True):
            if name in made:
                pending[source] -= 1
                if not pending[source] and source in buffers:
                    pool.free(buffers.pop(source))
    for buffer in buffers.values():
        pool.free(buffer)
