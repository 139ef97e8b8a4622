"""linear_logprob against its reference implementation in fp64, differentiated by autograd."""
import math
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minir1.ops import linear_logprob
from minir1.ops import reference as definition
from minir1.ops.chunks import token_chunks

IGNORE = -100
SETTINGS = [
    {},
    dict(temperature=0.7),
    dict(softcap=2.5),
    dict(logit_scale=0.4),
    dict(temperature=1.6, softcap=3.0, logit_scale=1.7),
]


def reference(h, w, target, **kw):
    """The definition, and 0 where the target is ignored."""
    counted = target != IGNORE
    return tuple(torch.where(counted, x, 0.0) for x in definition.linear_logprob(h, w, target.clamp(min=0), **kw))


def problem(N, D=24, V=67, dtype=torch.float64, size=3.0, ignored=0.2, seed=0):
    gen = torch.Generator().manual_seed(seed)
    h = torch.randn(N, D, generator=gen, dtype=torch.float64)
    w = torch.randn(V, D, generator=gen, dtype=torch.float64) * size / D**0.5
    target = torch.randint(0, V, (N,), generator=gen)
    target[torch.rand(N, generator=gen) < ignored] = IGNORE
    return h.to(dtype), w.to(dtype), target


def gradients(f, h, w, g, g_H):
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    logp, ent = f(h, w)
    return (logp.detach(), ent.detach(), *torch.autograd.grad((logp * g).sum() + (ent * g_H).sum(), (h, w)))


@pytest.mark.parametrize("chunk_bytes", [None, 10 * 67 * 8, 1])  # all rows, ten rows, one row per chunk
@pytest.mark.parametrize("kw", SETTINGS)
@pytest.mark.parametrize("N", [0, 1, 31, 33, 129])
def test_values_and_gradients_of_both_outputs(N, kw, chunk_bytes):
    h, w, target = problem(N)
    g, g_H = torch.randn(2, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = gradients(lambda h, w: reference(h, w, target, **kw), h, w, g, g_H)
    kw = dict(kw, entropy=True, chunk_bytes=chunk_bytes)
    have = gradients(lambda h, w: linear_logprob(h, w, target, **kw), h, w, g, g_H)
    for a, b in zip(have, want):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_gradcheck(chunk_bytes):
    h, w, target = problem(4, D=3, V=5)
    kw = dict(temperature=1.3, softcap=2.0, entropy=True, chunk_bytes=chunk_bytes)
    f = lambda h, w: linear_logprob(h, w, target, **kw)
    assert torch.autograd.gradcheck(f, (h.requires_grad_(), w.requires_grad_()))


@pytest.mark.parametrize("of", [linear_logprob, definition.linear_logprob])
def test_by_hand(of):
    """D = 1: z = softcap(scale · h w) / temperature, in that order; two vocabulary entries."""
    h, w, target = torch.tensor([[1.0]]), torch.tensor([[2.0], [-1.0]]), torch.tensor([0])
    z = [3 * math.tanh(0.5 * x / 3) / 0.25 for x in (2.0, -1.0)]
    p = 1 / (1 + math.exp(z[1] - z[0]))
    how = dict(entropy=True) if of is linear_logprob else {}
    logp, ent = of(h, w, target, temperature=0.25, softcap=3.0, logit_scale=0.5, **how)
    assert logp.item() == pytest.approx(math.log(p), rel=1e-5)
    assert ent.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-5)


def masked_by_hand(of, **how):
    """p = (3/4, 1/4, 0, 0): entries with logit -inf add nothing to the entropy, and a target among them has p = 0."""
    h, w = torch.ones(3, 1, requires_grad=True), torch.tensor([math.log(3), 0.0, -math.inf, -math.inf])[:, None]
    logp, ent = of(h, w.requires_grad_(), torch.tensor([0, 1, 3]), **how)
    H = 2 * math.log(2) - 0.75 * math.log(3)
    assert logp.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 4), -math.inf])
    assert ent.tolist() == pytest.approx([H] * 3)
    dh, dw = torch.autograd.grad(ent[0] + 2 * logp[0], (h, w))  # dz = 2 (1[v=t] - p) - p (log p + H)
    dz = [0.5 - 0.75 * (math.log(3 / 4) + H), -0.5 - 0.25 * (math.log(1 / 4) + H), 0.0, 0.0]
    assert dw.flatten().tolist() == pytest.approx(dz, abs=1e-6)
    if of is not definition.linear_logprob:  # whose product with the weights is torch's
        assert dh.flatten().tolist() == pytest.approx([dz[0] * math.log(3), 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("of", [linear_logprob, definition.linear_logprob])
def test_masked_entries_by_hand(of):
    masked_by_hand(of, **(dict(entropy=True) if of is linear_logprob else {}))


def masked_vocabulary(of, **how):
    """Of 300 entries 153 are masked, whole tiles of them: the result is that of the other 147."""
    for N in (1, 33):
        h, w, target = problem(N, V=147, dtype=torch.float32, ignored=0)
        h, keep = h.abs(), torch.ones(300, dtype=torch.bool)
        keep[:70] = keep[100:170] = keep[200:210] = keep[297:] = False
        large = torch.full((300, w.shape[1]), -math.inf)
        large[100:170, 1:] = 0.5  # one -inf of a row is enough
        large[keep] = w
        g, g_H = torch.randn(2, N, generator=torch.Generator().manual_seed(1))
        numbers = keep.nonzero().squeeze(1)[target]
        want = gradients(lambda h, w: of(h, w, target, entropy=True, **how), h, w, g, g_H)
        logp, ent, dh, dw = gradients(lambda h, w: of(h, w, numbers, entropy=True, **how), h, large, g, g_H)
        for a, b in zip((logp, ent, dh, dw[keep]), want):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6
        assert not dw[~keep].any()


@pytest.mark.parametrize("chunk_bytes", [None, 10 * 300 * 4])
def test_a_masked_vocabulary_is_the_smaller_one(chunk_bytes):
    masked_vocabulary(linear_logprob, temperature=0.7, chunk_bytes=chunk_bytes)


def test_uniform():
    logp, ent = linear_logprob(torch.randn(3, 4), torch.zeros(7, 4), torch.tensor([0, 3, 6]), entropy=True)
    torch.testing.assert_close(logp, torch.full((3,), -math.log(7)))
    torch.testing.assert_close(ent, torch.full((3,), math.log(7)))


@pytest.mark.parametrize("V", [63, 65, 129])
def test_all_logits_very_negative(V):
    h = torch.full((3, 1), -1.0)
    w = 120 + torch.rand(V, 1, generator=torch.Generator().manual_seed(0))
    logp, ent = linear_logprob(h, w, torch.tensor([0, 1, V - 1]), entropy=True)
    want = reference(h.double(), w.double(), torch.tensor([0, 1, V - 1]))
    torch.testing.assert_close(logp.double(), want[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(ent.double(), want[1], rtol=0, atol=2e-5)
    assert (logp < 0).all()


def test_large_logits_keep_their_digits():
    """z_t - m - log s; with m + log s formed first the error would be 5e-4."""
    logp, _ = linear_logprob(torch.ones(1, 1), torch.tensor([[30000.0], [29999.0]]), torch.tensor([0]))
    assert logp.item() == pytest.approx(-math.log1p(math.exp(-1)), abs=1e-6)


@pytest.mark.parametrize("size", [1.5, 4.0])
def test_fp32_is_as_accurate_as_torch(size):
    h, w, target = problem(256, D=64, V=1000, dtype=torch.float32, size=size, ignored=0)
    exact, exact_H = reference(h.double(), w.double(), target)
    theirs, theirs_H = reference(h, w, target)
    ours, ours_H = linear_logprob(h, w, target, entropy=True)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 1.2 * (theirs - exact).abs().max()
    assert (ours_H - exact_H).abs().max() <= 1.2 * (theirs_H - exact_H).abs().max()


def test_bf16_inputs_give_fp32_logits():
    h, w, target = problem(64, D=64, V=1000, dtype=torch.bfloat16)
    h.requires_grad_(), w.requires_grad_()
    exact, exact_H = reference(h.double(), w.double(), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which would round them
        logp, ent = linear_logprob(h, w, target, entropy=True)
    assert logp.dtype == ent.dtype == torch.float32
    assert (logp - exact).abs().max() <= 1e-4 and (ent - exact_H).abs().max() <= 1e-4
    have, want = (torch.autograd.grad(x.sum(), (h, w)) for x in (logp, exact))
    for ours, theirs in zip(have, want):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() <= 5e-3 * theirs.norm()


def test_mixed_dtypes():
    h, w, target = problem(5, dtype=torch.bfloat16)
    w = w.float()
    torch.testing.assert_close(linear_logprob(h, w, target)[0], reference(h.float(), w, target)[0])


def test_all_ignored():
    h, w, _ = problem(5)
    target = torch.full((5,), 9)
    h.requires_grad_(), w.requires_grad_()
    logp, ent = linear_logprob(h, w, target, ignore_index=9, entropy=True)
    assert logp.tolist() == ent.tolist() == [0.0] * 5
    (logp + ent).sum().backward()
    assert not h.grad.any() and not w.grad.any()


def test_ignored_rows_do_not_leak():
    """Not even NaN, which padding may contain."""
    h, w, target = problem(20)
    h[target == IGNORE] = float("nan")
    assert (target == IGNORE).any()
    ones = torch.ones(20, dtype=h.dtype)
    for x in gradients(lambda h, w: linear_logprob(h, w, target, entropy=True), h, w, ones, ones):
        assert x.isfinite().all()


@pytest.mark.parametrize("chunk_bytes", [None, 10 * 67 * 8])
def test_strides(chunk_bytes):
    """Columns of something wider, a transposed matrix, and the stride-0 gradient of a sum."""
    h, w, target = problem(33)
    wider = torch.randn(33, 50, dtype=torch.float64)
    wider[:, 3:51:2] = h
    ones = torch.ones(33, dtype=torch.float64)
    want = gradients(lambda h, w: reference(h, w, target), h, w, ones, ones)
    h_, w_ = wider[:, 3:51:2].requires_grad_(), w.T.contiguous().T.requires_grad_()
    assert not h_.is_contiguous() and not w_.is_contiguous()
    logp, ent = linear_logprob(h_, w_, target, entropy=True, chunk_bytes=chunk_bytes)
    grads = torch.autograd.grad((logp.sum(), ent.sum()), (h_, w_))
    for a, b in zip((logp, ent, *grads), want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk_bytes", [None, 10 * 67 * 8])
@pytest.mark.parametrize("used", ["logp", "entropy"])
@pytest.mark.parametrize("frozen", ["h", "w"])
def test_one_output_and_one_input(used, frozen, chunk_bytes):
    h, w, target = problem(33)
    x = (w if frozen == "h" else h).requires_grad_()
    pick = 0 if used == "logp" else 1
    (want,) = torch.autograd.grad(reference(h, w, target)[pick].sum(), x)
    outputs = linear_logprob(h, w, target, entropy=True, chunk_bytes=chunk_bytes)
    (have,) = torch.autograd.grad(outputs[pick].sum(), x)
    torch.testing.assert_close(have, want)


@pytest.mark.parametrize("chunk_bytes", [None, 10 * 67 * 8])
def test_two_backward_passes(chunk_bytes):
    """They give the same bits, and the second does not overwrite the first gradients."""
    h, w, target = problem(33)
    h.requires_grad_(), w.requires_grad_()
    loss = sum(x.square().sum() for x in linear_logprob(h, w, target, entropy=True, chunk_bytes=chunk_bytes))
    (of_h,) = torch.autograd.grad(loss, h, retain_graph=True)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    copies = [x.clone() for x in first]
    second = torch.autograd.grad(loss, (h, w))
    assert torch.equal(of_h, copies[0])
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(copies, first, second))


@pytest.mark.parametrize("entropy", [True, False])
def test_any_chunk_gives_the_same_gradients(entropy):
    h, w, target = problem(39, 24, 71)
    h.requires_grad_(), w.requires_grad_()
    f = lambda **kw: sum(x.square().sum() for x in linear_logprob(h, w, target, entropy=entropy, **kw) if x is not None)
    want = torch.autograd.grad(f(), (h, w))
    for rows in range(1, 41):
        torch.testing.assert_close(torch.autograd.grad(f(chunk_bytes=rows * 71 * 8), (h, w)), want)


def test_repeated_calls_give_the_same_bits():
    h, w, target = problem(300, 32, 500, dtype=torch.float32)
    ones, f = torch.ones(300), lambda h, w: linear_logprob(h, w, target, entropy=True, chunk_bytes=64 * 500 * 4)
    assert all(torch.equal(a, b) for a, b in zip(gradients(f, h, w, ones, ones), gradients(f, h, w, ones, ones)))


@pytest.mark.parametrize("grad_of_sum", [True, False])
def test_there_is_no_second_derivative(grad_of_sum):
    """Refused, also where the upstream gradient is a constant."""
    h, w, target = problem(5)
    logp, _ = linear_logprob(h.requires_grad_(), w, target)
    with pytest.raises(RuntimeError, match="create_graph=True: .* no second derivative"):
        torch.autograd.grad(logp.sum() if grad_of_sum else logp.square().sum(), h, create_graph=True)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.numel() * x.itemsize)
        return out


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_never_holds_N_by_V(softcap):
    """Logits of one chunk at a time; the last log-probs are saved, but not with a softcap."""
    N, D, V, rows = 4096, 4, 700, 500
    h, w, target = problem(N, D, V, dtype=torch.float32, ignored=0)
    h.requires_grad_(), w.requires_grad_()
    with Largest() as largest:
        logp, ent = linear_logprob(h, w, target, softcap=softcap, entropy=True, chunk_bytes=rows * V * 4)
        saved = sum(x.nbytes for x in logp.grad_fn.saved_tensors if x is not None and x.shape[1:] == (V,))
        (logp + ent).sum().backward()
    assert largest.bytes <= rows * V * 4 < N * V * 4 / 8
    assert saved == (N % rows * V * 4 if softcap is None else 0)


@pytest.mark.parametrize("V, rows", [(32768, 256), (65536, 256), (16384, 512)])
def test_without_a_budget_a_chunk_has_32_mib_or_256_tokens(V, rows):
    chunks = token_chunks(1000, V, torch.float32, None)
    assert chunks[0] == slice(0, rows) and chunks[-1].stop == 1000
    assert token_chunks(0, V, torch.float32, None) == [slice(0, 0)]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(impl="cuda"), "impl='cuda'"),
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(softcap=0.0), "softcap=0.0"),
        (dict(softcap=math.inf), "softcap=inf: must be above 0 and finite"),
        (dict(logit_scale=math.nan), "logit_scale=nan: must be finite"),
        (dict(chunk_bytes=0), "chunk_bytes=0"),
        (dict(engine="fast"), "engine='fast': choose one of auto, hybrid, fused"),
        (dict(engine="fused"), "engine='fused': only Triton"),
        (dict(h=torch.zeros(6, 24, device="meta")), "h on meta, w on cpu"),
        (dict(h=torch.zeros(6, 24, dtype=torch.int32)), "h torch.int32"),
        (dict(h=torch.zeros(6, 0), w=torch.zeros(67, 0)), r"w \(67, 0\)"),
        (dict(h=torch.zeros(2, 3, 24)), r"h \(2, 3, 24\)"),
        (dict(w=torch.zeros(67, 25)), r"w \(67, 25\)"),
        (dict(target=torch.zeros(5, dtype=torch.int64)), r"target \(5,\)"),
        (dict(target=torch.zeros(6, dtype=torch.int32)), "torch.int32"),
        (dict(target=torch.tensor([0, 1, 2, 3, 4, 67])), r"\[0, 67\]: allowed are 0 to 66 and -100"),
        (dict(target=torch.tensor([0, 1, 2, 3, 4, -1])), r"\[-1, 4\]"),
    ],
)
def test_errors_name_the_value(change, message):
    h, w, target = problem(6, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_logprob(**dict(h=h, w=w, target=target) | change)


# ---------------------------------------------------------------- choice of the implementation


def test_auto_on_the_cpu_is_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "minir1.kernels.logprob", None)  # importing it would raise
    linear_logprob(*problem(3, dtype=torch.float32))


def test_triton_by_name_or_an_error(monkeypatch):
    h, w, target = problem(3, dtype=torch.float32)
    monkeypatch.setattr("minir1.ops.dispatch.kernels_missing", lambda: "the package triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="impl='triton': the package triton is not installed"):
        linear_logprob(h, w, target, impl="triton")
    monkeypatch.setattr("minir1.ops.dispatch.kernels_missing", lambda: None)
    with pytest.raises(ValueError, match="torch.float64"):
        linear_logprob(h.double(), w.double(), target, impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        linear_logprob(h, w, target, impl="triton")


def test_environment_variable(monkeypatch):
    h, w, target = problem(3, dtype=torch.float32)
    monkeypatch.setenv("MINIR1_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="MINIR1_KERNELS=triton: the tensors are on cpu"):
        linear_logprob(h, w, target)
    linear_logprob(h, w, target, impl="torch")  # the argument wins
    monkeypatch.setenv("MINIR1_KERNELS", "fast")
    with pytest.raises(ValueError, match="MINIR1_KERNELS=fast: choose one of auto, triton, torch"):
        linear_logprob(h, w, target)


def test_import_is_light():
    code = "import minir1.ops, sys; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [None, 100 * 1000 * 4])
def test_torch_on_cuda(dtype, chunk_bytes):
    h, w, target = problem(333, D=64, V=1000, dtype=dtype)
    h, w, target = h.cuda(), w.cuda(), target.cuda()
    g, g_H = torch.randn(2, 333, device="cuda")
    want = gradients(lambda h, w: reference(h, w, target), h.double(), w.double(), g, g_H)
    f = lambda h, w: linear_logprob(h, w, target, entropy=True, impl="torch", chunk_bytes=chunk_bytes)
    have = gradients(f, h, w, g, g_H)
    for a, b in zip(have[:2], want[:2]):
        assert (a - b).abs().max() <= 1e-4
    for a, b in zip(have[2:], want[2:]):
        assert a.dtype == dtype
        assert (a - b).norm() <= (2e-6 if dtype == torch.float32 else 5e-3) * b.norm()
