"""The Triton divergence against fp64: in the interpreter without a GPU, compiled with one."""
import math

import pytest
import torch
from test_kernels_attention import Guarded, check_equal_bits_under_load
from test_kernels_logprob import DTYPES, GRADIENT, put
from test_ops_kl import each_kind, gradients, masked_by_hand, masked_in_both, problem, reference

from minir1.kernels import kl as kernel
from minir1.kernels import logprob
from minir1.ops import linear_kl


def triton(*inputs, **kw):
    return linear_kl(*inputs, impl="triton", **kw)


def upstream(N, seed=1):
    """Gradients that differ from token to token."""
    return put(torch.randn(N, generator=torch.Generator().manual_seed(seed)))[0]


def check(inputs, g, atol=1e-5, chunk_bytes=None, **kw):
    """Values and the student's gradients against fp64. Where js is near log 2 its slope is a small difference: there
    twice the error of the plain formula in fp32 is allowed."""
    dtype, exact = inputs[0].dtype, [x.double() for x in inputs]
    want = gradients(lambda *x: reference(*x, **kw), exact, g)
    theirs = gradients(lambda *x: reference(*x, **kw), [x.float() for x in inputs], g)
    have = gradients(lambda *x: triton(*x, chunk_bytes=chunk_bytes, **kw), inputs, g)
    assert have[0].dtype == torch.float32
    torch.testing.assert_close(have[0].double(), want[0], rtol=0, atol=atol)
    for a, b, c in zip(have[1:], want[1:], theirs[1:]):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.double() - b).norm() <= max(GRADIENT[dtype] * b.norm(), 2 * (c.double() - b).norm())
    return have


@pytest.mark.parametrize("N, V, temperature", [(0, 63, 1), (1, 1, 1), (31, 64, 0.7), (33, 65, 1.6), (129, 100, 1)])
@each_kind
def test_ragged_shapes(N, V, temperature, kind):
    """Up to two tiles of tokens and of the vocabulary in the interpreter, the last never full; widths are 24 and 40."""
    check(put(*problem(N, V, dtype=torch.float32)), upstream(N), temperature=temperature, kind=kind)


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.9])
def test_the_generalised_divergence(beta):
    check(put(*problem(33, 100, dtype=torch.float32)), upstream(33), kind="js", beta=beta, temperature=1.3)
    check(put(*problem(9, 70, dtype=torch.float32, size=30.0)), upstream(9), kind="js", beta=beta)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@each_kind
def test_16_bit_inputs(dtype, kind):
    """Nothing but the inputs, dx and the gradients is rounded; a model's dtype is its own."""
    inputs = problem(20, 70, dtype=dtype)
    check(put(*inputs), upstream(20), kind=kind)
    check(put(*(x.float() for x in inputs[:2]), *inputs[2:]), upstream(20), kind=kind)


@each_kind
def test_many_chunks_in_the_backward(kind):
    """One row and 128 columns at a time: dh and dw are summed over chunks."""
    check(put(*problem(2, 200, dtype=torch.float32)), upstream(2), chunk_bytes=1, kind=kind)


def test_by_hand():
    """Two vocabulary entries: p_s = (3/4, 1/4), p_t = (1/2, 1/2)."""
    inputs = put(torch.ones(1, 1), torch.tensor([[math.log(3)], [0.0]]), torch.ones(1, 1), torch.zeros(2, 1))
    to_m = lambda p: p * math.log(p / (5 / 8)) + (1 - p) * math.log((1 - p) / (3 / 8))
    want = dict(forward=math.log(4 / 3) / 2, reverse=0.75 * math.log(3) - math.log(2), js=(to_m(0.75) + to_m(0.5)) / 2)
    for kind, value in want.items():
        assert triton(*inputs, kind=kind).item() == pytest.approx(value, rel=2e-6)


def test_masked_entries():
    on_device = lambda *inputs, **kw: triton(*put(*inputs), **kw).cpu()
    masked_by_hand(on_device)
    masked_in_both(on_device)


@each_kind
def test_as_accurate_as_torch(kind):
    inputs = put(*problem(96, 500, D=(64, 64), dtype=torch.float32, size=4.0))
    exact = reference(*(x.double() for x in inputs), kind=kind)
    theirs = (reference(*inputs, kind=kind) - exact).norm()
    assert (triton(*inputs, kind=kind) - exact).norm() <= 1.2 * theirs


@pytest.mark.parametrize("V", [63, 130])
@each_kind
def test_padding_columns_add_nothing(V, kind):
    """All logits about -120: a column past V with logit 0 would dominate."""
    gen = torch.Generator().manual_seed(0)
    h = torch.full((3, 1), -1.0)
    inputs = put(h, 120 + torch.rand(V, 1, generator=gen), h, 120 + torch.rand(V, 1, generator=gen))
    kl, dh, dw = gradients(lambda *x: triton(*x, kind=kind), inputs, 1.0)
    want = gradients(lambda *x: reference(*x, kind=kind), [x.double() for x in inputs], 1.0)
    torch.testing.assert_close(kl.double(), want[0], rtol=0, atol=2e-5)
    assert (dh - want[1]).norm() <= 2e-6 * inputs[1].norm() and (dw - want[2]).norm() <= 1e-5


@each_kind
def test_large_logits_keep_their_digits(kind):
    """Maxima of 30,000 that move from tile to tile, forwards in one model and backwards in the other; logits are
    integers, which the products give exactly."""
    up = 29_000 + torch.arange(150.0).floor_divide(7)[:, None] * 40
    w_s, w_t = up + torch.arange(150.0)[:, None] % 3, up.flip(0) - 60_000 + torch.arange(150.0)[:, None] % 2
    w_t[-7:] = 30_000 + torch.arange(7.0)[:, None]  # the teacher's last entries are those of the student
    inputs = put(torch.ones(1, 1), w_s, torch.ones(1, 1), w_t)
    exact = reference(*(x.double() for x in inputs), kind=kind)
    torch.testing.assert_close(triton(*inputs, kind=kind).double(), exact, rtol=2e-7, atol=1e-6)
    pair = put(torch.ones(1, 1), torch.tensor([[3e4], [29999.0]]), torch.ones(1, 1), torch.tensor([[-3e4], [-29999.0]]))
    if kind != "js":  # (σ(1) - σ(-1)) · 1
        assert triton(*pair, kind=kind).item() == pytest.approx(math.tanh(0.5), abs=2e-7)


@each_kind
def test_the_same_model_is_at_zero_with_no_slope(kind):
    h, w, *_ = put(*problem(33, 130, dtype=torch.float32))
    kl, dh, dw = gradients(lambda *x: triton(*x, kind=kind), (h, w, h, w), torch.ones(33, device=h.device))
    assert kl.abs().max() <= 1e-6 and dh.abs().max() <= 1e-5 and dw.abs().max() <= 1e-5


@each_kind
def test_distributions_far_apart_stay_finite(kind):
    """Entries to which fp32 gives probability 0: no 0 · ∞."""
    inputs = put(*problem(20, 130, dtype=torch.float32, size=60.0))
    for x in gradients(lambda *x: triton(*x, kind=kind), inputs, upstream(20)):
        assert x.isfinite().all()


@each_kind
def test_a_repeated_call_gives_equal_bits(kind):
    inputs = put(*problem(40, 130, dtype=torch.float32))
    first, second = (gradients(lambda *x: triton(*x, kind=kind), inputs, upstream(40)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("frozen", ["h", "w"])
@each_kind
def test_one_input_and_the_gradient_of_a_sum(frozen, kind):
    """Whose stride is 0. The teacher gets no gradient, though it asks for one."""
    h, w, *teacher = put(*problem(9, 40, dtype=torch.float32))
    x = (w if frozen == "h" else h).requires_grad_()
    teacher = [each.requires_grad_() for each in teacher]
    (have,) = torch.autograd.grad(triton(h, w, *teacher, kind=kind).sum(), x)
    (want,) = torch.autograd.grad(reference(*(a.double() for a in (h, w, *teacher)), kind=kind).sum(), x)
    assert (have - want).norm() <= 4e-6 * want.norm()
    with pytest.raises(RuntimeError, match="unused|not have been used"):
        torch.autograd.grad(triton(h, w, *teacher, kind=kind).sum(), teacher[0])


@pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's, where the interpreter meets an infinity
@each_kind
def test_reads_and_writes_only_its_own(monkeypatch, kind):
    """Inputs, not contiguous, are surrounded by infinities; outputs are NaN before and lie between guards."""
    around = []
    for i, x in enumerate(put(*problem(33, 130, dtype=torch.float32))):
        x = x if i % 2 == 0 else x.T  # a matrix of weights lies transposed, every second number of a state is another's
        wide = x.new_full((len(x) + 2, 2 * x.shape[1] + 4), float("inf"))
        inside = wide[1:-1, 2:-2:2].copy_(x)
        around.append(inside if i % 2 == 0 else inside.T)
    monkeypatch.setattr(kernel, "torch", guarded := Guarded())
    monkeypatch.setattr(logprob, "torch", guarded)
    check(around, upstream(33), kind=kind)
    assert len(guarded.all) == 2  # five numbers per token, dx
    assert guarded.intact() and all(x.isfinite().all() for x in guarded.all)


@pytest.mark.parametrize("stretched", range(4))
def test_stride_0_is_read_as_it_is(stretched):
    inputs = put(*problem(9, 30, dtype=torch.float32))
    inputs[stretched] = inputs[stretched][:1].expand_as(inputs[stretched])
    exact = reference(*(x.double() for x in inputs))
    torch.testing.assert_close(triton(*inputs).double(), exact, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- with a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@each_kind
def test_gpu_numerics(dtype, kind):
    """At a size with several tiles and chunks: values to 1e-4; the cap on dx splits the tokens too."""
    inputs = put(*problem(1500, 9000, D=(256, 384), dtype=dtype))
    check(inputs, upstream(1500), atol=1e-4, chunk_bytes=8 << 20, kind=kind, temperature=1.3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:])
@each_kind
def test_gpu_16_bit_gradients_are_as_good_as_torch_has_them(dtype, kind):
    inputs, g = put(*problem(512, 9000, D=(256, 384), dtype=dtype)), upstream(512)
    want = gradients(lambda *x: reference(*x, kind=kind), [x.double() for x in inputs], g)
    theirs = gradients(lambda *x: reference(*x, kind=kind).float(), inputs, g)
    ours = gradients(lambda *x: triton(*x, kind=kind), inputs, g)
    for a, b, exact in zip(ours, theirs, want):
        assert (a - exact).norm() <= 1.5 * (b - exact).norm()


@pytest.mark.gpu
@each_kind
def test_gpu_many_tokens_and_a_large_dx(kind):
    """More rows than a grid axis has (65535 blocks would do): 300,000 tokens, 9,000 entries, dx of 2.7e9 elements."""
    inputs, g = put(*problem(300_000, 9000, D=(16, 16), dtype=torch.bfloat16)), upstream(300_000)
    kl, dh, dw = gradients(lambda *x: triton(*x, kind=kind, chunk_bytes=6 << 30), inputs, g)
    tail = slice(-500, None)
    rows = [x[tail].double() if i % 2 == 0 else x.double() for i, x in enumerate(inputs)]
    want = gradients(lambda *x: reference(*x, kind=kind), rows, g[tail])
    assert (kl[tail] - want[0]).abs().max() <= 1e-4
    assert (dh[tail] - want[1]).norm() <= GRADIENT[torch.bfloat16] * want[1].norm()
    pieces = gradients(lambda *x: triton(*x, kind=kind), inputs, g)[2]
    assert (dw.double() - pieces.double()).norm() <= 1e-2 * dw.double().norm()


@pytest.mark.gpu
@each_kind
def test_gpu_races(kind):
    inputs, g = put(*problem(3000, 20_000, D=(256, 256), dtype=torch.bfloat16)), upstream(3000)
    check_equal_bits_under_load(lambda: gradients(lambda *x: triton(*x, kind=kind), inputs, g), 20)
