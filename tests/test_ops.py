"""linear_logprob against the plain fp64 formula, differentiated by autograd."""
import math
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minir1.ops import linear_logprob, tiles
from minir1.ops.logprob import CHUNK_BYTES

IGNORE = -100
SETTINGS = [
    {},
    dict(temperature=0.7),
    dict(softcap=2.5),
    dict(logit_scale=0.4),
    dict(temperature=1.6, softcap=3.0, logit_scale=1.7),
]


def reference(h, w, target, temperature=1.0, softcap=None, logit_scale=1.0):
    """In the dtype given, by the book, with [N, V] in full."""
    z = logit_scale * (h @ w.T)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lp = torch.log_softmax(z / temperature, -1)
    kept = target != IGNORE
    logp = lp.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return torch.where(kept, logp, 0.0), torch.where(kept, -(lp.exp() * lp).sum(-1), 0.0)


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


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 10 * 67 * 8, 1])  # all kept, ten rows a chunk, one row
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


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 1])
def test_gradcheck(chunk_bytes):
    h, w, target = problem(4, D=3, V=5)
    kw = dict(temperature=1.3, softcap=2.0, entropy=True, chunk_bytes=chunk_bytes)
    f = lambda h, w: linear_logprob(h, w, target, **kw)
    assert torch.autograd.gradcheck(f, (h.requires_grad_(), w.requires_grad_()))


def test_by_hand():
    """D = 1: z = softcap(scale · h w) / temperature, in that order; two tokens."""
    h, w, target = torch.tensor([[1.0]]), torch.tensor([[2.0], [-1.0]]), torch.tensor([0])
    z = [3 * math.tanh(0.5 * x / 3) / 0.25 for x in (2.0, -1.0)]
    p = 1 / (1 + math.exp(z[1] - z[0]))
    logp, ent = linear_logprob(h, w, target, temperature=0.25, softcap=3.0, logit_scale=0.5, entropy=True)
    assert logp.item() == pytest.approx(math.log(p), rel=1e-5)
    assert ent.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-5)


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
    """Not even NaN, which padding may hold."""
    h, w, target = problem(20)
    h[target == IGNORE] = float("nan")
    assert (target == IGNORE).any()
    ones = torch.ones(20, dtype=h.dtype)
    for x in gradients(lambda h, w: linear_logprob(h, w, target, entropy=True), h, w, ones, ones):
        assert x.isfinite().all()


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 10 * 67 * 8])
def test_strides(chunk_bytes):
    """Columns of something wider, a transposed matrix, and the stride-0 gradient of a sum."""
    h, w, target = problem(33)
    wide = torch.randn(33, 50, dtype=torch.float64)
    wide[:, 3:51:2] = h
    ones = torch.ones(33, dtype=torch.float64)
    want = gradients(lambda h, w: reference(h, w, target), h, w, ones, ones)
    h_, w_ = wide[:, 3:51:2].requires_grad_(), w.T.contiguous().T.requires_grad_()
    assert not h_.is_contiguous() and not w_.is_contiguous()
    logp, ent = linear_logprob(h_, w_, target, entropy=True, chunk_bytes=chunk_bytes)
    grads = torch.autograd.grad((logp.sum(), ent.sum()), (h_, w_))
    for a, b in zip((logp, ent, *grads), want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 10 * 67 * 8])
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


def test_graph_may_be_walked_twice():
    h, w, target = problem(33)
    logp, _ = linear_logprob(h.requires_grad_(), w, target)
    first = torch.autograd.grad(logp.sum(), h, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(logp.sum(), h)[0])


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1])
def test_what_waits_in_the_gradient_is_made_again_on_a_second_walk(chunk_bytes):
    """Of 1,100 words in three pieces the first tile of each waits where dw will be, which the first walk gives away."""
    h, w, target = problem(40, 64, 1100, dtype=torch.float32)
    h.requires_grad_(), w.requires_grad_()
    loss = sum(x.square().sum() for x in linear_logprob(h, w, target, entropy=True, chunk_bytes=chunk_bytes))
    want = torch.autograd.grad(sum(x.square().sum() for x in reference(h, w, target)), (h, w))
    (of_h,) = torch.autograd.grad(loss, h, retain_graph=True)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    saved = [x.clone() for x in first]
    second = torch.autograd.grad(loss, (h, w))
    assert torch.equal(of_h, saved[0]) and all(torch.equal(a, b) for a, b in zip(first, saved))  # not written again
    for have in (first, second):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entropy", [True, False])
def test_any_budget_gives_the_same_gradients(monkeypatch, entropy):
    """Tiles of 16 by 16 at most, the last ones smaller: what is kept ends anywhere."""
    monkeypatch.setitem(tiles.TILE, "cpu", (16, 16))
    h, w, target = problem(39, 24, 71)
    h.requires_grad_(), w.requires_grad_()
    f = lambda **kw: sum(x.square().sum() for x in linear_logprob(h, w, target, entropy=entropy, **kw) if x is not None)
    want = torch.autograd.grad(f(chunk_bytes=1), (h, w))
    for budget in range(500, 39 * 71 * 8 + 1500, 333):
        torch.testing.assert_close(torch.autograd.grad(f(chunk_bytes=budget), (h, w)), want)


def test_there_is_no_second_derivative(monkeypatch):
    for V in (67, 1100):  # whole rows, and tiles
        h, w, target = problem(5, 24, V)
        logp, _ = linear_logprob(h.requires_grad_(), w, target)
        with pytest.raises(RuntimeError, match="create_graph=True: .* no second derivative"):
            torch.autograd.grad(logp.sum(), h, create_graph=True)


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
    """Beside the tiles, what the budget allows is kept, and nothing with a softcap."""
    N, D, V, budget = 4096, 4, 700, 5 << 20
    h, w, target = problem(N, D, V, dtype=torch.float32, ignored=0)
    h.requires_grad_(), w.requires_grad_()
    with Largest() as largest:
        logp, ent = linear_logprob(h, w, target, softcap=softcap, entropy=True, chunk_bytes=budget)
        kept = sum(x.nbytes for x in logp.grad_fn.saved_tensors if x is not None and x.shape[1:] == (350,))
        (logp + ent).sum().backward()
    tile = 512 * 512 * 4
    assert largest.bytes <= 3 * tile < N * V * 4 / 3
    assert kept <= budget and (kept > budget - tile) == (softcap is None) and bool(kept) == (softcap is None)


@pytest.mark.parametrize("entropy", [False, True])
def test_small_vocabularies_keep_what_the_budget_allows(entropy):
    """Rows of 60 words: log-probs, and with the entropy probabilities too, of as many whole tiles as fit."""
    h, w, target = problem(3 * 4369, 4, 60, dtype=torch.float32, ignored=0)  # tiles of 512 · 512 // 60 = 4,369 rows
    h.requires_grad_(), w.requires_grad_()
    tile = 4369 * 60 * 4 * (1 + entropy)
    grads = []
    for budget, whole in ((1, 0), (tile - 1, 0), (tile, 1), (3 * tile - 1, 2), (3 * tile, 3)):
        logp, ent = linear_logprob(h, w, target, entropy=entropy, chunk_bytes=budget)
        assert logp.grad_fn.saved_tensors[-1].nbytes == whole * tile
        grads.append(torch.autograd.grad((logp.square() + (ent if entropy else 0)).sum(), (h, w)))
    for again in grads[1:]:
        torch.testing.assert_close(again, grads[0], rtol=1e-5, atol=1e-6)


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
    args = dict(h=h, w=w, target=target, **{k: v for k, v in change.items() if k not in ("h", "w", "target")})
    args.update({k: v for k, v in change.items() if k in ("h", "w", "target")})
    with pytest.raises(ValueError, match=message):
        linear_logprob(**args)


# ---------------------------------------------------------------- choosing


def test_auto_on_the_cpu_is_the_twin(monkeypatch):
    monkeypatch.setitem(sys.modules, "minir1.kernels.logprob", None)  # importing it would raise
    linear_logprob(*problem(3, dtype=torch.float32))


def test_triton_by_name_or_an_error(monkeypatch):
    h, w, target = problem(3, dtype=torch.float32)
    monkeypatch.setattr("minir1.ops.choose.kernels_missing", lambda: "the package triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="impl='triton': the package triton is not installed"):
        linear_logprob(h, w, target, impl="triton")
    monkeypatch.setattr("minir1.ops.choose.kernels_missing", lambda: None)
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
@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 100 * 1000 * 4])
def test_twin_on_cuda(dtype, chunk_bytes):
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
