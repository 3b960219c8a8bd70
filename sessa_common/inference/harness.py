"""Benchmarks of lm-evaluation-harness on a model of any runtime."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sessa_common.errors import SessaError, expect
from sessa_common.extras import install
from sessa_common.frameworks import is_installed
from sessa_common.inference.generation import Decoder
from sessa_common.inference.model_tokenizer import ModelTokenizer


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """The metrics of one task or group, and how it was run.

    `metrics` are by the harness's names, such as acc, acc_norm and acc_stderr; a name is followed
    by a comma and the filter of the answers unless that is "none". `documents` is the number that
    was scored, and `version` is the task's.
    """

    metrics: Mapping[str, float]
    documents: int
    num_fewshot: int | None
    version: str | None


def require_harness() -> None:
    """Raise SessaError unless lm-evaluation-harness can be imported."""
    if not is_installed("lm_eval"):
        raise SessaError(f"benchmarks need lm-evaluation-harness; {install('eval')}")


def evaluate_tasks(
    decoder: Decoder,
    tokenizer: ModelTokenizer,
    tasks: Sequence[str],
    *,
    include_path: Path | str | None = None,
    num_fewshot: int | None = None,
    max_documents: int = 0,
    batch_size: int = 8,
) -> dict[str, TaskScores]:
    """Run tasks of lm-evaluation-harness and return the scores of each, by its name.

    `include_path` is a folder with more tasks as yaml files. `num_fewshot` is each task's own
    unless given; `max_documents` of 0 reads all of a task. The tokenizer should read special tokens
    in a text, as the harness's own models do. Raises SessaError for a task that nobody knows.
    """
    require_harness()
    expect(batch_size > 0, "batch_size", batch_size, "1 or more")
    few = num_fewshot is None or num_fewshot >= 0
    expect(few, "num_fewshot", num_fewshot, "0 or more")
    expect(max_documents >= 0, "max_documents", max_documents, "0 (all) or more")
    if include_path is not None and not Path(include_path).is_dir():
        raise SessaError(f"`include_path` is {include_path}, expected a folder with yaml files")

    # Its packages are installed on request only, and importing them takes seconds.
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from sessa_common.inference.harness_model import DecoderModel

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    own = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=own, include_defaults=False)
    if missing := _unknown(manager, tasks):
        # The index of the harness's own tasks takes seconds.
        manager = TaskManager(include_path=own)
        missing = _unknown(manager, tasks)
    if missing:
        raise SessaError(
            f"no task is named {missing[0]!r}; `lm-eval ls tasks` lists those of the harness, and "
            "`include_path` names a folder with others"
        )
    found = simple_evaluate(
        model=DecoderModel(decoder, tokenizer, batch_size),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=max_documents or None,
        task_manager=manager,
        log_samples=False,
    )
    return {name: _scores(name, found) for name in found["results"]}


def _unknown(manager: Any, tasks: Sequence[str]) -> list[str]:
    return [name for name in tasks if not manager.match_tasks([name])]


def _scores(name: str, found: Mapping[str, Any]) -> TaskScores:
    row = found["results"][name]
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in row.items()
        if "," in key and isinstance(value, (int, float))
    }
    counts = found["n-samples"].get(name, {"effective": row.get("sample_len", 0)})
    version = found["versions"].get(name)
    return TaskScores(
        metrics=metrics,
        documents=counts["effective"],
        num_fewshot=found["n-shot"].get(name),
        version=None if version is None else str(version),
    )
