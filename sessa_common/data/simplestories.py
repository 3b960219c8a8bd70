"""The SimpleStories data set as two files of stories: one to train on and one held out."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

from sessa_common.data.sources import TextSource, local_paths, read_documents
from sessa_common.errors import SessaError
from sessa_common.storage import new_folder

COLUMN = "story"
VALIDATION_FRACTION = 0.01


def write_stories(
    sources: Iterable[str],
    folder: Path,
    validation_fraction: float = VALIDATION_FRACTION,
    *,
    force: bool = False,
) -> tuple[int, int]:
    """Write train.jsonl and validation.jsonl, one story per line; return the numbers of stories.

    The checksum of a story decides its file, so that no story is in both. Raises SessaError, with
    nothing written, for a source without the column "story" and when one file would be empty.
    """
    sources = tuple(sources)
    if not sources:
        raise SessaError("simplestories needs `data`: files, or hf:SimpleStories/SimpleStories")
    if not 0 < validation_fraction < 1:
        raise SessaError(
            f"`validation_fraction` is {validation_fraction}, expected between 0 and 1"
        )
    counts = [0, 0]
    with new_folder(folder, force=force, inputs=local_paths(sources)) as scratch:
        with (
            (scratch / "train.jsonl").open("w", encoding="utf-8") as train,
            (scratch / "validation.jsonl").open("w", encoding="utf-8") as validation,
        ):
            for story in read_documents(sources, TextSource(text_field=COLUMN)):
                is_held_out = zlib.crc32(story.encode()) < validation_fraction * 2**32
                line = json.dumps({COLUMN: story}, ensure_ascii=False)
                (validation if is_held_out else train).write(line + "\n")
                counts[is_held_out] += 1
        if not all(counts):
            raise SessaError(
                f"{counts[0]} training and {counts[1]} held-out stories are too few; give more "
                "data, or another `validation_fraction`"
            )
    return counts[0], counts[1]
