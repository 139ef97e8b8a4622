"""ops.attention and ops.decode: torch and the reference implementations against a softmax over one query at a time, and
bad arguments."""
import math
import sys

import pytest
import torch

from minir1.ops import attention, decode_attention, decode_latent
from minir1.ops import reference as definition

CASES = [  # causal, window, softcap
    (True, None, None),
    (False, None, None),
    (True, 3, None),
    (False, 2, None),
    (True, None, 2.0),
    (False, 4, 1.5),
]
SIZES = [(8, 8), (12, 8), (8, 12)]  # d_qk, d_v


def cumulative(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def tensors(queries, keys, H, K, d_qk, d_v, dtype=torch.float64, size=1.0, seed=0):
    """q, k, v of packed sequences, and their bounds."""
    gen = torch.Generator().manual_seed(seed)
    shapes = (sum(queries), H, d_qk), (sum(keys), K, d_qk), (sum(keys), K, d_v)
    q, k, v = (torch.randn(*shape, generator=gen).mul(size).to(dtype) for shape in shapes)
    return q, k, v, cumulative(queries), cumulative(keys), max(queries, default=0), max(keys, default=0)


def sees(i, n, m, causal, window):
    """The keys that query i of n sees among m."""
    own = i + m - n
    return [j for j in range(m) if (j <= own or not causal) and (window is None or abs(j - own) < window)]


def reference(q, k, v, cu_q, cu_k, scale, causal=True, window=None, softcap=None):
    """One sequence and one query at a time, in fp64: o [N, H, Dv], lse [H, N]."""
    q, k, v = q.double(), k.double(), v.double()
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    o, lse = [], []
    for (a, b), (c, d) in zip(*(list(zip(cu.tolist(), cu.tolist()[1:])) for cu in (cu_q, cu_k))):
        for i in range(b - a):
            keys = [c + j for j in sees(i, b - a, d - c, causal, window)]
            z = (k[keys] * q[a + i]).sum(-1) * scale
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            o.append((z.softmax(0).unsqueeze(-1) * v[keys]).sum(0))
            lse.append(z.logsumexp(0) if keys else torch.full((q.shape[1],), -math.inf, dtype=z.dtype, device=z.device))
    if not o:
        return v.new_zeros(0, q.shape[1], v.shape[2]), v.new_zeros(q.shape[1], 0)
    return torch.stack(o), torch.stack(lse, 1)


def check(inputs, tolerance, impl="torch", gradients=True, **how):
    """Outputs and gradients against the reference, by relative norm; returns o, lse, gradients."""
    q, k, v, cu_q, cu_k, max_q, max_k = inputs
    how = dict(scale=q.shape[-1] ** -0.5) | how
    q, k, v = (x.detach().requires_grad_(gradients) for x in (q, k, v))
    o, lse = attention(q, k, v, cu_q, cu_k, max_q, max_k, impl=impl, **how)
    exact = [x.detach().double().requires_grad_(gradients) for x in (q, k, v)]
    want, want_lse = reference(*exact, cu_q, cu_k, **how)
    assert o.dtype == q.dtype and not lse.requires_grad
    close(o, want, tolerance)
    torch.testing.assert_close(lse.double(), want_lse.detach(), rtol=max(tolerance, 1e-6), atol=max(tolerance, 1e-6))
    if not gradients or not len(q) or not len(k):
        return o, lse, None
    g = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o)
    have = torch.autograd.grad(o, (q, k, v), g)
    for x, y in zip(have, torch.autograd.grad(want, exact, g.double())):
        close(x, y, tolerance)
    return o, lse, have


def close(have, want, tolerance):
    assert have.shape == want.shape
    error = (have.double() - want).norm()
    size = max(want.norm().item(), 0.1 * want.numel() ** 0.5)  # the exact gradient of a single key is 0
    assert error <= tolerance * size, f"relative error {error / size:.2g}"


@pytest.mark.parametrize("d_qk,d_v", SIZES)
@pytest.mark.parametrize("causal,window,softcap", CASES)
def test_in_torch(causal, window, softcap, d_qk, d_v):
    """Sequences of length 0 and 1, with more keys than queries, with fewer, and without keys."""
    inputs = tensors([0, 1, 6, 3, 5, 2, 0], [2, 1, 6, 7, 3, 0, 0], 4, 2, d_qk, d_v)
    check(inputs, 1e-12, causal=causal, window=window, softcap=softcap)


@pytest.mark.parametrize("causal,window,softcap", CASES)
@pytest.mark.parametrize("n,m", [(1, 1), (6, 6), (3, 7), (5, 3)])
def test_definition(n, m, causal, window, softcap):
    q, k, v, cu_q, cu_k, *_ = tensors([n], [m], 4, 2, 12, 8)
    have = definition.attention(q, k, v, definition.visible(n, m, causal, window), 0.4, softcap)
    for x, y in zip(have, reference(q, k, v, cu_q, cu_k, 0.4, causal, window, softcap)):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_other_dtypes(dtype, tolerance, softcap):
    check(tensors([1, 6, 0, 5], [4, 6, 1, 3], 6, 2, 8, 8, dtype), tolerance, softcap=softcap)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_by_hand(impl):
    """Scores log 1, log 2, log 5: weights 1/8, 2/8, 5/8; the first query of two sees two keys: 1/3, 2/3."""
    if impl == "triton":
        need_kernels()
        if torch.cuda.is_available():
            pytest.skip("kernels take no CPU tensors where a GPU compiles them")
    q = torch.ones(2, 1, 1)
    k, v = torch.tensor([1.0, 2.0, 5.0]).log().view(3, 1, 1), torch.tensor([8.0, 16.0, 32.0]).view(3, 1, 1)
    o, lse = attention(q, k, v, cumulative([2]), cumulative([3]), 2, 3, scale=1.0, impl=impl)
    torch.testing.assert_close(o.flatten(), torch.tensor([8 / 3 + 32 / 3, 1 + 4 + 20.0]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([3.0, 8.0]).log())


def need_kernels():
    pytest.importorskip("triton")
    pytest.importorskip("minir1.kernels.attention", exc_type=ImportError)  # a checkout without links


def test_queries_that_see_no_key():
    """Three queries, one key: the first two come before it, and get no gradient."""
    q, k, v, *bounds = tensors([3], [1], 2, 1, 8, 8)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    o, lse = attention(q, k, v, *bounds)
    assert (o[:2] == 0).all() and (lse[:, :2] == -math.inf).all() and lse[:, 2].isfinite().all()
    o.sum().backward()
    assert (q.grad[:2] == 0).all() and q.grad.isfinite().all() and k.grad.isfinite().all()
    assert torch.equal(v.grad, torch.full_like(v, 2))  # of the last query, both heads


def test_without_any_key_there_is_a_gradient_of_zero():
    q, k, v, *bounds = tensors([2, 1], [0, 0], 2, 1, 8, 8)
    q.requires_grad_()
    o, _ = attention(q, k, v, *bounds)
    o.sum().backward()
    assert (o == 0).all() and (q.grad == 0).all()


def test_packed_equals_alone():
    lengths = [4, 0, 7, 1]
    q, k, v, cu, _, longest, _ = tensors(lengths, lengths, 4, 2, 8, 8, torch.float32)
    o, lse = attention(q, k, v, cu, cu, longest, longest)
    for start, n in zip(cu.tolist(), lengths):
        s, one = slice(start, start + n), cumulative([n])
        alone, alone_lse = attention(q[s], k[s], v[s], one, one, n, n)
        assert torch.equal(alone, o[s]) and torch.equal(alone_lse, lse[:, s])


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("window,softcap", [(None, None), (4, None), (None, 2.0), (3, 1.5)])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("H,K,d_qk,d_v", [(4, 4, 8, 8), (6, 2, 12, 8), (7, 1, 8, 12)])
def test_decode_equals_attention(H, K, d_qk, d_v, new, window, softcap):
    past, slots = [0, 5, 2], 9
    q, _, _, *_ = tensors([3 * new], [1], H, K, d_qk, d_v)
    _, k, v, *_ = tensors([1], [3 * slots], H, K, d_qk, d_v)
    q, k, v = q.view(3, new, H, d_qk), k.view(3, slots, K, d_qk), v.view(3, slots, K, d_v)
    how = dict(scale=0.4, window=window, softcap=softcap)
    have = decode_attention(q, k, v, torch.tensor(past), **how)
    torch.testing.assert_close(have, definition.decode_attention(q, k, v, torch.tensor(past), **how))
    for b, n in enumerate(past):
        length = n + new
        want, _ = reference(q[b], k[b, :length], v[b, :length], cumulative([new]), cumulative([length]), **how)
        torch.testing.assert_close(have[b], want, rtol=1e-5, atol=1e-6)  # the bias is fp32, and so is 0 and -inf


def test_a_latent_is_key_and_value():
    gen = torch.Generator().manual_seed(0)
    q_lat, q_rope, latent = (torch.randn(*s, generator=gen) for s in ((2, 3, 4, 16), (2, 3, 4, 6), (2, 8, 22)))
    past = torch.tensor([1, 5])
    have = decode_latent(q_lat, q_rope, latent, past, 0.3)
    k = latent.unsqueeze(2)
    want = decode_attention(torch.cat((q_lat, q_rope), -1), k, k[..., :16].contiguous(), past, 0.3)
    torch.testing.assert_close(have, want)
    torch.testing.assert_close(have, definition.decode_latent(q_lat, q_rope, latent, past, 0.3))


# ---------------------------------------------------------------- bad arguments


def good():
    q, k, v, cu_q, cu_k, max_q, max_k = tensors([2, 3], [4, 3], 4, 2, 8, 6, torch.float32)
    return dict(q=q, k=k, v=v, cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k)


INT = dict(dtype=torch.int32)
BAD = [
    (dict(q=torch.zeros(5, 32)), r"^q \(5, 32\): want \[N, H, Dqk\]"),
    (dict(k=torch.zeros(7, 2, 9)), r"^k \(7, 2, 9\): want \[M, K, 8\] with K dividing 4 heads"),
    (dict(k=torch.zeros(7, 3, 8)), r"^k \(7, 3, 8\): want"),
    (dict(v=torch.zeros(6, 2, 6)), r"^v \(6, 2, 6\): want \[7, 2, Dv\]"),
    (dict(k=torch.zeros(7, 2, 8, dtype=torch.bfloat16)), "^k is torch.bfloat16, q torch.float32"),
    (dict(q=torch.zeros(5, 4, 8, dtype=torch.int64)), "^q is torch.int64"),
    (dict(v=torch.zeros(7, 2, 6, device="meta")), "^v is on meta, q on cpu"),
    (dict(cu_q=torch.zeros(3, dtype=torch.int32, device="meta")), "^cu_q is on meta, q on cpu"),
    (dict(k=torch.zeros(7, 1, 8).expand(7, 2, 8)), "^k has stride 0"),
    (dict(q=torch.zeros(1, 4, 8).expand(5, 4, 8)), "^q has stride 0"),
    (dict(cu_q=torch.tensor([0, 2, 5])), r"^cu_q torch.int64 \(3,\): want int32 \[B \+ 1\]"),
    (dict(cu_k=torch.zeros(0, **INT)), "^cu_k torch.int32"),
    (dict(cu_k=torch.tensor([0, 7], **INT)), "^cu_k has 2 numbers, cu_q 3"),
    (dict(cu_q=torch.tensor([0, 2, 4], **INT)), "^cu_q goes from 0 to 4: must go from 0 to 5"),
    (dict(cu_k=torch.tensor([1, 4, 7], **INT)), "^cu_k goes from 1 to 7"),
    (dict(cu_k=torch.tensor([0, 9, 7], **INT)), "^cu_k falls, a sequence of length -2"),
    (dict(max_q=2), "^max_q=2: the longest sequence of cu_q has 3"),
    (dict(max_k=-1), "^max_k=-1"),
    (dict(window=0), "^window=0: must be at least 1"),
    (dict(softcap=-1.0), "^softcap=-1.0: must be above 0"),
    (dict(impl="cuda"), "^impl='cuda': choose one of auto, triton, torch"),
]


@pytest.mark.parametrize("wrong,message", BAD)
def test_bad_input(wrong, message):
    with pytest.raises(ValueError, match=message):
        attention(**good() | wrong)


def good_decode():
    q, k = torch.zeros(2, 1, 4, 8), torch.zeros(2, 5, 2, 8)
    return dict(q=q, k=k, v=k, past=torch.tensor([0, 4]))


BAD_DECODE = [
    (dict(q=torch.zeros(2, 4, 8)), r"^q \(2, 4, 8\): want \[B, T, H, Dqk\]"),
    (dict(k=torch.zeros(3, 5, 2, 8)), r"^k \(3, 5, 2, 8\): want \[2, M, K, 8\]"),
    (dict(v=torch.zeros(2, 4, 2, 8)), r"^v \(2, 4, 2, 8\): want \[2, 5, 2, Dv\]"),
    (dict(past=torch.tensor([0, 5])), r"^past in \[0, 5\]: with 1 new tokens it must lie in 0 to 4"),
    (dict(past=torch.tensor([-1, 4])), r"^past in \[-1, 4\]"),
    (dict(past=torch.tensor([0.0, 4.0])), "^past torch.float32"),
    (dict(past=torch.tensor([0])), r"^past torch.int64 \(1,\): want an integer for each of 2 rows"),
    (dict(k=torch.zeros(2, 5, 1, 8).expand(2, 5, 2, 8)), "^k has stride 0"),
    (dict(window=0), "^window=0"),
]


@pytest.mark.parametrize("wrong,message", BAD_DECODE)
def test_bad_input_of_decoding(wrong, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(**good_decode() | wrong)


def test_bad_input_of_latent_decoding():
    q_lat, q_rope, latent, past = torch.zeros(2, 1, 4, 16), torch.zeros(2, 1, 4, 8), torch.zeros(2, 5, 24), [0, 4]
    for wrong, message in [
        ((q_lat[0], q_rope, latent, past), "^q_lat"),
        ((q_lat, q_rope[:1], latent, past), "^q_rope"),
        ((q_lat, q_rope, latent[..., 1:], past), r"^latent \(2, 5, 23\): want \[2, M, 24\]"),
        ((q_lat, q_rope.half(), latent, past), "^q_rope is torch.float16"),
        ((q_lat, q_rope, latent, [0, 9]), "^past"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode_latent(*wrong[:3], torch.tensor(wrong[3]), 0.1)


def test_triton_by_name_says_why_it_cannot(monkeypatch):
    need_kernels()
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # with a GPU, too: what is wrong is said before anything runs
    kinds = dict(cpu="the tensors are on cpu", fp64="fp64|float64", large="up to 256 numbers, not 257")
    q, k = torch.zeros(5, 4, 257), torch.zeros(7, 2, 257)
    with pytest.raises(ValueError, match=kinds["fp64"]):
        attention(**good() | {x: good()[x].double() for x in "qkv"}, impl="triton")
    with pytest.raises(ValueError, match=kinds["large"]):
        attention(**good() | dict(q=q, k=k), impl="triton")
    with pytest.raises(ValueError, match="no backward: decode under torch.no_grad"):
        decode_attention(**good_decode() | dict(q=torch.zeros(2, 1, 4, 8, requires_grad=True)), impl="triton")
    with pytest.raises(ValueError, match="a power of two from 16 to 512"):
        latent = torch.zeros(2, 5, 24 + 8)
        decode_latent(latent[:, :1, None, :24], latent[:, :1, None, 24:], latent, torch.tensor([0, 1]), 1.0,
                      impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=kinds["cpu"]):
        attention(**good(), impl="triton")
    monkeypatch.setenv("MINIR1_KERNELS", "triton")
    with pytest.raises(ValueError, match=f"MINIR1_KERNELS=triton: {kinds['cpu']}"):
        attention(**good())
    monkeypatch.setenv("MINIR1_KERNELS", "torch")
    attention(**good())


def test_auto_on_the_cpu_is_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "minir1.kernels.attention", None)  # importing it would fail
    attention(**good())
    decode_attention(**good_decode())


def test_without_queries_gradients_are_zero():
    q, k, v = (torch.randn(n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (0, 5, 5))
    o, lse = attention(q, k, v, torch.tensor([0, 0], dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32), 0, 5)
    assert o.shape == (0, 2, 8) and lse.shape == (2, 0)
    assert [x.abs().sum().item() for x in torch.autograd.grad(o.sum(), (q, k, v))] == [0, 0, 0]


def test_decoding_of_nothing_is_empty():
    for B, T in ((0, 1), (2, 0)):
        q, k = torch.zeros(B, T, 4, 8), torch.zeros(B, 6, 2, 8)
        past = torch.zeros(B, dtype=torch.int64)
        assert decode_attention(q, k, k[..., :5], past, scale=1.0).shape == (B, T, 4, 5)
