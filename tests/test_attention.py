"""attention.py against a softmax written out, one head and one query at a time."""
import pytest
import standin
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minir1.model.attention import (
    _attention_and_log_z,
    cached_attention,
    cached_latent_attention,
    causal_attention,
    chunk_attention,
)
from minir1.ops import attention, decode_attention, decode_latent
from minir1.ops.decode import over_slots

DEVICE = standin.register()
SIZES = [(8, 8), (12, 8), (8, 12), (6, 4)]  # d_qk, d_v
RATIOS = [(4, 4), (4, 2), (4, 1), (7, 1), (6, 3)]  # H, K


def naive(q, k, v, scale, visible):
    """visible [B, T, S]"""
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    shared = q.shape[2] // k.shape[2]
    for b, t, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        s = visible[b, t].nonzero().squeeze(1)
        weights = (k[b, s, h // shared] @ q[b, t, h] * scale).softmax(0)
        out[b, t, h] = weights @ v[b, s, h // shared]
    return out


def tensors(B, T, S, H, K, d_qk, d_v, dtype=torch.float32):
    gen = torch.Generator().manual_seed(H * 100 + K * 10 + d_qk)
    shapes = (B, T, H, d_qk), (B, S, K, d_qk), (B, S, K, d_v)
    return [torch.randn(*shape, generator=gen).to(dtype) for shape in shapes]


@pytest.mark.parametrize("d_qk,d_v", SIZES)
@pytest.mark.parametrize("H,K", RATIOS)
def test_causal(H, K, d_qk, d_v):
    B, T = 2, 5
    q, k, v = (x.double().requires_grad_() for x in tensors(B, T, T, H, K, d_qk, d_v))
    have = causal_attention(q, k, v, 0.4)
    want = naive(q, k, v, 0.4, torch.ones(B, T, T).tril().bool())
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(have, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("d_qk,d_v", SIZES)
@pytest.mark.parametrize("H,K", RATIOS)
def test_cached(H, K, d_qk, d_v):
    """Two new tokens per row, in different slots of a cache of six."""
    q, k, v = tensors(2, 2, 6, H, K, d_qk, d_v)
    visible = torch.arange(6) <= torch.tensor([[1, 2], [4, 5]]).unsqueeze(-1)
    bias = torch.zeros(2, 2, 6).masked_fill(~visible, float("-inf"))
    have = over_slots(q, k, v, bias, 0.4)
    torch.testing.assert_close(have, naive(q, k, v, 0.4, visible), rtol=1e-5, atol=1e-6)


def test_scores_above_the_largest_fp16_number_before_their_scale():
    """q·k = 80,000, and 10,000 after the scale: as in a prefill, and in blocks of one."""
    q, k = torch.full((1, 1, 1, 8), 100.0).half(), torch.full((1, 2, 1, 8), 100.0).half()
    k[:, 1] *= 0.5
    v, bias, position = torch.randn(1, 2, 1, 8).half(), torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.int64)
    want = v[:, :1]  # the first key takes all of the weight
    torch.testing.assert_close(cached_attention(q, k, v, position, bias, 0.125), want)
    there = _attention_and_log_z(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), 0.125, causal=False)[0]
    torch.testing.assert_close(there.cpu().transpose(1, 2), want)
    latent = torch.cat((k, k), -1).squeeze(2)
    both = torch.cat((q, q), -1)
    torch.testing.assert_close(cached_latent_attention(both, latent, position, bias, 0.125, 8), k[:, :1])
    past = position[:, 0]
    for softcap in (None, 1e5):
        out = decode_attention(q, k, v, past, 0.125, softcap=softcap, impl="torch")
        torch.testing.assert_close(out, want)
        flat, bounds = (q[0], k[0], v[0]), [torch.tensor([0, n], dtype=torch.int32) for n in (1, 2)]
        out, lse = attention(*flat, *bounds, 1, 2, 0.125, softcap=softcap, impl="torch")
        torch.testing.assert_close(out, want[0])
        assert lse.item() == pytest.approx(1e4, rel=4e-3)
    torch.testing.assert_close(decode_latent(q, q, latent, past, 0.125, impl="torch"), k[:, :1])


def test_masked_slots_have_no_effect():
    q, k, v = tensors(1, 1, 4, 2, 1, 8, 8)
    bias = torch.tensor([[[0.0, 0.0, float("-inf"), float("-inf")]]])
    before = over_slots(q, k, v, bias, 0.4)
    k[:, 2:], v[:, 2:] = 1e4, -1e4
    assert torch.equal(over_slots(q, k, v, bias, 0.4), before)


@pytest.mark.parametrize("d_qk,d_v", SIZES)
@pytest.mark.parametrize("H,K", RATIOS)
def test_chunk_over_blocks_of_the_past(H, K, d_qk, d_v):
    """Queries 4 to 6 of seven tokens, the past in blocks of three and one."""
    q, k, v = (x.double() for x in tensors(2, 7, 7, H, K, d_qk, d_v))
    past = zip(k[:, :4].split(3, dim=1), v[:, :4].split(3, dim=1))
    have = chunk_attention(q[:, 4:], k[:, 4:], v[:, 4:], past, 0.4)
    want = naive(q, k, v, 0.4, torch.ones(2, 7, 7).tril().bool())[:, 4:]
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


def test_merging_parts_whose_scores_lie_far_apart():
    q, k, v = tensors(1, 2, 2, 2, 1, 8, 8)
    near, far = (k * 1000, v), (k * -1000, v + 1)
    have = chunk_attention(q, k, v, [near, far], 1.0)
    both = torch.cat((near[0], far[0], k), 1), torch.cat((near[1], far[1], v), 1)
    visible = torch.tensor([[True] * 5 + [False], [True] * 6]).expand(1, 2, 6)
    torch.testing.assert_close(have, naive(q, *both, 1.0, visible), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("H,K", RATIOS)
def test_blocks_on_another_device_equal_those_on_the_cpu(H, K, causal):
    """It runs row by row, in plain operations."""
    q, k, v = tensors(2, 5, 5, H, K, 8, 12)
    there = _attention_and_log_z(*(x.to(DEVICE) for x in (q, k, v)), 0.4, causal)
    for have, want in zip(there, _attention_and_log_z(q, k, v, 0.4, causal)):
        torch.testing.assert_close(have.cpu(), want)


def test_large_scores_in_half_precision_stay_finite():
    q, k, v = tensors(1, 4, 4, 2, 2, 16, 16, torch.bfloat16)
    bias = torch.zeros(1, 4, 4).masked_fill(~torch.ones(4, 4).tril().bool(), float("-inf"))
    for out in (causal_attention(q * 100, k * 100, v, 1.0), over_slots(q * 100, k * 100, v, bias, 1.0)):
        assert out.dtype == torch.bfloat16 and out.isfinite().all()


class Largest(TorchDispatchMode):
    """The largest number of elements of any operator's result."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("H,K,d_qk,d_v", [(2, 2, 12, 8), (2, 2, 8, 12), (4, 2, 8, 8), (4, 1, 12, 8)])
def test_no_score_matrix_is_in_memory(H, K, d_qk, d_v):
    """SDPA falls back to [T, T] scores where it cannot fuse: forward and backward must stay linear in T."""
    T = 256
    q, k, v = (x.requires_grad_() for x in tensors(1, T, T, H, K, d_qk, d_v))
    with Largest() as largest:
        causal_attention(q, k, v, 0.3).sum().backward()
    assert largest.numel <= T * H * max(d_qk, d_v)
