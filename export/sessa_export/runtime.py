"""Runs an exported folder in ONNX Runtime, with caches that are passed on without copies."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_common.extras import install
from sessa_common.inference.cache_contents import (
    MASK,
    check_cache_arrays,
    is_trimmable,
    require_trimmable,
)
from sessa_common.inference.generation import draw_on_host
from sessa_common.inference.sampling import GumbelNoise, SamplingConfig
from sessa_export.cache_layout import Pair, layout_of, named_rows, numbered_pairs
from sessa_export.caches import BufferedCaches, GrownCaches
from sessa_export.sessions import CONFIG_KEY, DTYPE_KEY, device_of, open_session

MODEL_FILE = "model.onnx"
INSTALL = install("onnx")


def require_onnx() -> None:
    """Raise SessaError unless onnx and onnxruntime are installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise SessaError(f"{error.name} is not installed; {INSTALL}") from None


class Decoder:
    """`sessa_common.inference.generation.Decoder` on an ONNX Runtime session of an exported model.

    Caches stay on the session's device and are bound in place. Two threads must not use one decoder
    at once, but several decoders may share one `session`.
    """

    def __init__(self, session, config: SessaConfig) -> None:
        self.session = session
        self.config = config
        self.dtype = session.get_modelmeta().custom_metadata_map.get(DTYPE_KEY, "fp32")
        buffered = any(output.name.startswith("new.") for output in session.get_outputs())
        device = device_of(session)
        if buffered and device != "cpu":
            raise SessaError(
                "the buffer layout keeps its caches in the memory of the processor; export the "
                f"model with layout natural to run it on {device}"
            )
        self.caches = BufferedCaches(session) if buffered else GrownCaches(session, device)
        keys, values = self.caches.inputs[::2], self.caches.inputs[1::2]
        pairs = [
            Pair(k.shape[1], k.shape[3], v.shape[3]) for k, v in zip(keys, values, strict=True)
        ]
        self.layout = layout_of(config, pairs)
        self.reset()

    @property
    def length(self) -> int:
        """The number of positions in the cache, padding included."""
        return 0 if self.mask is None else self.mask.shape[1]

    @property
    def trimmable(self) -> bool:
        """True if `trim` can drop some positions; False when a layer is Mamba-2."""
        return is_trimmable(self.config)

    def reset(self) -> None:
        """Empty the cache."""
        self.caches.reset()
        self.mask: np.ndarray | None = None
        self.fed = False  # whether the last run's logits are those of the cache's last token

    def logits(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Append tokens (B, T) and return their logits (B, T, V)."""
        self.feed(tokens, mask)
        return self.caches.logits()

    def step(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Append tokens (B, T) and return the logits of the last, (B, V)."""
        return self.logits(tokens, mask)[:, -1]

    def feed(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append tokens (B, T); the logits of the last stay on the device for `draw`."""
        tokens = np.ascontiguousarray(tokens, np.int64)
        self.mask = self._grown_mask(tokens, mask)
        self.caches.run(tokens, self.mask)
        self.fed = True

    def draw(
        self, sampling: SamplingConfig, budget: int, noise: GumbelNoise | None = None
    ) -> Generator[np.ndarray, None, None]:
        """Yield the next ids (B,) int64, as `sessa_common.inference.generation.Decoder` says."""
        last = self.caches.logits()[:, -1] if self.fed else None
        return draw_on_host(self, last, sampling, budget, noise)

    def trim(self, count: int) -> None:
        """Drop the last `count` positions; SessaError for more than there are."""
        require_trimmable(self.config, count, self.length)
        if self.mask is not None and count:
            self.mask = self.mask[:, : self.length - count]
            self.caches.trim(self.length)
        self.fed = False

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch."""
        if self.mask is not None:
            self.mask = self.mask[list(rows)]
            self.caches.load([array[list(rows)] for array in self.caches.arrays()])
        self.fed = False

    def fork(self, rows: Sequence[int] = ()) -> Decoder:
        """Another decoder of the session, which holds a copy of these rows, or no rows."""
        found = Decoder(self.session, self.config)
        if self.mask is not None and len(rows):
            mask = self.mask[list(rows)]
            start = int(mask.any(axis=0).argmax())
            found.mask = mask[:, start:]
            found.caches.load([array[list(rows), :, start:] for array in self.caches.arrays()])
        return found

    def join(self, other: Decoder) -> None:
        """Append the rows of another decoder; the shorter get padding on the left."""
        assert self.mask is not None and other.mask is not None
        length = max(self.length, other.length)
        mine, more = self._padded(length), other._padded(length)
        self.mask, *joined = map(np.concatenate, zip(mine, more, strict=True))
        self.caches.load(joined)
        self.fed = False

    def _padded(self, length: int) -> list[np.ndarray]:
        """The mask (B, length) and the caches (B, heads, length, width), padded on the left."""
        assert self.mask is not None
        more = (length - self.length, 0)
        rows = [np.pad(held, ((0, 0), (0, 0), more, (0, 0))) for held in self.caches.arrays()]
        return [np.pad(self.mask, ((0, 0), more)), *rows]

    def cache_arrays(self) -> dict[str, np.ndarray]:
        """Copy the cache into arrays, named as in `cache_contents.cache_shapes`."""
        if self.mask is None or not self.length:
            return {}
        arrays = named_rows(self.config, self.layout, self.caches.arrays())
        return {**arrays, MASK: self.mask != 0}

    def restore_cache(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the cache by what `cache_arrays` gave; SessaError for that of another model."""
        if arrays:
            check_cache_arrays(self.config, arrays, "float32")
        self.reset()
        if arrays:
            self.mask = arrays[MASK].astype(np.int64)
            self.caches.load(numbered_pairs(self.config, self.layout, arrays))

    def _grown_mask(self, tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        past = np.zeros((len(tokens), 0), np.int64) if self.mask is None else self.mask
        if mask is None:
            return np.concatenate([past, np.ones(tokens.shape, np.int64)], axis=1)
        expected = (len(tokens), past.shape[1] + tokens.shape[1])
        if mask.shape != expected:
            raise ValueError(f"mask has shape {mask.shape}, expected {expected}")
        return np.ascontiguousarray(mask, np.int64)


def find_model(folder: Path | str) -> Path | None:
    """Return the model file of an exported folder, None when there is none."""
    folder = Path(folder)
    found = [folder / MODEL_FILE, *sorted(folder.glob("onnx/model*.onnx"))]
    return next((path for path in found if path.is_file()), None)


def model_files(folder: Path | str) -> list[Path]:
    """Return the files of an exported model, the weights beside it included; none without one."""
    path = find_model(folder)
    found = [] if path is None else [path, path.with_name(f"{path.name}_data")]
    return [file for file in found if file.is_file()]


def is_exported(folder: Path) -> bool:
    """Return True for a folder that holds an exported model and no weights of a checkpoint.

    An export inside the folder of a checkpoint does not make an export of the checkpoint.
    """
    return find_model(folder) is not None and not any(folder.glob("model*.safetensors"))


def load_decoder(
    folder: Path | str,
    *,
    threads: int = 0,
    native: bool = False,
    device: str | None = None,
    tf32: bool = False,
) -> Decoder:
    """Open a folder that `sessa export` wrote; SessaError when it has no model that loads.

    `threads`, `native`, `device` and `tf32` are those of `sessa_export.sessions.open_session`.
    """
    path = find_model(folder)
    if path is None:
        raise SessaError(
            f"{Path(folder) / MODEL_FILE}: no such file; make it with "
            "`sessa export CHECKPOINT FOLDER`"
        )
    require_onnx()
    session = open_session(path, threads=threads, native=native, device=device, tf32=tf32)
    given = session.get_modelmeta().custom_metadata_map.get(CONFIG_KEY)
    if given is None:
        raise SessaError(f"{path}: was not written by `sessa export`; export the checkpoint again")
    return Decoder(session, SessaConfig.from_dict(json.loads(given), str(path)))
