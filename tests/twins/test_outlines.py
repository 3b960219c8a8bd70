"""The twins match: files, outlines, signatures, parameter names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from support.frameworks import FRAMEWORKS

from sessa_common.config import SessaConfig, parameter_shapes

ROOT = Path(__file__).parents[2]
# Triton runs on CUDA only, MLX arrays neither share memory nor tell their layout, and only PyTorch
# writes pickles. PyTorch's custom kernels need no other way on CUDA and choose TF32 by product.
# Only MLX has one device for the whole program. The files of its single-token step begin with
# _step; PyTorch captures a graph of its own layers. PyTorch's own attention has a gradient in O(T)
# memory, MLX's has not, and only MLX's exp is slow on a CPU and its one-row products with a bias on
# CUDA. transformers has models in PyTorch, mlx-lm in MLX. Only PyTorch shards weights, solves
# documents one by one, where MLX masks them, and has optimizers that hold the moments. Only
# PyTorch's own checkpoints can keep the results of operators.
ONE_SIDED = {
    "_compiled_step.py",
    "_device.py",
    "_documents.py",
    "_exp.py",
    "_gelu.py",
    "_linear.py",
    "_operator.py",
    "_profile.py",
    "_optimizer.py",
    "_step",
    "attention_blocks.py",
    "cuda/",
    "distributed/",
    "feedback/_documents.py",
    "feedback/cuda",
    "feedback/gpu.py",
    "feedback/outputs.py",
    "feedback/products.py",
    "hf",
    "lm",
    "state_dict_file.py",
}
# The name of a module's call differs between the frameworks.
SAME = {"__call__": "forward"}


def files(package):
    found = {p.relative_to(ROOT / package).as_posix() for p in (ROOT / package).rglob("*.py")}
    return {name for name in found if not any(name.startswith(x) for x in ONE_SIDED)}


def signature(node):
    """Argument names and kinds, and which have defaults; types differ by framework."""
    a = node.args
    names = [x.arg for x in (*a.posonlyargs, *a.args)], [x.arg for x in a.kwonlyargs]
    defaults = [ast.unparse(x) for x in a.defaults], [x and ast.unparse(x) for x in a.kw_defaults]
    return names, defaults, a.vararg and a.vararg.arg, a.kwarg and a.kwarg.arg


def outline(path):
    """Public classes, their methods, and functions, with signatures."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found[node.name] = signature(node)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found[node.name] = [ast.unparse(base).split(".")[-1] for base in node.bases]
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    name = SAME.get(method.name, method.name)
                    if name == "__init__" or not name.startswith("_"):
                        found[f"{node.name}.{name}"] = signature(method)
    return found


def test_both_packages_have_the_same_files():
    assert files("sessa_torch") == files("sessa_mlx")


@pytest.mark.parametrize("name", sorted(files("sessa_torch") & files("sessa_mlx")))
def test_same_outline_and_signatures(name):
    first, second = outline(ROOT / "sessa_torch" / name), outline(ROOT / "sessa_mlx" / name)
    assert first == second


KINDS = {
    "sessa": {},
    "transformer": {"layer_kinds": "transformer"},
    "transformer-narrow": {"layer_kinds": "transformer", "intermediate_size": 20},
    "gated": {"layer_kinds": "gated_attention"},
    "sessa_transformer": {"layer_kinds": "sessa_transformer", "intermediate_size": 20},
    "mamba2": {"layer_kinds": "mamba2", "mamba_d_state": 6, "mamba_d_head": 2, "mamba_d_conv": 3},
    "hybrid": {"layer_kinds": ("mamba2", "sessa"), "mamba_d_head": 4},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_parameter_names_and_shapes_are_those_of_the_checkpoint(tied, heads, kind):
    config = SessaConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=heads,
        tie_word_embeddings=tied,
        **KINDS[kind],
    )
    for framework in FRAMEWORKS:
        model = framework.checkpoint.new_model(config)
        got = {n: w.shape for n, w in framework.checkpoint.model_weights(model).items()}
        assert got == parameter_shapes(config), framework.name


def test_an_outline_sees_a_renamed_argument(tmp_path):
    """The comparison itself notices what it is there for."""
    text = (ROOT / "sessa_torch/cache.py").read_text(encoding="utf-8")
    changed = tmp_path / "cache.py"
    changed.write_text(text.replace("def trim(self, count", "def trim(self, n"), encoding="utf-8")
    assert outline(changed) != outline(ROOT / "sessa_mlx/cache.py")
