"""A decoder as lm-evaluation-harness wants a model; imported only where the harness is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from sessa_common.data.corpus import check_ids
from sessa_common.data.encoding import encode_text
from sessa_common.errors import SessaError
from sessa_common.inference.evaluation import token_losses
from sessa_common.inference.generation import Decoder, generate
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.sampling import SamplingConfig

# A request: what the harness keeps of it, the ids that are given and those that are scored.
Request = tuple[Any, list[int], list[int]]


class DecoderModel(TemplateLM):  # type: ignore[misc]
    """A model of any runtime, which scores and generates as the harness's `hf` does."""

    def __init__(self, decoder: Decoder, tokenizer: ModelTokenizer, batch_size: int) -> None:
        super().__init__()
        self.decoder, self.texts, self.batch_size = decoder, tokenizer, batch_size
        self.max_length = decoder.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        end = self.decoder.config.eos_token_id
        return self.texts.start_id if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """The id that a text without context is predicted from."""
        begin = self.decoder.config.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text, behind those that the tokenizer begins every text with."""
        ids = encode_text(self.texts.tokenizer, string)
        check_ids(np.asarray(ids, np.int64), self.decoder.config, "a text of the task")
        prefix = self.texts.prefix_ids if add_special_tokens in (None, True) else []
        return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the greedy one."""
        longest = max((len(target) for _, _, target in requests), default=0)
        if longest > self.max_length:
            raise SessaError(
                f"a text to score has {longest} tokens, but the model reads at most "
                f"{self.max_length} (max_position_embeddings)"
            )
        # Answers of one token to the same question need one row of logits only.
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, target) in enumerate(requests):
            given = (context + target)[-(self.max_length + 1) : -1]
            rows.setdefault(tuple(given), []).append(i)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for inputs, logits in self._logits(list(rows), disable_tqdm):
            for i in rows[inputs]:
                ids = np.asarray(requests[i][2], np.int64)
                scored = logits[len(inputs) - len(ids) : len(inputs)]
                greedy = bool((scored.argmax(-1) == ids).all())
                found[i] = -float(token_losses(scored, ids).sum()), greedy
        return found

    def _logits(
        self, rows: list[tuple[int, ...]], quiet: bool
    ) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """Yield each row of ids with its logits (T, V), the longest first."""
        ordered = sorted(rows, key=len, reverse=True)
        for batch in self._batches(ordered, "Scoring", quiet):
            # Padding on the right changes nothing, because a causal model does not see it.
            tokens = np.zeros((len(batch), len(batch[0])), np.int64)
            for row, given in enumerate(batch):
                tokens[row, : len(given)] = given
            self.decoder.reset()
            yield from zip(batch, self.decoder.logits(tokens), strict=True)

    def _batches(self, rows: Sequence[Any], title: str, quiet: bool) -> Iterator[Sequence[Any]]:
        with tqdm(total=len(rows), desc=title, disable=quiet) as bar:
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                yield batch
                bar.update(len(batch))

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each whole text, in windows of the model's context."""
        windows: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            owners += [i] * (len(windows) - len(owners))
        found = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (score, _) in zip(owners, scores, strict=True):
            found[owner] += score
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to one of its stop texts, which is left out."""
        found = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        for members in groups.values():
            options = normalize_gen_kwargs(requests[members[0]].args[1])
            for batch in self._batches(members, "Generating", disable_tqdm):
                contexts = [requests[i].args[0] for i in batch]
                for i, text in zip(batch, self._continue(contexts, options), strict=True):
                    found[i] = text
        return found

    def _continue(self, contexts: list[str], options: Mapping[str, Any]) -> list[str]:
        budget, until = options["max_gen_toks"], [text for text in options["until"] if text]
        room = self.max_length - budget
        if room < 1:
            raise SessaError(
                f"the task asks for {budget} new tokens (max_gen_toks), but the model reads at "
                f"most {self.max_length} (max_position_embeddings)"
            )
        prompts = [self.tok_encode(text)[-room:] or [self.prefix_token_id] for text in contexts]
        ids: list[list[int]] = [[] for _ in prompts]
        texts, ended = [""] * len(prompts), set[int]()
        stop = self.texts.stop_ids
        turns = generate(
            self.decoder, prompts, _sampling(options), max_tokens=budget, stop=stop, ended=ended
        )
        for turn in turns:
            for row, token in enumerate(turn):
                if token is None or row in ended:
                    continue
                ids[row].append(token)
                texts[row] = self.texts.tokenizer.decode(ids[row])
                if any(text in texts[row] for text in until):
                    ended.add(row)
        return [_cut(text, until) for text in texts]


def _sampling(options: Mapping[str, Any]) -> SamplingConfig:
    """The options of a task's generation; SessaError for one that this project has not."""
    known = {name: options[name] for name in ("temperature", "top_k", "top_p") if name in options}
    rest = options.keys() - known.keys() - {"do_sample", "until", "max_gen_toks"}
    if rest:
        raise SessaError(
            f"the task's generation_kwargs have {', '.join(sorted(rest))}, expected only do_sample,"
            " until, max_gen_toks, temperature, top_k and top_p"
        )
    return SamplingConfig(**(known if options["do_sample"] else {"temperature": 0.0}))


def _cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of some stop texts."""
    ends = [at for at in (text.find(stop) for stop in until) if at >= 0]
    return text[: min(ends, default=len(text))]
