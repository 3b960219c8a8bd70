"""The Triton kernels compiled for a CUDA device, against float64; skipped where there is none.

The first run compiles for minutes. Timings and errors of more sizes are in benchmarks/.
"""

from __future__ import annotations

import pytest
import torch

from sessa_torch._documents import document_attention
from sessa_torch.attention import apply_rope, rope_tables
from sessa_torch.feedback import blocked, feedback_solve
from sessa_torch.loss import weighted_loss

if not torch.cuda.is_available():
    pytest.skip("PyTorch finds no CUDA device here", allow_module_level=True)

# Relative errors; the first tile sizes are those of narrow states, the second of wide ones.
LIMITS = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
NARROW, WIDE = (72, 40), (1024, 1024)


def draw(dtype, T, widths=NARROW, B=2, P=0, hidden=0.0, gamma=None, logits=4.0):
    """f, q, k, gamma, past_s (None without a past), the key mask (None for no hidden keys), ds."""
    generator = torch.Generator("cuda").manual_seed(T + P)
    D, K = widths

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    f, q, k, past, ds = normal(B, T, D), normal(B, T, K), normal(B, P + T, K), None, normal(B, T, D)
    q *= logits / (q @ k.mT * K**-0.5).abs().max()
    if P:
        past = normal(B, P, D).to(dtype)
    gains = torch.rand(B, T, generator=generator, device="cuda") * 1.998 - 0.999
    if gamma is not None:
        gains.fill_(gamma)
    mask = torch.rand(B, P + T, generator=generator, device="cuda") >= hidden if hidden else None
    return *(x.to(dtype) for x in (f, q, k)), gains, past, mask, ds.to(dtype)


def solve_and_gradients(f, q, k, gamma, past, mask, ds):
    leaves = [x.detach().requires_grad_() for x in (f, q, k, gamma, past) if x is not None]
    past = leaves[4] if past is not None else None
    s = feedback_solve(*leaves[:4], past_s=past, key_mask=mask, backend="kernel")
    return [s.detach(), *torch.autograd.grad(s, leaves, ds)]


def assert_right(inputs, dtype):
    f, q, k, gamma, past, mask, ds = (
        x if x is None or x.dtype == torch.bool else x.double() for x in inputs
    )
    s, lse = blocked.solve_forward(f, q, k, gamma, past, mask)
    wanted = [s, *blocked.solve_backward(ds, q, k, gamma, s, lse, past, mask)]
    # What is freed is what the workspaces are made of.
    junk = torch.full((2**28,), torch.nan, device="cuda")
    del junk
    names = ("s", "df", "dq", "dk", "dgamma", "dpast_s")
    for name, got, want in zip(names, solve_and_gradients(*inputs), wanted, strict=False):
        error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
        assert error <= LIMITS[dtype], (name, error.item())


@pytest.mark.parametrize("T", [1, 8, 63, 64, 65, 127, 128, 129, 257, 700])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_lengths_around_the_tiles(dtype, T):
    assert_right(draw(dtype, T), dtype)
    assert_right(draw(dtype, T, P=150, hidden=0.3), dtype)


@pytest.mark.parametrize("T", [255, 256, 513])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_wide_states(dtype, T):
    assert_right(draw(dtype, T, WIDE, B=1), dtype)
    assert_right(draw(dtype, T, WIDE, B=1, P=129), dtype)


@pytest.mark.parametrize(
    "change",
    [
        {"gamma": 0.0},
        {"gamma": 0.999},
        {"gamma": -0.999},
        {"logits": 80.0},
        {"hidden": 1.0},
        {"B": 150},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_what_inputs_may_be(dtype, change):
    assert_right(draw(dtype, 300, **change), dtype)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_inputs_that_lie_in_other_ways(dtype):
    f, q, k, gamma, past, mask, ds = draw(dtype, 200, P=33, hidden=0.3)
    inputs = (
        f.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([f, q], -1)[..., f.shape[-1] :],
        k.repeat_interleave(2, -1)[..., ::2],
        gamma[:1, :1].expand_as(gamma),
        past.mT.contiguous().mT,
        mask.mT.contiguous().mT,
        ds[:, :, :1].expand_as(ds),
    )
    assert_right(inputs, dtype)
    odd = [torch.nn.functional.pad(x, (1, 0))[..., 1:] for x in inputs[:3]]
    assert_right((*odd, *inputs[3:]), dtype)


MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
]


def draw_caches(T, P, widths, keys, states, room=70):
    """f, q, gamma and a mask; buffers of keys and states whose first rows are the past."""
    f, q, k, gamma, past, mask, _ = draw(torch.float32, T, widths, P=P + room, hidden=0.3)
    k, past, q = k.to(keys), past.to(states), q.to(keys)
    gamma[:, ::3] = 0
    k[~mask], past[~mask[:, : P + room]] = torch.nan, torch.inf
    return f, q, k, gamma, past, mask


def exact_behind(P, f, q, k, gamma, past, mask):
    """s in float64 behind the first P rows of the caches, with zeros where keys are hidden."""
    seen = mask[:, : P + f.shape[1], None]
    k = k[:, : P + f.shape[1]].double().masked_fill(~seen, 0)
    past = past[:, :P].double().masked_fill(~seen[:, :P], 0)
    return blocked.solve_forward(f.double(), q.double(), k, gamma.double(), past, seen[..., 0])[0]


@pytest.mark.parametrize("T", [1, 2, 16])
@pytest.mark.parametrize("types", MIXED, ids=str)
@pytest.mark.parametrize("widths", [NARROW, (1100, 1000), (2500, 80)])
def test_decoding_reads_caches_of_any_types(widths, types, T):
    for P in (1, 64, 500, 3001):
        f, q, k, gamma, past, mask = given = draw_caches(T, P, widths, *types)
        want = exact_behind(P, *given)
        behind = {"past_s": past[:, :P], "key_mask": mask[:, : P + T]}
        exact = T == 1 or types[1] == torch.float32
        for precision, limit in (("auto", 5e-6 if exact else 5e-3), ("float32", 5e-6)):
            s = feedback_solve(f, q, k[:, : P + T], gamma, **behind, precision=precision)
            assert s.dtype == torch.float32
            assert (s.double() - want).norm() <= limit * want.norm()
            assert torch.equal(s[gamma == 0], f[gamma == 0])


@pytest.mark.parametrize("T", [1, 3])
def test_a_captured_graph_follows_a_growing_cache(T):
    from sessa_torch.feedback.cuda_decode import solve_few_rows

    given = draw_caches(T, 0, (72, 40), *MIXED[0], room=900)
    length = torch.zeros((), dtype=torch.int32, device="cuda")
    solve_few_rows(*given, length=length)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        s, _ = solve_few_rows(*given, length=length)
    for P in (0, 1, 63, 64, 500, 900):
        length.fill_(P)
        graph.replay()
        want = exact_behind(P, *given)
        assert (s.double() - want).norm() <= 5e-6 * want.norm(), P


@pytest.mark.parametrize("T", [17, 129, 400])
@pytest.mark.parametrize("types", MIXED[:2], ids=str)
@pytest.mark.parametrize("widths", [NARROW, WIDE])
def test_pieces_of_a_prompt_with_16_bit_products(widths, types, T):
    for P in (0, 1, 127, 128, 500):
        f, q, k, gamma, past, mask, _ = draw(torch.float32, T, widths, P=P, hidden=0.3)
        q, k = q.to(types[0]), k.to(types[0])
        gamma[:, ::3] = 0
        exact = (x if x is None else x.double() for x in (f, q, k, gamma, past))
        want, _ = blocked.solve_forward(*exact, mask)
        k[~mask] = torch.nan
        if P:
            past[~mask[:, :P]] = torch.inf
        for precision, limit in (("auto", 5e-3), ("float32", 5e-6)):
            s = feedback_solve(f, q, k, gamma, past_s=past, key_mask=mask, precision=precision)
            assert s.dtype == torch.float32
            assert (s.double() - want).norm() <= limit * want.norm(), (P, precision)
            assert torch.equal(s[gamma == 0], f[gamma == 0])


def test_float32_can_be_rounded_and_16_bits_widened():
    f, q, k, gamma, past, mask, _ = draw(torch.float32, 300, P=150, hidden=0.3)
    exact = blocked.solve_forward(*(x.double() for x in (f, q, k, gamma, past)), mask)[0]
    errors = [
        ((feedback_solve(f, q, k, gamma, past_s=past, key_mask=mask, precision=p) - exact).norm())
        for p in ("auto", "bfloat16")
    ]
    assert errors[0] <= 5e-6 * exact.norm() < 100 * errors[0] < errors[1] <= 1e-2 * exact.norm()
    low = [x.bfloat16() for x in (f, q, k)]
    exact = blocked.solve_forward(*(x.double() for x in (*low, gamma, past)), mask)[0]
    s = feedback_solve(*low, gamma, past_s=past, key_mask=mask, precision="float32")
    assert torch.equal(s, exact.bfloat16()) or (s - exact).norm() <= 2**-8 * exact.norm()


@pytest.mark.parametrize("widths", [NARROW, WIDE])
def test_the_same_inputs_give_the_same_bits(widths):
    inputs = draw(torch.bfloat16, 1500, widths, P=40)
    first = solve_and_gradients(*inputs)
    for _ in range(3):
        for got, want in zip(solve_and_gradients(*inputs), first, strict=True):
            assert torch.equal(got, want)


def test_opcheck_and_a_whole_graph():
    f, q, k, gamma, past, mask, ds = draw(torch.bfloat16, 130, P=33, hidden=0.3)
    leaves = [x.requires_grad_() for x in (f, q, k, gamma, past)]
    torch.library.opcheck(
        torch.ops.sessa.feedback_solve.default,
        (*leaves, mask, None, "kernel"),
        atol=0,
        rtol=0,
    )
    compiled = torch.compile(
        lambda f, q, k, gamma, past: feedback_solve(f, q, k, gamma, past_s=past, key_mask=mask),
        fullgraph=True,
    )
    got = torch.autograd.grad(compiled(*leaves), leaves, ds)
    for x, y in zip(got, solve_and_gradients(*leaves, mask, ds)[1:], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("d", [64, 80])
def test_rotation_equals_the_framework_operations(dtype, d):
    positions = torch.randint(0, 10**5, (2, 77), device="cuda")
    rope = rope_tables(positions, d, 1e4, dtype)
    x = torch.randn(2, 77, 3, d, device="cuda").to(dtype).transpose(1, 2).requires_grad_()
    dy = torch.randn(2, 3, 77, d, device="cuda").to(dtype)
    exact = x.detach().cpu().double().requires_grad_()
    wanted = apply_rope(exact, tuple(table.cpu().double() for table in rope))
    (dx,) = torch.autograd.grad(wanted, exact, dy.cpu().double())
    got = apply_rope(x, rope)
    limit = torch.finfo(dtype).eps
    for value, want in ((got, wanted), (torch.autograd.grad(got, x, dy)[0], dx)):
        assert (value.detach().cpu().double() - want).norm() <= limit * want.norm()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_loss_equals_that_of_float64(dtype, limit):
    hidden, head = (torch.randn(n, 64, device="cuda") for n in (70, 5003))
    leaves = [hidden[None].to(dtype).requires_grad_(), (head / 8).requires_grad_()]
    targets, weights = torch.randint(0, 5003, (1, 70), device="cuda"), torch.rand(1, 70).cuda()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    losses = torch.nn.functional.cross_entropy(
        (exact[0] @ exact[1].T)[0], targets[0], reduction="none"
    )
    wanted = (losses * weights[0]).sum()
    for function in (weighted_loss, torch.compile(weighted_loss, fullgraph=True)):
        got = function(*leaves, targets, weights)
        pairs = zip(
            torch.autograd.grad(got, leaves),
            torch.autograd.grad(wanted, exact, retain_graph=True),
            strict=True,
        )
        for value, want in ((got, wanted), *pairs):
            assert (value.double() - want).norm() <= limit * want.norm()


def test_compiled_attention_keeps_the_documents_of_several_sequences_apart():
    B, T, ends = 3, 2048, (90, 790, 1500)
    starts = torch.zeros(B, T, dtype=torch.int64, device="cuda")
    for b in range(B):
        for end in ends:
            starts[b, end + 64 * b :] = end + 64 * b
    q, k, v, dout = torch.randn(4, B, 4, T, 64, device="cuda", dtype=torch.bfloat16)

    def attended(attend, *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = attend(*leaves, starts)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    compiled = torch.compile(document_attention, fullgraph=True, dynamic=False)
    wanted = attended(document_attention, *(x.double() for x in (q, k, v)))
    for got, want in zip(attended(compiled, q, k, v), wanted, strict=True):
        assert (got - want).norm() / want.norm() < 1e-2
