"""linear_kl against its reference implementation in fp64, differentiated by autograd."""
import math

import pytest
import torch
from test_ops import Largest

from minir1.ops import linear_kl
from minir1.ops.reference import linear_kl as reference

KINDS = ["forward", "reverse", "js"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def problem(N, V=67, D=(24, 40), dtype=torch.float64, size=3.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    made = []
    for d in D:
        made.append(torch.randn(N, d, generator=gen, dtype=torch.float64))
        made.append(torch.randn(V, d, generator=gen, dtype=torch.float64) * size / d**0.5)
    return [x.to(dtype) for x in made]


def gradients(f, inputs, g):
    """Values, and gradients of the student."""
    h, w = (x.detach().requires_grad_() for x in inputs[:2])
    kl = f(h, w, *inputs[2:])
    return (kl.detach(), *torch.autograd.grad((kl * g).sum(), (h, w)))


@each_kind
@pytest.mark.parametrize("N, V, chunk_bytes", [(0, 67, 1), (1, 67, None), (33, 67, 1), (33, 1100, None), (9, 1100, 1)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(N, V, chunk_bytes, kind, temperature):
    """One chunk, and one row per chunk; upstream gradients that differ."""
    inputs = problem(N, V)
    g = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = gradients(lambda *x: reference(*x, temperature, kind), inputs, g)
    have = gradients(lambda *x: linear_kl(*x, temperature, kind, chunk_bytes=chunk_bytes), inputs, g)
    for a, b in zip(have, want):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_generalised_divergence(beta, temperature):
    """Against its definition; near its ends it is β·KL(T‖S) and (1-β)·KL(S‖T) to first order."""
    inputs = problem(33)
    g = torch.randn(33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = gradients(lambda *x: reference(*x, temperature, "js", beta), inputs, g)
    have = gradients(lambda *x: linear_kl(*x, temperature, "js", beta, chunk_bytes=10 * 67 * 8), inputs, g)
    for a, b in zip(have, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    near, close = 1e-7, problem(33, size=1.0)
    for kind, share in (("forward", near), ("reverse", 1 - near)):
        limit = linear_kl(*close, temperature, kind)
        torch.testing.assert_close(linear_kl(*close, temperature, "js", share) / near, limit, rtol=1e-4, atol=1e-6)
    swapped = linear_kl(*inputs[2:], *inputs[:2], temperature, "js", 1 - beta)  # the mixture is the same
    torch.testing.assert_close(have[0], swapped)
    for bad in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="beta="):
            linear_kl(*inputs, temperature, "js", bad)


@each_kind
def test_two_backward_passes(kind):
    """They give the same bits, and the second does not overwrite the first gradients."""
    for chunk_bytes in (None, 10 * 67 * 8):
        inputs = problem(33)
        leaves = [x.requires_grad_() for x in inputs[:2]]
        loss = linear_kl(*inputs, kind=kind, chunk_bytes=chunk_bytes).square().sum()
        (of_h,) = torch.autograd.grad(loss, leaves[0], retain_graph=True)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        copies = [x.clone() for x in first]
        second = torch.autograd.grad(loss, leaves)
        assert torch.equal(of_h, copies[0])
        assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(copies, first, second))


@each_kind
def test_any_chunk_gives_the_same_gradients(kind):
    inputs = problem(39, 71, D=(24, 10))
    leaves = [x.requires_grad_() for x in inputs[:2]]
    f = lambda budget: linear_kl(*inputs, kind=kind, chunk_bytes=budget).square().sum()
    want = torch.autograd.grad(f(None), leaves)
    for rows in range(1, 41):
        torch.testing.assert_close(torch.autograd.grad(f(rows * 71 * 8), leaves), want)


@each_kind
def test_repeated_calls_give_the_same_bits(kind):
    inputs, g = problem(300, 500, dtype=torch.float32), torch.ones(300)
    run = lambda: gradients(lambda *x: linear_kl(*x, 0.9, kind, chunk_bytes=64 * 500 * 4), inputs, g)
    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


@each_kind
def test_never_holds_N_by_V(kind):
    """Logits of one chunk at a time; only the slope of the last is saved."""
    N, V, rows = 4096, 700, 500
    inputs = problem(N, V, D=(4, 4), dtype=torch.float32)
    leaves = [x.requires_grad_() for x in inputs[:2]]
    with Largest() as largest:
        kl = linear_kl(*inputs, kind=kind, chunk_bytes=rows * V * 4)
        assert kl.grad_fn.saved_tensors[-1].nbytes == N % rows * V * 4
        torch.autograd.grad(kl.sum(), leaves)
    assert largest.bytes <= rows * V * 4 < N * V * 4 / 8


def test_there_is_no_second_derivative():
    inputs = problem(5)
    kl = linear_kl(inputs[0].requires_grad_(), *inputs[1:])
    with pytest.raises(RuntimeError, match="create_graph=True: .* no second derivative"):
        torch.autograd.grad(kl.sum(), inputs[0], create_graph=True)


@pytest.mark.parametrize("of", [linear_kl, reference])
def test_by_hand(of):
    """Two vocabulary entries: p_s = (3/4, 1/4), p_t = (1/2, 1/2)."""
    one = torch.ones(1, 1, dtype=torch.float64)
    s, t = torch.tensor([[math.log(3)], [0.0]]).double(), torch.zeros(2, 1).double()
    kl = {kind: of(one, s, one, t, kind=kind).item() for kind in KINDS}
    assert kl["forward"] == pytest.approx(math.log(4 / 3) / 2, rel=1e-6)
    assert kl["reverse"] == pytest.approx(0.75 * math.log(3) - math.log(2), rel=1e-6)
    to_m = lambda p: p * math.log(p / (5 / 8)) + (1 - p) * math.log((1 - p) / (3 / 8))
    assert kl["js"] == pytest.approx((to_m(0.75) + to_m(0.5)) / 2, rel=1e-6)


def masked_by_hand(of):
    """Entries with logit -inf. p_s = (3/4, 1/4, 0), p_t = (1/2, 1/2, 0) as without the third; then (1/2, 1/4, 1/4)
    against (1/2, 1/2, 0), whose mixture is (1/2, 3/8, 1/8), and the other way round."""
    ln, inf = math.log, math.inf
    to_m = lambda p: p * ln(p / (5 / 8)) + (1 - p) * ln((1 - p) / (3 / 8))
    both = dict(forward=ln(4 / 3) / 2, reverse=0.75 * ln(3) - ln(2), js=(to_m(0.75) + to_m(0.5)) / 2)
    js = (0.25 * ln(2 / 3) + 0.25 * ln(2) + 0.5 * ln(4 / 3)) / 2
    three, two = (ln(2), 0.0, 0.0), (0.0, 0.0, -inf)
    for student, teacher, want in (
        ((ln(3), 0.0, -inf), two, both),
        (three, two, dict(forward=ln(2) / 2, reverse=inf, js=js)),
        (two, three, dict(forward=inf, reverse=ln(2) / 2, js=js)),
    ):
        inputs = [torch.ones(1, 1), torch.tensor(student)[:, None], torch.ones(1, 1), torch.tensor(teacher)[:, None]]
        for kind in KINDS:
            kl, dh, dw = gradients(lambda *x: of(*x, kind=kind), inputs, 1.0)
            assert kl.item() == pytest.approx(want[kind], rel=1e-5), (student, kind)
            if kl.isfinite() and of is not reference:  # whose product with the weights is torch's
                assert dh.isfinite().all() and dw.isfinite().all() and abs(dw.sum().item()) < 1e-6
                assert not dw[torch.tensor(student).isinf()].any()
    kl, dh, dw = gradients(lambda *x: of(*x, kind="reverse"), inputs, 1.0)  # p_s (log p_s/p_t - KL): ± log 2 / 4
    assert dw.flatten().tolist() == pytest.approx([-ln(2) / 4, ln(2) / 4, 0.0], rel=1e-5)
    low = torch.zeros(200, 1).index_fill(0, torch.arange(64), -300.0)  # in fp32 their p is 0, but not among themselves
    for kind in KINDS:
        inputs = torch.ones(1, 1), low.masked_fill(low < 0, -inf), torch.ones(1, 1), low
        assert abs(of(*inputs, kind=kind).item()) < 1e-6, kind


@pytest.mark.parametrize("of", [linear_kl, reference])
def test_masked_entries_by_hand(of):
    masked_by_hand(of)


def masked_in_both(of, chunk_bytes=None):
    """Of 300 entries 153 are masked in both models, whole tiles of them: the result is that of the other 147."""
    for N in (1, 33):
        h_s, w_s, h_t, w_t = problem(N, 300, dtype=torch.float32)
        h_s, h_t, keep = h_s.abs(), h_t.abs(), torch.ones(300, dtype=torch.bool)
        keep[:70] = keep[100:170] = keep[200:210] = keep[297:] = False
        large = [w.masked_fill(~keep[:, None], -math.inf) for w in (w_s, w_t)]
        large[1][100:170, 1:] = 0.5  # one -inf of a row is enough
        g = torch.randn(N, generator=torch.Generator().manual_seed(1))
        for kind in KINDS:
            f = lambda *x: of(*x, kind=kind, temperature=0.7, chunk_bytes=chunk_bytes)
            want = gradients(f, (h_s, w_s[keep], h_t, w_t[keep]), g)
            kl, dh, dw = gradients(f, (h_s, large[0], h_t, large[1]), g)
            for a, b in zip((kl, dh, dw[keep]), want):
                assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6
            assert not dw[~keep].any()


@pytest.mark.parametrize("chunk_bytes", [None, 10 * 300 * 4])
def test_a_masked_vocabulary_is_the_smaller_one(chunk_bytes):
    masked_in_both(linear_kl, chunk_bytes)


@each_kind
def test_gradcheck(kind):
    h_s, w_s, h_t, w_t = problem(3, V=5, D=(3, 2))
    f = lambda h, w: linear_kl(h, w, h_t, w_t, 1.3, kind)
    assert torch.autograd.gradcheck(f, (h_s.requires_grad_(), w_s.requires_grad_()))


@each_kind
def test_the_same_model_is_at_zero_with_no_slope(kind):
    h, w, *_ = problem(50, dtype=torch.float32)
    kl, dh, dw = gradients(lambda *x: linear_kl(*x, kind=kind), (h, w, h, w), torch.ones(50))
    assert kl.abs().max() <= 1e-6 and dh.abs().max() <= 1e-5 and dw.abs().max() <= 1e-5


def test_js_is_symmetric_and_at_most_log_2():
    inputs = problem(40, size=30.0)
    kl = linear_kl(*inputs, kind="js")
    torch.testing.assert_close(kl, linear_kl(*inputs[2:], *inputs[:2], kind="js"))
    assert (kl >= 0).all() and (kl <= math.log(2) + 1e-12).all() and kl.max() > 0.6


@each_kind
def test_distributions_far_apart_stay_finite(kind):
    """Entries to which fp32 gives probability 0: no 0 · ∞."""
    inputs = problem(20, 600, dtype=torch.float32, size=60.0)
    for x in gradients(lambda *x: linear_kl(*x, kind=kind), inputs, torch.ones(20)):
        assert x.isfinite().all()


@each_kind
def test_fp32_accuracy(kind):
    """Values no further from fp64 than the plain formula's in fp32 (or about an ulp); gradients to 2e-6 or, where js
    is near log 2 and its slope a small difference, no further than the plain formula's.
    """
    inputs = problem(300, 1000, D=(64, 64), dtype=torch.float32)
    for seed in range(3):
        g = torch.randn(300, generator=torch.Generator().manual_seed(seed))
        exact = gradients(lambda *x: reference(*x, kind=kind), [x.double() for x in inputs], g.double())
        theirs = gradients(lambda *x: reference(*x, kind=kind), inputs, g)
        ours = gradients(lambda *x: linear_kl(*x, kind=kind), inputs, g)
        ours, theirs = ([(a - b).norm() / b.norm() for a, b in zip(results, exact)] for results in (ours, theirs))
        assert ours[0] <= max(1.2 * theirs[0], 2e-7)
        assert all(a <= max(2e-6, b) for a, b in zip(ours[1:], theirs[1:]))


@each_kind
def test_bf16_inputs_give_fp32_logits(kind):
    inputs = problem(40, 700, dtype=torch.bfloat16)
    exact = gradients(lambda *x: reference(*x, kind=kind), [x.double() for x in inputs], torch.ones(40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(lambda *x: linear_kl(*x, kind=kind), inputs, torch.ones(40))
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == torch.bfloat16
    assert (ours[0] - exact[0]).abs().max() <= 1e-4
    for a, b in zip(ours[1:], exact[1:]):
        assert (a - b).norm() <= 5e-3 * b.norm()


def test_strides():
    """Columns of something wider, a transposed matrix, and the stride-0 gradient of a sum."""
    inputs = problem(33)
    want = gradients(lambda *x: reference(*x), inputs, 1.0)
    wider = torch.zeros(33, 50, dtype=torch.float64)
    wider[:, 1:49:2] = inputs[0]
    odd = [wider[:, 1:49:2], inputs[1].T.contiguous().T, inputs[2], inputs[3].T.contiguous().T]
    h, w = odd[0].detach().requires_grad_(), odd[1].detach().requires_grad_()
    for a, b in zip(torch.autograd.grad(linear_kl(h, w, *odd[2:]).sum(), (h, w)), want[1:]):
        torch.testing.assert_close(a, b)


def test_the_teacher_gets_no_gradient():
    h, w, *_ = problem(5)
    h, w = h.requires_grad_(), w.requires_grad_()
    dh, dw = torch.autograd.grad(linear_kl(h + 1, w, h, w, kind="reverse").sum(), (h, w))
    want = gradients(lambda *x: linear_kl(x[0] + 1, *x[1:], kind="reverse"), (h, w, h.detach(), w.detach()), 1.0)
    assert torch.equal(dh, want[1]) and torch.equal(dw, want[2])
    with pytest.raises(RuntimeError, match="does not require grad"):
        linear_kl(h.detach(), w.detach(), h, w).sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kind="kl"), "kind='kl': choose one of forward, reverse, js"),
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(chunk_bytes=0), "chunk_bytes=0"),
        (dict(impl="triton", w_s=torch.zeros(67, 24).bfloat16()), "impl='triton': "),
        (dict(impl="triton", w_t=torch.zeros(67, 40).bfloat16()), "impl='triton': "),
        (dict(impl="fast"), "impl='fast'"),
        (dict(h_t=torch.zeros(5, 40)), r"h_t \(5, 40\)"),
        (dict(w_t=torch.zeros(66, 40)), r"w_t \(66, 40\)"),
        (dict(w_s=torch.zeros(67, 40)), r"w_s \(67, 40\)"),
        (dict(h_s=torch.zeros(24)), r"h_s \(24,\)"),
        (dict(h_s=torch.zeros(6, 24, dtype=torch.int64)), "h_s torch.int64"),
        (dict(h_t=torch.zeros(6, 40, device="meta")), "h_t meta"),
    ],
)
def test_errors_name_the_value(change, message):
    names = ("h_s", "w_s", "h_t", "w_t")
    with pytest.raises(ValueError, match=message):
        linear_kl(**{**dict(zip(names, problem(6, dtype=torch.float32))), **change})


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda(kind, dtype):
    inputs = [x.cuda() for x in problem(5000, 5000, dtype=dtype)]
    g = torch.randn(5000, device="cuda")
    exact = gradients(lambda *x: reference(*x, kind=kind), [x.double() for x in inputs], g)
    for budget in (1, None):
        ours = gradients(lambda *x: linear_kl(*x, kind=kind, impl="torch", chunk_bytes=budget), inputs, g)
        assert (ours[0] - exact[0]).abs().max() <= 1e-4
        for a, b in zip(ours[1:], exact[1:]):
            assert (a - b).norm() <= (2e-6 if dtype == torch.float32 else 5e-3) * b.norm()
