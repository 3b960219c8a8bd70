"""Statistics of the feedback's gains, which tell whether training uses the feedback."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# A gain above this counts as one that is used.
USED = 0.1


def gain_record(gains: Mapping[int, np.ndarray]) -> dict[str, float]:
    """Mean and largest |gamma| of each layer, and the share above 0.1, by names for metrics.jsonl.

    gains (B, T) by the number of the layer.
    """
    record = {}
    for i, values in gains.items():
        size = np.abs(values.astype(np.float64))
        record[f"layer_{i}_gain_mean"] = float(size.mean())
        record[f"layer_{i}_gain_max"] = float(size.max())
        record[f"layer_{i}_gain_used"] = float((size > USED).mean())
    return record


def gain_summary(record: Mapping[str, float]) -> str:
    """The gains of all layers of a record in a few words; empty without feedback."""
    means, largest, used = (
        [value for name, value in record.items() if name.endswith(f"_gain_{kind}")]
        for kind in ("mean", "max", "used")
    )
    if not means:
        return ""
    return (
        f"gains: mean {np.mean(means):.3g}, largest {max(largest):.3g}, "
        f"{100 * np.mean(used):.0f}% above {USED}"
    )
