"""sessa::FeedbackSolve in standard operators, alone and as PyTorch's own exporter leaves it."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper
from support.export_models import small_config
from support.operands import draw_operands
from support.operator_models import NAMES, operator_model, session_of

from sessa_common.reference import model as reference
from sessa_export.operator_body import add_function, feedback_function

B, D, K = 2, 40, 24


@pytest.fixture(scope="module", params=[None, 128], ids=["body", "for a GPU"])
def operator(request) -> onnxruntime.InferenceSession:
    return session_of(operator_model(large_block=request.param))


def operands(T: int, P: int, mask: str = "open") -> dict[str, np.ndarray]:
    return draw_operands([T, P], B=B, T=T, D=D, K=K, P=P, mask=mask)


def solved(x: dict[str, np.ndarray]) -> np.ndarray:
    return reference.feedback_solve(*(x[name] for name in NAMES))


@pytest.mark.parametrize("mask", ["open", "left", "holes"])
@pytest.mark.parametrize("P", [0, 1, 5])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 64, 65, 130])
def test_body_equals_reference(operator, T: int, P: int, mask: str) -> None:
    x = operands(T, P, mask)
    (s,) = operator.run(None, x)
    np.testing.assert_allclose(s, solved(x), rtol=0, atol=2e-5 * np.abs(solved(x)).max())


@pytest.mark.parametrize("opset", [18, 19, 20, 22, 23])
def test_body_in_other_opsets(opset: int) -> None:
    session = session_of(operator_model(opset))
    for T, P in [(1, 5), (70, 3)]:
        x = operands(T, P, "holes")
        np.testing.assert_allclose(session.run(None, x)[0], solved(x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("block", [1, 2, 16, 48])
def test_body_with_other_blocks(block: int) -> None:
    model = operator_model()
    del model.functions[:]
    model.functions.append(feedback_function(21, block))
    x = operands(50, 3, "left")
    np.testing.assert_allclose(session_of(model).run(None, x)[0], solved(x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("block", [128, 256, 1024])
def test_body_with_other_large_blocks(block: int) -> None:
    session = session_of(operator_model(large_block=block))
    for T, P, mask in [(1, 4, "holes"), (64, 3, "left"), (300, 5, "blind"), (1100, 2, "holes")]:
        x = operands(T, P, mask)
        np.testing.assert_allclose(session.run(None, x)[0], solved(x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("T, P", [(1, 4), (50, 4), (150, 4)])
def test_rows_without_gain_keep_their_bits(operator, T: int, P: int) -> None:
    x = operands(T, P, "holes")
    x["gamma"][:] = 0
    np.testing.assert_array_equal(operator.run(None, x)[0], x["f"])


@pytest.mark.parametrize("T, P", [(1, 0), (1, 4), (3, 0), (70, 4)])
def test_row_that_sees_nothing_keeps_f(operator, T: int, P: int) -> None:
    x = operands(T, P, "closed")
    np.testing.assert_array_equal(operator.run(None, x)[0], x["f"])


@pytest.mark.parametrize("T", [1, 30, 130])
def test_large_scores_do_not_overflow(operator, T: int) -> None:
    x = operands(T, 4)
    x["q"][:], x["k"][:] = 0, 0
    # Scores of exactly +80 and -80 by turns.
    x["q"][..., 0], x["k"][..., 0] = 80 * K**0.5, np.where(np.arange(T + 4) % 3, -1, 1)
    (s,) = operator.run(None, x)
    np.testing.assert_allclose(s, solved(x), rtol=0, atol=2e-5 * np.abs(solved(x)).max())


@pytest.mark.parametrize("gamma", [0.999, -0.999])
def test_long_chain_through_a_block(operator, gamma: float) -> None:
    # Every row reads the row before it and nothing else: no power of N below N^63 vanishes.
    T = 130
    x = operands(T, 0)
    x["k"] = np.broadcast_to(np.eye(T, dtype=np.float32), (B, T, T)).copy()
    x["q"] = 80 * T**0.5 * np.roll(x["k"], -1, axis=2)
    x["gamma"][:] = gamma
    (s,) = operator.run(None, x)
    np.testing.assert_allclose(s, solved(x), rtol=0, atol=2e-5 * np.abs(solved(x)).max())


def test_masked_operands_have_no_influence(operator) -> None:
    x = operands(66, 5, "left")
    (before,) = operator.run(None, x)
    hidden = ~x["key_mask"]
    x["k"][hidden] = 1e4
    x["past_s"][hidden[:, :5]] = -1e4
    (after,) = operator.run(None, x)
    shown = x["key_mask"][:, 5:]
    np.testing.assert_array_equal(after[shown], before[shown])


@pytest.mark.parametrize(
    "inputs, P",
    [(NAMES[:4], 0), (NAMES[:5], 3), ((*NAMES[:4], "", "key_mask"), 0)],
    ids=["neither", "past_only", "mask_only"],
)
def test_optional_inputs_may_be_left_out(inputs: tuple[str, ...], P: int) -> None:
    session = session_of(operator_model(inputs=inputs))
    for T in (1, 2, 70):
        x = operands(T, P, "left" if "key_mask" in inputs else "open")
        got = session.run(None, {name: x[name] for name in inputs if name})[0]
        np.testing.assert_allclose(got, solved(x), rtol=0, atol=2e-5)


def test_float16_is_solved_in_float32() -> None:
    session = session_of(operator_model(real=TensorProto.FLOAT16))
    x = operands(70, 5, "holes")
    x = {n: v if v.dtype == bool else v.astype(np.float16) for n, v in x.items()}
    (s,) = session.run(None, x)
    assert s.dtype == np.float16
    expected = solved(x)
    # One rounding of the result, 2^-11 relative, is all that half precision may cost.
    np.testing.assert_allclose(s, expected, rtol=2**-10, atol=2e-5)


def test_node_inside_a_branch_gets_its_inputs() -> None:
    inner = helper.make_node("FeedbackSolve", list(NAMES[:4]), ["solved"], domain="sessa")
    same = helper.make_node("Identity", ["f"], ["same"])
    wide = ["B", "T", "D"]
    branches = [
        helper.make_graph([node], name, [], [helper.make_tensor_value_info(out, 1, wide)])
        for node, name, out in ((inner, "yes", "solved"), (same, "no", "same"))
    ]
    choose = helper.make_node("If", ["on"], ["s"], then_branch=branches[0], else_branch=branches[1])
    model = operator_model(inputs=NAMES[:4])
    model.graph.ClearField("node")
    model.graph.node.append(choose)
    model.graph.input.append(helper.make_tensor_value_info("on", TensorProto.BOOL, []))
    session = session_of(add_function(model))
    x = operands(20, 0)
    given = {name: x[name] for name in NAMES[:4]}
    on, off = (session.run(None, {**given, "on": np.array(value)})[0] for value in (True, False))
    np.testing.assert_allclose(on, solved(x), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(off, x["f"])


def test_add_function_twice_adds_one_body() -> None:
    model = add_function(operator_model(inputs=NAMES[:4]))
    assert [f.name for f in model.functions] == ["FeedbackSolve"]
    assert [item.domain for item in model.opset_import] == ["", "sessa"]
    assert len(model.graph.node[-1].input) == len(NAMES)


def test_add_function_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(ValueError, match="opset 17"):
        operator_model(opset=17)
    plain = operator_model()
    plain.graph.node[0].op_type = "Other"
    with pytest.raises(ValueError, match=r"no sessa::FeedbackSolve node"):
        add_function(plain)


@pytest.mark.parametrize("opset", [None, 21, 23])
def test_torch_exporter_leaves_the_same_node(opset: int | None) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from sessa_torch.attention import rope_tables
    from sessa_torch.model import SessaLayer

    config = small_config("grouped")

    class Net(torch.nn.Module):
        """Somebody's model with one of our layers in it."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(3, config.hidden_size)
            self.layer = SessaLayer(config)
            self.outer = torch.nn.Linear(config.hidden_size, 2)

        def forward(self, x, seen):
            positions = torch.arange(x.shape[1])[None]
            rope = rope_tables(positions, config.head_dim, config.rope_theta, x.dtype)
            return self.outer(self.layer(self.inner(x), rope=rope, key_mask=seen))

    torch.manual_seed(0)
    net = Net().eval()
    program = torch.onnx.export(
        net,
        (torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)),
        dynamo=True,
        opset_version=opset,
        input_names=["x", "seen"],
        output_names=["y"],
        verbose=False,
        dynamic_shapes=({0: "batch", 1: "time"},) * 2,
    )
    model = add_function(program.model_proto)
    assert [n.op_type for n in model.graph.node if n.domain == "sessa"] == ["FeedbackSolve"]
    session = session_of(model)
    for rows, T in [(1, 1), (3, 2), (2, 129)]:
        x, seen = torch.randn(rows, T, 3), torch.rand(rows, T) > 0.3
        (y,) = session.run(None, {"x": x.numpy(), "seen": seen.numpy()})
        np.testing.assert_allclose(y, net(x, seen).detach().numpy(), rtol=0, atol=1e-5)
