"""Attention of rows that two processes with a GPU each share; skipped without two GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

if torch.cuda.device_count() < 2:
    pytest.skip("PyTorch finds fewer than two CUDA devices here", allow_module_level=True)


def test_two_gpus_attend_as_one():
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "export", "cli", "tests"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    check = "from support.shared_rows import check_attention_on_gpus as check; check()"
    subprocess.run(
        [sys.executable, *launcher, "--no-python", sys.executable, "-c", check],
        env=os.environ | {"PYTHONPATH": paths},
        timeout=600,
        check=True,
    )
