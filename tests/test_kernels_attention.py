"""The Triton attention against fp64: in the interpreter without a GPU, compiled with one."""
import math

import pytest
import torch
from test_ops_attention import check, close, cumulative, reference, tensors

from minir1.kernels import attention as kernel
from minir1.model.config import ModelConfig
from minir1.model.transformer import Transformer
from minir1.ops import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32 = 2e-6


def problem(*args, dtype=torch.float32, **kw):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in tensors(*args, dtype=dtype, **kw)]


def run(inputs, tolerance=FP32, **how):
    return check(inputs, tolerance, impl="triton", **how)


@pytest.mark.parametrize("N", [0, 1, 31, 33, 129])  # up to five blocks of the interpreter
def test_one_sequence(N):
    run(problem([N], [N], 1, 1, 16, 16))


HEADS = [  # H, K, d_qk, d_v
    (2, 2, 64, 64), (4, 2, 80, 80), (4, 1, 96, 96), (7, 1, 128, 128), (8, 1, 192, 128), (2, 1, 24, 20), (1, 1, 5, 7),
]


@pytest.mark.parametrize("H,K,d_qk,d_v", HEADS)
def test_heads(H, K, d_qk, d_v):
    """Groups of 1, 2, 4, 7 and 8 query heads; head sizes that are a sum of two powers of two, or not even that."""
    run(problem([33], [35], H, K, d_qk, d_v))


PACK = dict(queries=[0, 1, 40, 6, 2, 5, 0], keys=[3, 1, 40, 70, 0, 3, 0])  # of which three queries see no key
MASKS = [  # causal, window
    (True, None),
    (False, None),
    (True, 5),  # less than a block
    (True, 40),  # more than one
    (False, 36),
]


@pytest.mark.parametrize("causal,window", MASKS)
def test_packs_and_masks(causal, window):
    o, lse, _ = run(problem(**PACK, H=2, K=1, d_qk=16, d_v=16), causal=causal, window=window)
    dead = lse == -math.inf
    assert (o.transpose(0, 1)[dead] == 0).all()
    assert dead.sum() == 2 * (4 if causal else 2) or window == 5 and not causal


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_without_end_is_none(causal):
    """The largest number of 32 bits, to which a position is added."""
    inputs = problem([3, 33], [3, 33], 1, 1, 16, 16)
    for a, b in zip(run(inputs, causal=causal, window=2**31 - 1), run(inputs, causal=causal)):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("causal,window", [(True, None), (False, 9)])
@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap(softcap, causal, window):
    """Scores up to 60: far beyond the cap and far below it."""
    run(problem([1, 35], [4, 35], 2, 1, 16, 16, size=4.0), 5e-6, causal=causal, window=window, softcap=softcap)


def test_scores_far_below_zero():
    """All about -120: a padding key with a score of 0 would dominate."""
    q, k, v, *bounds = problem([33], [37], 1, 1, 16, 16)
    q, k = torch.full_like(q, 3.0), -10.0 - 0.1 * k.abs()
    _, lse, _ = run((q, k, v, *bounds), 2e-5)
    assert (lse < -100).all()


def test_scores_far_apart():
    run(problem([33], [33], 1, 1, 16, 16, size=20.0), 3e-5, gradients=False)


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_half_precision(dtype, tolerance):
    """And no worse than torch's own, by half again."""
    inputs = problem([1, 40], [1, 40], 4, 2, 32, 32, dtype=dtype)
    scale = 32**-0.5
    o, _, _ = run(inputs, tolerance if not kernel.INTERPRET else 5e-3, scale=scale)
    theirs, _ = attention(*inputs, scale, impl="torch")
    want, _ = reference(*inputs[:5], scale)
    assert (o.double() - want).norm() <= 1.5 * (theirs.double() - want).norm()


def test_repeated_to_the_bit_and_packed_as_alone():
    """A sequence has the same bits alone and packed, and in repeated calls."""
    lengths = [33, 2]
    inputs = problem(lengths, lengths, 2, 1, 16, 16)
    first, again = run(inputs), run(inputs)
    for a, b in zip((*first[:2], *first[2]), (*again[:2], *again[2])):
        assert torch.equal(a, b)
    q, k, v, cu, *_ = inputs
    for start, n in zip(cu.tolist(), lengths):
        s, one = slice(start, start + n), cumulative([n], DEVICE)
        o, lse = attention(q[s], k[s], v[s], one, one, n, n, impl="triton")
        assert torch.equal(o, first[0][s]) and torch.equal(lse, first[1][:, s])


def test_a_gradient_of_stride_zero():
    q, k, v, *bounds = (x.requires_grad_() if i < 3 else x for i, x in enumerate(problem([34], [34], 2, 1, 16, 16)))
    grads = []
    for impl in ("triton", "torch"):
        o, _ = attention(q, k, v, *bounds, impl=impl)
        grads.append(torch.autograd.grad(o.sum(), (q, k, v)))  # sum gives back one number, expanded
    for a, b in zip(*grads):
        close(a, b.double(), 3e-6)


def test_bounds_may_be_a_column_of_a_table():
    q, k, v, cu_q, cu_k, *longest = problem([20, 14], [20, 14], 2, 1, 16, 16)
    beside = lambda cu: torch.stack((cu, cu + 7), 1)[:, 0]
    o, _ = attention(q, k, v, cu_q, cu_k, *longest, impl="triton")
    assert torch.equal(o, attention(q, k, v, beside(cu_q), beside(cu_k), *longest, impl="triton")[0])


def test_there_is_no_second_derivative():
    q, k, v, *bounds = problem([5], [5], 2, 1, 16, 16)
    o, _ = attention(q.requires_grad_(), k, v, *bounds, impl="triton")
    with pytest.raises(RuntimeError, match="create_graph=True: a kernel has no second derivative"):
        torch.autograd.grad(o.sum(), q, create_graph=True)


def test_lse_has_no_gradient_and_k_gets_none_unasked():
    q, k, v, *bounds = problem([5], [5], 2, 1, 16, 16)
    o, lse = attention(q.requires_grad_(), k, v, *bounds, impl="triton")
    assert o.requires_grad and not lse.requires_grad
    o.sum().backward()
    assert q.grad is not None and k.grad is None


def test_nan_stays_in_its_sequence():
    q, k, v, *bounds = problem([3, 4], [3, 4], 2, 1, 16, 16)
    k[1] = float("nan")
    o, lse = attention(q, k, v, *bounds, impl="triton")
    assert o[1:3].isnan().all() and lse[:, 1:3].isnan().all()
    assert o[0].isfinite().all() and o[3:].isfinite().all() and lse[:, 3:].isfinite().all()


class Guarded:
    """torch for a kernel's host code, whose new tensors are NaN and lie between guards."""

    def __init__(self):
        self.all = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *shape, **kw):
        shape = torch.Size(shape if isinstance(shape[0], int) else shape[0])
        n = shape.numel()
        whole = torch.full((n + 512,), 12345.0, **kw)
        whole[256 : n + 256] = float("nan")
        self.all.append(whole)
        return whole[256 : n + 256].view(shape)

    def intact(self):
        return all((x[:256] == 12345).all() and (x[-256:] == 12345).all() and not x.isnan().any() for x in self.all)


@pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's, where the interpreter meets an infinity
@pytest.mark.parametrize("last", [1, 2])  # stride of a head's dimensions: contiguous, or copied
def test_reads_and_writes_only_its_own(monkeypatch, last):
    """Inputs are surrounded by infinities; outputs are NaN before and lie between guards."""
    monkeypatch.setattr(kernel, "torch", guarded := Guarded())
    inputs = problem([0, 33, 5], [2, 33, 7], 4, 2, 24, 20)
    for i, x in enumerate(inputs[:3]):
        n, heads, size = x.shape
        around = x.new_full((n + 4, heads + 2, last * size + 4), float("inf"))
        inside = around[2:-2, 1:-1, 2 : 2 + last * size : last]
        inside.copy_(x)
        inputs[i] = inside
    run(inputs, causal=True, window=30)
    assert len(guarded.all) == 6 and guarded.intact()  # o, lse, the statistics, dq, dk, dv


def test_a_view_with_the_heads_first():
    """[H, N, d] in memory."""
    q, k, v, *bounds = problem([3, 33], [3, 33], 2, 2, 16, 16)
    run([*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)), *bounds])


@pytest.mark.parametrize("size,parts", [(5, (16, 0)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (128, (128, 0)),
                                        (192, (128, 64)), (256, (256, 0)), (24, (16, 16)), (112, (64, 64))])
def test_a_head_in_two_parts(size, parts):
    assert kernel.cut(size) == parts


def test_every_head_size_has_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "INTERPRET", False)
    for kind in ("forward", "dq", "dkv"):
        for size in range(1, 257):
            for dtype in (torch.float32, torch.bfloat16):
                for of in ((8, 163 << 10), (8, 99 << 10), (9, 227 << 10), (10, 227 << 10), (12, 99 << 10)):
                    assert kernel.blocks(kind, size, dtype, *of)["BLOCK_M"] >= 16


def test_tiles_by_shared_memory(monkeypatch):
    """The same generation of GPUs with 163 KiB a block and with 99: other tiles where the first do not fit."""
    monkeypatch.setattr(kernel, "INTERPRET", False)
    of = lambda kind, size, shared: kernel.blocks(kind, size, torch.bfloat16, 8, shared)
    for kind, differ in (("forward", {192, 256}), ("dq", {256}), ("dkv", set())):
        sizes = (64, 80, 96, 128, 192, 256)
        assert {size for size in sizes if of(kind, size, 163 << 10) != of(kind, size, 99 << 10)} == differ
        assert of(kind, 256, 227 << 10) == of(kind, 256, 163 << 10)


def check_equal_bits_under_load(call, times):
    """With a second stream that keeps the GPU busy."""
    first, other, load = call(), torch.cuda.Stream(), torch.randn(4096, 4096, device=DEVICE)
    for _ in range(times):
        with torch.cuda.stream(other):
            load @ load
        assert all(torch.equal(a, b) for a, b in zip(first, call()))


# ---------------------------------------------------------------- the model over the kernels


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_the_model_over_the_kernels(monkeypatch, kind):
    """Training, a prompt in chunks, and steps over the cache, one token and two at a time: as in torch."""
    torch.manual_seed(0)
    config = ModelConfig(vocab=40, dim=32, layers=2, heads=2, kv_heads=1, attention=kind, kv_lora=16, nope=8, rope=8,
                         v_dim=8, ffn=32, experts=0)
    model = Transformer(config).to(DEVICE)
    tokens, lengths = torch.randint(0, 40, (3, 9), device=DEVICE), torch.tensor([4, 9, 1], device=DEVICE)
    runs = []
    for impl in ("torch", "triton"):
        monkeypatch.setenv("MINIR1_KERNELS", impl)
        model.zero_grad()
        logp = model.logprob(tokens, lengths=lengths)
        logp.sum().backward()
        results = [logp.detach(), *(p.grad for p in model.parameters())]
        with torch.no_grad():
            cache = model.cache(3, 12)
            results.append(model.prefill(tokens, lengths=lengths, cache=cache, chunk=5))
            cache.trim()
            for new in (1, 2):
                results.append(model.hidden(tokens[:, :new], cache=cache))
        runs.append(results)
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- with a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, FP32)])
@pytest.mark.parametrize("H,K,d_qk,d_v", HEADS + [(2, 1, 256, 256)])
def test_numerics_on_a_gpu(H, K, d_qk, d_v, dtype, tolerance):
    """Several blocks of the real sizes; compared with torch in fp64."""
    inputs = problem([0, 517, 130], [0, 517, 300], H, K, d_qk, d_v, dtype=dtype)
    q, k, v, *bounds = inputs
    for how in (dict(), dict(causal=False), dict(window=100), dict(softcap=5.0)):
        results = []
        for impl, cast in (("triton", dtype), ("torch", torch.float64)):
            x = [t.to(cast).requires_grad_() for t in (q, k, v)]
            o, lse = attention(*x, *bounds, impl=impl, **how)
            g = torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).to(o)
            results.append((o, lse, *torch.autograd.grad(o, x, g.to(dtype).to(cast))))
        for have, want in zip(*results):
            alive = want.isfinite()
            close(have[alive], want[alive], tolerance)


@pytest.mark.gpu
def test_what_the_gpu_is_asked_for():
    x = torch.empty(0, device=DEVICE)
    major, shared = kernel.gpu(x)
    assert major == torch.cuda.get_device_capability()[0] and 48 << 10 <= shared <= 256 << 10
    assert kernel.gpu(x.cpu()) == (0, 0)


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    """The last sequence of a pack whose tensors have more than 2^31 numbers."""
    heads, size = 32, 128
    n = 2**31 // (heads * size) + 200
    q = torch.zeros(n, heads, size, dtype=torch.bfloat16, device=DEVICE)
    q[-150:] = torch.randn(150, heads, size, device=DEVICE)
    bounds = [torch.tensor([0, 50, n - 150, n], dtype=torch.int32, device=DEVICE)] * 2
    q.requires_grad_()
    cu = bounds[0].clone()
    cu[1:3] = torch.tensor([n - 150, n - 150])  # one long sequence of zeros would take minutes: cut it
    cu = torch.cat((torch.arange(0, n - 150, 64, device=DEVICE, dtype=torch.int32), cu[2:]))
    o, lse = attention(q, q, q, cu, cu, 150, 150, impl="triton")
    o[-150:].float().square().sum().backward()
    tail = q.detach()[-150:].double().requires_grad_()
    one = cumulative([150], DEVICE)
    want, want_lse = attention(tail, tail, tail, one, one, 150, 150, impl="torch")
    want.square().sum().backward()
    close(o[-150:], want.detach(), 5e-3)
    close(lse[:, -150:], want_lse, 1e-3)
    close(q.grad[-150:], tail.grad, 2e-2)


@pytest.mark.gpu
def test_no_race():
    """A hundred repetitions of forward and backward give equal bits."""
    q, k, v, *bounds = problem([700, 1, 1500, 0, 301], [700, 1, 1500, 0, 301], 8, 2, 128, 128, dtype=torch.bfloat16)
    first = None
    for _ in range(100):
        x = [t.detach().requires_grad_() for t in (q, k, v)]
        o, lse = attention(*x, *bounds, impl="triton")
        results = o, lse, *torch.autograd.grad(o, x, o.detach())
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first))
