"""The tokenizer of a model and the ids that begin and end a text for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from sessa_common.config import SessaConfig
from sessa_common.data.encoding import encode_text
from sessa_common.data.tokenizer import (
    begin_token_ids,
    check_fits,
    end_token_id,
    parse_special_tokens,
    read_tokenizer,
)
from sessa_common.errors import SessaError
from sessa_common.json_files import read_json


@dataclass(frozen=True, kw_only=True)
class ModelTokenizer:
    """A tokenizer that fits a model; `folder` is the one that it was read from, if any."""

    tokenizer: Tokenizer
    config: SessaConfig
    folder: Path | None = None

    @classmethod
    def open(
        cls, source: Tokenizer | Path | str | None, config: SessaConfig, parse_special: bool = False
    ) -> ModelTokenizer:
        """Take a tokenizer, or read the tokenizer.json of a path or of a folder.

        `parse_special` reads the name of a special token in a text as the token, not as plain text.
        Raises SessaError when there is none and when its ids do not fit the model's embedding.
        """
        if source is None:
            raise SessaError(
                "a model in memory has no tokenizer; give `tokenizer`: a folder that has one, "
                "or the tokenizer itself"
            )
        if not isinstance(source, (str, Path)):
            check_fits(source, config, "the given tokenizer")
            parse_special_tokens(source, parse_special)
            return cls(tokenizer=source, config=config)
        path = Path(source)
        tokenizer = read_tokenizer(path)
        parse_special_tokens(tokenizer, parse_special)
        check_fits(tokenizer, config, str(path))
        folder = path if path.is_dir() else path.parent
        return cls(tokenizer=tokenizer, config=config, folder=folder)

    @property
    def prefix_ids(self) -> list[int]:
        """The ids that the tokenizer puts before every text; see `begin_token_ids`."""
        return begin_token_ids(self.tokenizer, self.folder, self.config.bos_token_id)

    @property
    def start_id(self) -> int:
        """The token before the first of a text: the tokenizer's own, else the end token.

        Raises SessaError when neither is named.
        """
        if begin := self.prefix_ids:
            return begin[-1]
        if self.config.eos_token_id is not None:
            return self.config.eos_token_id
        if self.folder is None:
            raise SessaError("the model's config has no eos_token_id, which begins a text")
        return end_token_id(self.folder)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a text."""
        return stop_tokens(self.folder, self.config)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt behind `prefix_ids`; see `encode_prompt`."""
        ids = encode_prompt(self.tokenizer, prompt, self.config)
        return [*self.prefix_ids, *ids] if prompt else ids


def stop_tokens(folder: Path | None, config: SessaConfig) -> frozenset[int]:
    """The ids that end a text: eos_token_id of generation_config.json, else of config.json."""
    path = None if folder is None else folder / "generation_config.json"
    given = read_json(path).get("eos_token_id") if path is not None and path.is_file() else None
    given = config.eos_token_id if given is None else given
    if given is None:
        return frozenset()
    ids = given if isinstance(given, list) else [given]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise SessaError(f"{path}: eos_token_id is {given!r}, expected an id or a list of ids")
    return frozenset(ids)


def encode_prompt(tokenizer: Tokenizer, text: str, config: SessaConfig) -> list[int]:
    """Token ids of a prompt; the empty prompt becomes the token that begins a text."""
    if text:
        ids = encode_text(tokenizer, text, "the prompt")
        if not ids:
            raise SessaError("the tokenizer has no token for any part of the prompt")
        return ids
    begin = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    if begin is None:
        raise SessaError("the prompt is empty and the model has no bos_token_id; give some text")
    return [begin]
