"""Decoding with a cache in MLX: NumPy token ids in, NumPy logits out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

from sessa_common.checkpoint.adapters import adapted_files, text_folder
from sessa_common.errors import SessaError
from sessa_common.fields import build, split_fields
from sessa_common.inference.cache_contents import MASK, check_cache_arrays, is_trimmable
from sessa_common.inference.generation import NOTHING_FED, PREFILL_CHUNK
from sessa_common.inference.logit_rules import LogitRules, prepare_rules
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.sampling import GumbelNoise, SamplingConfig
from sessa_common.inference.shortcuts import ModelHome, Shortcuts, start
from sessa_common.inference.texts import BATCH_SIZE, generate_texts
from sessa_mlx._device import on_cuda, on_gpu
from sessa_mlx._step import TokenStep, held_arrays, undo_unless_kept
from sessa_mlx._step_sampling import DeviceSampler
from sessa_mlx.cache import SessaCache
from sessa_mlx.checkpoint import load_model, to_numpy, to_tensor
from sessa_mlx.model import SessaForCausalLM

# Tokens after which buffers that are no longer used are given back, as mlx-lm does.
CLEAR_EVERY = 256
# Tokens of a prompt that a GPU reads at once. The launches of a layer grow far more slowly: on CUDA
# 8,192 tokens take a third of those of four pieces of 2,048.
METAL_PREFILL_TOKENS, CUDA_PREFILL_TOKENS = 2048, 8192
# Bytes that MLX may keep for reuse if the weights have fewer, and bytes besides the weights, for
# the caches, that a Mac may not move out of memory.
LEAST_POOL, WIRED_BESIDE = 256 * 2**20, 2**30


class Decoder:
    """`sessa_common.inference.generation.Decoder` on an MLX model."""

    def __init__(self, model: SessaForCausalLM) -> None:
        _limit_memory(model)
        self.model = model.eval()
        self.config = model.config
        self.next_token = TokenStep(model)
        self.prefill_tokens = _prefill_tokens()
        self.reset()

    @property
    def length(self) -> int:
        """The number of positions in the cache, padding included."""
        return self.cache.length

    @property
    def trimmable(self) -> bool:
        """True if `trim` can drop some positions; False when a layer is Mamba-2."""
        return is_trimmable(self.config)

    def reset(self) -> None:
        """Empty the cache."""
        self.cache = SessaCache(self.config)
        self.last: mx.array | None = None

    def logits(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Append tokens (B, T) and return their logits (B, T, V)."""
        found = self._run(tokens, mask, 0)
        self.last = found[:, -1]
        return to_numpy(found)

    def step(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Append tokens (B, T) and return the logits of the last, (B, V)."""
        self.last = self._run(tokens, mask, 1)[:, 0]
        return to_numpy(self.last)

    def feed(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append tokens (B, T); the logits of the last stay on the device for `draw`."""
        self.last = self._run(tokens, mask, 1)[:, 0]

    def draw(
        self, sampling: SamplingConfig, budget: int, noise: GumbelNoise | None = None
    ) -> Generator[np.ndarray, None, None]:
        """Yield the next ids (B,) int64, as `sessa_common.inference.generation.Decoder` says."""
        if self.last is None:
            raise SessaError(NOTHING_FED)
        B, V = self.last.shape
        if budget < 1:
            return
        sampler = DeviceSampler(sampling, noise or GumbelNoise(sampling.seed, range(B), V))
        self.next_token.refresh()
        chosen = sampler.choose(self.last)
        mx.async_eval(chosen)
        for turn in range(budget - 1):
            with undo_unless_kept(self.cache) as keep:
                # The graph of the next step is built while the device still computes this one.
                logits = self.next_token(chosen[:, None], self.cache)
                following = sampler.choose(logits, ahead=1)
                ids = sampler.take(chosen)
                # Not earlier: MLX would copy every buffer that the last step still reads.
                mx.async_eval(following, logits, held_arrays(self.cache))
                yield ids
                keep()
            self.last, chosen = logits, following
            if turn % CLEAR_EVERY == CLEAR_EVERY - 1:
                mx.clear_cache()
        yield sampler.take(chosen)

    def trim(self, count: int) -> None:
        """Drop the last `count` positions; SessaError where that is impossible."""
        self.cache.trim(count)
        self.last = None

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch."""
        self.cache.keep(rows)
        self.last = None

    def fork(self, rows: Sequence[int] = ()) -> Decoder:
        """Another decoder of the model, which holds a copy of these rows, or no rows."""
        found = copy.copy(self)
        found.cache, found.last = self.cache.fork(rows), None
        mx.eval(held_arrays(found.cache))
        return found

    def join(self, other: Decoder) -> None:
        """Append the rows of another decoder of the model; the shorter get padding on the left."""
        self.cache.join(other.cache)
        self.last = None
        mx.eval(held_arrays(self.cache))

    def cache_arrays(self) -> dict[str, np.ndarray]:
        """Copy the cache into arrays, named as in `cache_contents.cache_shapes`."""
        arrays = {name: to_numpy(held).copy() for name, held in self.cache.tensors().items()}
        if arrays:
            arrays[MASK] = to_numpy(self.cache._whole_mask()).copy()
        return arrays

    def restore_cache(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the cache by what `cache_arrays` gave; SessaError for that of another model."""
        if arrays:
            check_cache_arrays(self.config, arrays, self._dtype())
        self.reset()
        if arrays:
            tensors = {name: to_tensor(array) for name, array in arrays.items()}
            self.cache.load(tensors, tensors.pop(MASK))

    def _dtype(self) -> str:
        return str(self.model.model.norm.weight.dtype).rpartition(".")[2]

    def _run(self, tokens: np.ndarray, mask: np.ndarray | None, keep: int) -> mx.array:
        ids = mx.array(tokens.astype(np.int32))
        if ids.shape[1] == 1 and mask is None and self.cache.length:
            self.next_token.refresh()
            with undo_unless_kept(self.cache) as done:
                logits = self.next_token(ids, self.cache)
                mx.eval(logits, held_arrays(self.cache))
                done()
            return logits[:, None]
        seen = None if mask is None else mx.array(mask != 0)
        logits = self.model(ids, cache=self.cache, attention_mask=seen, logits_to_keep=keep)
        mx.eval(logits, held_arrays(self.cache))
        mx.clear_cache()
        return logits.astype(mx.float32)


def _prefill_tokens() -> int:
    """Return how many tokens of a prompt the device reads at once."""
    if on_cuda():
        return CUDA_PREFILL_TOKENS
    return METAL_PREFILL_TOKENS if on_gpu() else PREFILL_CHUNK


def _limit_memory(model: SessaForCausalLM) -> None:
    """Bound the buffers that MLX keeps for reuse, and let a Mac keep the weights in memory."""
    if not on_gpu():
        return
    weights = sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())
    mx.set_cache_limit(max(weights, LEAST_POOL))
    if mx.metal.is_available():
        most = int(mx.device_info()["max_recommended_working_set_size"])
        mx.set_wired_limit(min(most, weights + WIRED_BESIDE))


def load_decoder(
    folder: Path | str,
    *,
    adapter: Path | str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Decoder:
    """Load the model of a checkpoint folder as a decoder; arguments and errors of `load_model`."""
    return Decoder(load_model(folder, adapter=adapter, dtype=dtype, device=device))


def generate(
    model: SessaForCausalLM | Path | str,
    prompts: str | Sequence[str],
    *,
    tokenizer: Tokenizer | Path | str | None = None,
    max_tokens: int | None = None,
    batch_size: int = BATCH_SIZE,
    parse_special_tokens: bool = False,
    on_text: Callable[[int, str], None] | None = None,
    adapter: Path | str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    **fields: Any,
) -> list[str]:
    """Continue prompts with a model or with the model of a checkpoint folder; one text a prompt.

    A model in memory needs a `tokenizer` (or a folder that has one). `max_tokens` is 200, or what
    the context has room for; at most `batch_size` prompts run at once; `on_text(row, piece)`
    receives the text while it is written. `adapter` is a folder of `finetune` that changes the
    model of a checkpoint folder.
    `parse_special_tokens` reads the name of a special token in a prompt as the token. Further
    keyword arguments are fields of SamplingConfig, LogitRules and Shortcuts, as in
    generate("runs/a", "The", temperature=0, repetition_penalty=1.1, prompt_lookup=8). Raises
    SessaError.
    """
    draws, changes, ways = split_fields(fields, SamplingConfig, LogitRules, Shortcuts)
    sampling, rules = build(SamplingConfig, draws), build(LogitRules, changes)
    shortcuts = build(Shortcuts, ways)
    folder = Path(model) if isinstance(model, (Path, str)) else None
    if isinstance(model, (Path, str)):
        tokenizer = text_folder(model, adapter) if tokenizer is None else tokenizer
        model = load_model(model, adapter=adapter, dtype=dtype, device=device)
    elif any(given is not None for given in (adapter, dtype, device)):
        raise SessaError(
            "`adapter`, `dtype` and `device` are for a folder; the model in memory has its own"
        )
    reader = ModelTokenizer.open(tokenizer, model.config, parse_special_tokens)
    prepared = prepare_rules(rules, reader)  # refused before a prompt cache is written
    begun = start(
        shortcuts,
        Decoder(model),
        reader,
        [prompts] if isinstance(prompts, str) else prompts,
        ModelHome(
            folder=folder,
            open=partial(load_decoder, dtype=dtype, device=device),
            files=partial(adapted_files, adapter=adapter),
        ),
        max_tokens,
    )
    found = generate_texts(
        begun.decoder,
        reader,
        begun.prompts,
        sampling,
        rules=prepared,
        max_tokens=max_tokens,
        batch_size=begun.batch_size or batch_size,
        cached=begun.cached,
        on_text=on_text,
    )
    return [continuation.text for continuation in found]
