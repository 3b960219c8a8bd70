"""Steps of a few tokens on CUDA, replayed as captured graphs, and short prompts."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sessa_common.checkpoint.stored_types import is_exact
from sessa_torch.attention import rope_tables
from sessa_torch.cache import Mamba2LayerCache, SessaCache, SessaLayerCache
from sessa_torch.cuda import device
from sessa_torch.cuda.step import Place, run_step
from sessa_torch.feedback import cuda as feedback
from sessa_torch.feedback.cuda_sizes import DECODE_ROWS
from sessa_torch.model import SessaForCausalLM

LOG = logging.getLogger("sessa")
# Most new tokens of a sequence. Speculation uses several numbers in turn, so all graphs are kept.
MOST_TOKENS = DECODE_ROWS
# Rows of all sequences for which a buffer that is full gets room: a larger buffer needs new graphs.
SPARE_ROWS = 1024
WIDEST_HEAD = 256
# Most rows of a prompt for which the host takes longer to start the modules' kernels than the
# kernels here take for larger products, in a model of this width; the products of a row grow with
# the square of the width, so wider models have fewer rows.
MOST_PROMPT_ROWS, PROMPT_WIDTH = 4096, 1024
QUICK_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def unavailable_reason(model: SessaForCausalLM) -> str | None:
    """The reason why the kernels of a step cannot run for this model, or None if they can."""
    named = model.named_parameters()
    weights = {weight.dtype for name, weight in named if not is_exact(name)}
    example = model.model.norm.weight
    if len(weights) > 1:
        return "the weights have different types"
    if reason := device.unavailable_reason(example.device, example.dtype):
        return reason
    if model.config.head_dim > WIDEST_HEAD:
        return f"heads are wider than {WIDEST_HEAD}"
    if model.config.feeds_back:
        row = example[None, None]
        return feedback.unavailable_reason(row.float(), row)
    return None


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A captured step: the tensors that it reads and writes, and its graph."""

    ids: Tensor  # (B, T)
    logits: Tensor  # (B, T, V)
    graph: torch.cuda.CUDAGraph


class StepRunner:
    """Runs steps of at most MOST_TOKENS tokens, and prompts of at most `most_rows` rows.

    The first step of a number of tokens runs kernel by kernel, which compiles the kernels; from the
    second on it is a graph, captured anew when the cache gets other buffers. All graphs share one
    pool of memory. If a capture fails, the reason is logged and `graphs` becomes False.
    """

    def __init__(self, model: SessaForCausalLM) -> None:
        self.model = model
        self.graphs = model.model.norm.weight.is_cuda
        wide = max(1.0, model.config.hidden_size / PROMPT_WIDTH)
        self.most_rows = int(MOST_PROMPT_ROWS / wide**2)
        self.forget()

    def forget(self) -> None:
        """Drop the graphs and what is known of a cache."""
        self.buffers: list[Tensor | None] = []
        self.captured: dict[int, Captured] = {}
        self.tried: set[int] = set()
        self.place: Place | None = None
        # The length that the device knows; None after any other change of the cache.
        self.length: int | None = None

    def takes(self, cache: SessaCache, ids: Tensor) -> bool:
        """True if `run` can append tokens ids (B, T), none of them padding."""
        is_prompt = cache.mask is None and ids.numel() <= self.most_rows
        return ids.shape[1] <= MOST_TOKENS or is_prompt

    def run(self, cache: SessaCache, ids: Tensor, keep: int = 0) -> Tensor:
        """Append tokens ids (B, T) to the cache and return their logits (B, T, V) in float32.

        keep > 0 gives only the last positions. The next step overwrites the logits of this one.
        """
        T = ids.shape[1]
        place = self._prepare(cache, *ids.shape)
        if T > MOST_TOKENS:
            prompt = replace(place, past=cache.length)
            # cuDNN would plan anew for every length, which takes longer than the attention.
            with sdpa_kernel(QUICK_BACKENDS):
                logits = run_step(self.model, cache, ids, prompt, keep)
        elif T in self.captured or self._capture(cache, ids, place):
            step = self.captured[T]
            step.ids.copy_(ids)
            step.graph.replay()
            logits = step.logits
        else:
            logits = run_step(self.model, cache, ids, place)
            self.tried.add(T)
            place.length.add_(T)
        cache.extend(T, None)
        for buffer in cache._buffers():
            buffer.length += T
        self.length = cache.length if T <= MOST_TOKENS else None
        return logits[:, -keep:]

    def _prepare(self, cache: SessaCache, B: int, T: int) -> Place:
        """Make room for T tokens of B sequences, and tell the device where they go."""
        if cache.length == 0:
            self._make_buffers(cache, B)
        if not all(buffer._has_room(T) for buffer in cache._buffers()):
            cache._reserve(max(T, SPARE_ROWS // B))
        held = [buffer.buffer for buffer in cache._buffers()] + _states(cache)
        if self.place is None or len(self.place.hidden) != B or not _same(held, self.buffers):
            self.forget()
            self.buffers = held
            self.place = self._new_place(cache, B)
        if self.length != cache.length:
            self.place.length.fill_(cache.length)
            seen = cache.mask
            if seen is None:
                self.place.hidden.zero_()
            else:
                self.place.hidden.copy_((~seen).sum(1))
        return self.place

    def _make_buffers(self, cache: SessaCache, B: int) -> None:
        """Give an empty cache buffers for B sequences, where it has none that fit."""
        config, example = self.model.config, self.model.model.norm.weight
        keys = example.new_empty(B, config.num_key_value_heads, 0, config.head_dim)
        for layer, kind in zip(cache.layers, config.kinds, strict=True):
            if isinstance(layer, SessaLayerCache):
                layer.k.append(keys)
                layer.v.append(keys)
                if kind.feeds_back:
                    layer.k_fb.append(example.new_empty(B, 0, config.feedback_key_dim))
                    states = example.new_empty(B, 0, config.hidden_size, dtype=torch.float32)
                    layer.s.append(states)

    def _new_place(self, cache: SessaCache, B: int) -> Place:
        config, example = self.model.config, self.model.model.norm.weight
        rope, growing = None, cache._buffers()
        if config.rotates and growing:
            keys = growing[0].buffer
            assert keys is not None
            positions = torch.arange(keys.shape[2], device=example.device)[None]
            tables = rope_tables(
                positions, config.head_dim, config.rope_theta, example.dtype, config.rope_scaling
            )
            rope = (tables[0][0, 0], tables[1][0, 0])
        return Place(
            length=torch.zeros((), dtype=torch.int32, device=example.device),
            hidden=torch.zeros(B, dtype=torch.int32, device=example.device),
            mask=cache.seen.buffer,
            rope=rope,
        )

    def _capture(self, cache: SessaCache, ids: Tensor, place: Place) -> bool:
        """Capture a step of this length; False where it runs kernel by kernel."""
        T = ids.shape[1]
        if not self.graphs or T not in self.tried:
            return False
        graph, fixed = torch.cuda.CUDAGraph(), ids.clone()
        pool = next((step.graph.pool() for step in self.captured.values()), None)
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = run_step(self.model, cache, fixed, place)
                place.length.add_(T)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            LOG.warning("decoding without CUDA graphs: %s", reason)
            self.graphs = False
            return False
        self.captured[T] = Captured(ids=fixed, logits=logits, graph=graph)
        return True


def _states(cache: SessaCache) -> list[Tensor | None]:
    """The tensors of all Mamba-2 layers, and the mask."""
    layers = [layer for layer in cache.layers if isinstance(layer, Mamba2LayerCache)]
    return [x for layer in layers for x in (layer.conv, layer.state)] + [cache.seen.buffer]


def _same(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    """True if both hold the very same tensors."""
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
