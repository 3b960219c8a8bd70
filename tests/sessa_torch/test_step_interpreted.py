"""The kernels of a decode step and of a short prompt in Triton's interpreter, against float64.

One process of its own computes every case (this file run as a script).
"""

from __future__ import annotations

import json

import pytest
from support.interpreted import interpret, multiply_bfloat16, poison_workspaces

pytest.importorskip("triton")

# Kind of model, dtype, sequences, past, steps, padding.
CASES = [
    ("sessa", "float32", 1, 1, [1], False),
    ("sessa", "float32", 2, 17, [1, 2], True),
    ("sessa", "float32", 1, 65, [7, -5, 1], False),
    ("grouped", "float32", 2, 255, [1], True),
    ("grouped", "float32", 2, 0, [17], False),
    ("one head", "float32", 1, 16, [1], False),
    ("gated", "float32", 2, 15, [3], True),
    ("sessa_transformer", "float32", 2, 5, [2], True),
    ("hybrid", "float32", 2, 9, [1], True),
    ("llama", "float32", 1, 64, [1, 7], False),
    ("qwen2", "float32", 2, 6, [1], True),
    ("qwen3", "float32", 2, 9, [1], True),
    ("qwen3", "float32", 1, 0, [18], False),
    ("biased", "float32", 1, 5, [2], False),
    ("rms", "float32", 2, 7, [1], True),
    ("sessa", "bfloat16", 1, 30, [1], False),
    ("qwen3", "bfloat16", 1, 5, [16], False),
    ("sessa", "float16", 1, 5, [18], False),
]
LIMITS = {"float32": 3e-6, "float16": 5e-3, "bfloat16": 4e-2}


@pytest.fixture(scope="module")
def results() -> dict:
    return interpret(__file__)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_equal_a_prefill_in_float64(results, case):
    assert results[str(case)] <= LIMITS[case[1]]


def main():
    from support.step_cases import error_of_steps, lively_model

    poison_workspaces()
    multiply_bfloat16()
    found = {}
    for case in CASES:
        kind, dtype, *rest = case
        found[str(case)] = error_of_steps(lively_model(kind, dtype), *rest)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
