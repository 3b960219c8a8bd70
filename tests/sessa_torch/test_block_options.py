"""Options of a block for which the kernels of a CUDA step are not made."""

from __future__ import annotations

from unittest import mock

import pytest
from support.block_options import FAMILIES

from sessa_common.config import SessaConfig
from sessa_torch.checkpoint import new_model
from sessa_torch.cuda.graph import unavailable_reason

SIZES = {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, []),
        (FAMILIES["llama"], ["norm_type", "mlp_type", "qkv_bias", "out_proj_bias", "mlp_bias"]),
        (FAMILIES["qwen3"], ["qk_norm", "head_dim", "feedback_key_dim"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, []),
    ],
)
def test_a_cuda_step_names_the_options_that_its_kernels_do_not_know(options, named):
    model = new_model(SessaConfig(**{**SIZES, **options}))
    with (
        mock.patch("sessa_torch.cuda.device.unavailable_reason", lambda *_: None),
        mock.patch("sessa_torch.feedback.cuda.unavailable_reason", lambda *_: None),
    ):
        reason = unavailable_reason(model)
    assert all(name in str(reason) for name in named) and (reason is None) == (not named)
