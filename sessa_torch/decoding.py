"""Decoding with a cache in PyTorch: NumPy token ids in, NumPy logits out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from sessa_common.checkpoint.adapters import adapted_files, text_folder
from sessa_common.errors import SessaError
from sessa_common.fields import build, split_fields
from sessa_common.inference.cache_contents import MASK, check_cache_arrays, is_trimmable
from sessa_common.inference.generation import PREFILL_CHUNK, draw_on_host
from sessa_common.inference.logit_rules import LogitRules, prepare_rules
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.sampling import GumbelNoise, SamplingConfig
from sessa_common.inference.shortcuts import ModelHome, Shortcuts, start
from sessa_common.inference.texts import BATCH_SIZE, generate_texts
from sessa_torch._step import MOST_TOKENS, TokenStep, is_supported
from sessa_torch.cache import SessaCache
from sessa_torch.checkpoint import load_model, to_numpy, to_tensor
from sessa_torch.cuda.device import missing_triton
from sessa_torch.model import SessaForCausalLM

if TYPE_CHECKING:
    from sessa_torch.cuda.graph import StepRunner

LOG = logging.getLogger("sessa")
# Most tokens of all prompts in one piece on CUDA, where short pieces leave most of the GPU idle.
CUDA_PREFILL_TOKENS = 2**15
# Positions for which a draw makes room at once.
MOST_RESERVED = 1024


class Decoder:
    """`sessa_common.inference.generation.Decoder` on a PyTorch model.

    On CUDA a few tokens behind a cache are one captured graph, unless `graphs` is set to False, and
    ids are chosen on the device. Where the kernels cannot run, the log says why.
    """

    def __init__(self, model: SessaForCausalLM) -> None:
        self.model = model.eval()
        self.config = model.config
        self.device = model.model.norm.weight.device
        self.graphs = True
        self.prefill_tokens = CUDA_PREFILL_TOKENS if self.device.type == "cuda" else PREFILL_CHUNK
        self.cache = SessaCache(model.config)
        self.last: Tensor | None = None  # (B, V), logits of the last token
        self._runner = _step_runner(model)
        self._takes_steps = is_supported(model)
        self._step: TokenStep | None = None

    @property
    def length(self) -> int:
        """The number of positions in the cache, padding included."""
        return self.cache.length

    @property
    def trimmable(self) -> bool:
        """True if `trim` can drop some positions; False when a layer is Mamba-2."""
        return is_trimmable(self.config)

    @torch.inference_mode()
    def reset(self) -> None:
        """Empty the cache, and take the weights anew if some were replaced.

        On CUDA the memory of the cache is kept, since the graphs hold its addresses.
        """
        if self._runner is None:
            self.cache = SessaCache(self.config)
        else:
            self.cache.trim(self.length)
        self._step = None
        self._changed()

    def _changed(self) -> None:
        self.last = None
        if self._runner is not None:
            self._runner.length = None

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
        if self.last is None or not self.last.is_cuda:
            last = None if self.last is None else to_numpy(self.last)
            return draw_on_host(self, last, sampling, budget, noise)
        return self._draw(self.last, sampling, budget, noise)

    @torch.inference_mode()
    def _draw(
        self, last: Tensor, sampling: SamplingConfig, budget: int, noise: GumbelNoise | None
    ) -> Generator[np.ndarray, None, None]:
        from sessa_torch.cuda.sampling import draw_on_device

        def append(ids: Tensor) -> Tensor:
            self.last = self._append(ids, None, 1)[:, -1]
            return self.last

        undo = (lambda: self.trim(1)) if self.trimmable else None
        self.cache._reserve(min(budget, max(self.length, MOST_RESERVED)))
        yield from draw_on_device(append, undo, last, sampling, budget, noise)

    @torch.inference_mode()
    def trim(self, count: int) -> None:
        """Drop the last `count` positions; SessaError where that is impossible."""
        self.cache.trim(count)
        self._changed()

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch."""
        self.cache.keep(rows)
        self._changed()

    @torch.inference_mode()
    def fork(self, rows: Sequence[int] = ()) -> Decoder:
        """Another decoder of the model, which holds a copy of these rows, or no rows."""
        found = copy.copy(self)
        found.cache, found.last = self.cache.fork(rows), None
        # Graphs belong to the buffers of one cache.
        found._runner = None if self._runner is None else type(self._runner)(self.model)
        return found

    @torch.inference_mode()
    def join(self, other: Decoder) -> None:
        """Append the rows of another decoder of the model; the shorter get padding on the left."""
        self.cache.join(other.cache)
        self._changed()

    def cache_arrays(self) -> dict[str, np.ndarray]:
        """Copy the cache into arrays, named as in `cache_contents.cache_shapes`."""
        arrays = {name: to_numpy(held).copy() for name, held in self.cache.tensors().items()}
        if arrays:
            arrays[MASK] = to_numpy(self.cache._whole_mask()).copy()
        return arrays

    @torch.inference_mode()
    def restore_cache(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the cache by what `cache_arrays` gave; SessaError for that of another model."""
        if arrays:
            check_cache_arrays(self.config, arrays, self._dtype())
        self.reset()
        if arrays:
            tensors = {name: to_tensor(array).to(self.device) for name, array in arrays.items()}
            self.cache.load(tensors, tensors.pop(MASK))

    def _dtype(self) -> str:
        return str(self.model.model.norm.weight.dtype).rpartition(".")[2]

    def _run(self, tokens: np.ndarray, mask: np.ndarray | None, keep: int) -> Tensor:
        ids = torch.from_numpy(np.asarray(tokens, np.int64)).to(self.device)
        seen = None if mask is None else torch.from_numpy(np.asarray(mask) != 0).to(self.device)
        return self._append(ids, seen, keep)

    @torch.inference_mode()
    def _append(self, ids: Tensor, seen: Tensor | None, keep: int) -> Tensor:
        """Logits of the last `keep` of the tokens ids (B, T), of all for 0."""
        if (runner := self._runner) is not None:
            if seen is None and runner.takes(self.cache, ids):
                runner.graphs = runner.graphs and self.graphs
                return runner.run(self.cache, ids, keep)
            runner.length = None
        if self._takes_steps and ids.shape[1] <= MOST_TOKENS and self.length:
            self._step = self._step or TokenStep(self.model)
            return self._step(self.cache, ids, seen, keep).float()
        logits = self.model(ids, cache=self.cache, attention_mask=seen, logits_to_keep=keep)
        return logits.float()


def _step_runner(model: SessaForCausalLM) -> StepRunner | None:
    """A runner of steps on CUDA, or None where its kernels cannot run."""
    if not model.model.norm.weight.is_cuda:
        return None
    if (reason := missing_triton()) is None:
        from sessa_torch.cuda import graph

        if (reason := graph.unavailable_reason(model)) is None:
            return graph.StepRunner(model)
    LOG.warning("decoding by framework operations, without a CUDA graph: %s", reason)
    return None


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
