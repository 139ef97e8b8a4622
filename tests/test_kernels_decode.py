"""The Triton decoding against fp64: in the interpreter without a GPU, compiled with one."""
import pytest
import torch
from test_kernels_attention import DEVICE, Guarded, check_equal_bits_under_load
from test_ops_attention import close

from minir1.kernels import decode as kernel
from minir1.ops import decode_attention, decode_latent

SPLIT = 64  # of the interpreter, in blocks of 32


def problem(past, slots, new, H, K, d_qk, d_v, dtype=torch.float32, size=1.0):
    gen, B = torch.Generator().manual_seed(0), len(past)
    shapes = (B, new, H, d_qk), (B, slots, K, d_qk), (B, slots, K, d_v)
    q, k, v = (torch.randn(*shape, generator=gen).mul(size).to(dtype).to(DEVICE) for shape in shapes)
    return q, k, v, torch.tensor(past, dtype=torch.int64, device=DEVICE)


def check(inputs, tolerance=2e-6, **how):
    have = decode_attention(*inputs, impl="triton", **how)
    q, k, v, past = inputs
    want = decode_attention(q.double(), k.double(), v.double(), past, impl="torch", **how)
    assert have.dtype == q.dtype
    close(have, want, tolerance)
    return have


@pytest.mark.parametrize("H,K,d_qk,d_v", [(2, 2, 64, 64), (4, 2, 80, 96), (4, 1, 128, 128), (7, 1, 24, 20),
                                          (16, 2, 5, 7), (2, 1, 192, 128)])
@pytest.mark.parametrize("new", [1, 3])
def test_heads(H, K, d_qk, d_v, new):
    """Rows of an empty cache and of a little more than one split."""
    check(problem([0, 65], 70, new, H, K, d_qk, d_v))


@pytest.mark.parametrize("past", [0, 31, 32, 62, 63, 64, 127, 128, 129])
def test_ends_at_the_edges_of_blocks_and_splits(past):
    check(problem([past], 130, 1, 2, 1, 16, 16))


@pytest.mark.parametrize("how", [dict(window=1), dict(window=20), dict(window=70), dict(softcap=2.0),
                                 dict(window=33, softcap=1.0, scale=0.7)])
def test_windows_and_softcap(how):
    """A window that starts after the first splits, and one that is longer than the row."""
    check(problem([5, 150], 160, 3, 2, 1, 16, 16), **how)


def test_more_queries_than_a_block_holds():
    check(problem([40], 50, 3, 20, 1, 16, 16))  # 60 rows in blocks of 16


@pytest.mark.parametrize("B,new,slots", [(0, 1, 5), (2, 0, 5)])
def test_nothing_to_do(B, new, slots):
    q, k, v, past = problem([0] * B, slots, new, 2, 1, 16, 16)
    assert decode_attention(q, k, v, past, impl="triton").shape == (B, new, 2, 16)


def test_scores_far_below_zero():
    q, k, v, past = problem([69], 72, 1, 1, 1, 16, 16)
    check((torch.full_like(q, 3.0), -10.0 - 0.1 * k.abs(), v, past), 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(problem([70, 3], 80, 2, 4, 2, 32, 32, dtype), 5e-3)


def test_batch_invariance_to_the_bit():
    """A row alone, and beside longer ones in a longer cache."""
    q, k, v, past = problem([3, 70, 130], 140, 2, 2, 1, 16, 16)
    whole = check((q, k, v, past))
    assert torch.equal(whole, check((q, k, v, past)))
    for b, n in enumerate((3, 70, 130)):
        row, slots = slice(b, b + 1), n + 2
        alone = decode_attention(q[row], k[row, :slots], v[row, :slots], past[row], impl="triton")
        assert torch.equal(alone, whole[row])


def test_slots_beyond_the_end_are_ignored():
    q, k, v, past = problem([3, 70], 150, 1, 4, 2, 16, 16)
    want = check((q, k, v, past))
    k[0, 4:], v[0, 4:], k[1, 71:], v[1, 71:] = (float("nan"),) * 4
    assert torch.equal(decode_attention(q, k, v, past, impl="triton"), want)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_reads_and_writes_only_its_own(monkeypatch):
    """In the layout of minir1.model.cache, surrounded by infinities; splits beyond the end of a row are not written."""
    monkeypatch.setattr(kernel, "torch", guarded := Guarded())
    q, k, v, past = problem([5, 129], 131, 2, 4, 2, 24, 20)
    storage = q.new_full((2, 2, 2, 133, 28), float("inf"))  # [B, K, 2, M, d]
    k_in, v_in = storage[:, :, 0, 1:-1, 2:26].transpose(1, 2), storage[:, :, 1, 1:-1, 2:22].transpose(1, 2)
    k_in.copy_(k), v_in.copy_(v)
    check((q, k_in, v_in, past))
    part, lse, o = guarded.all
    assert all((x[:256] == 12345).all() and (x[-256:] == 12345).all() for x in guarded.all)
    assert not o.isnan().any()
    splits = lse[256:-256].view(2, 2, 4, 3)  # [B, K, rows, splits]
    assert splits[0, ..., 1:].isnan().all() and not splits[1].isnan().any()


# ---------------------------------------------------------------- latents


def latent_problem(past, slots, new, H, C, R, dtype=torch.float32):
    gen, B = torch.Generator().manual_seed(0), len(past)
    shapes = (B, new, H, C), (B, new, H, R), (B, slots, C + R)
    return [torch.randn(*s, generator=gen).to(dtype).to(DEVICE) for s in shapes] + [torch.tensor(past, device=DEVICE)]


def check_latent(inputs, tolerance, scale=0.1):
    *tensors, past = inputs
    have = decode_latent(*tensors, past, scale, impl="triton")
    assert have.dtype == tensors[0].dtype
    close(have, decode_latent(*(x.double() for x in tensors), past, scale, impl="torch"), tolerance)


@pytest.mark.parametrize("C,R,H,new", [(16, 8, 2, 1), (64, 16, 4, 3), (512, 64, 5, 1), (32, 24, 20, 2)])
def test_latents(C, R, H, new):
    check_latent(latent_problem([0, 66], 70, new, H, C, R), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_in_half_precision(dtype):
    check_latent(latent_problem([9, 40], 70, 1, 4, 32, 16, dtype), 5e-3)


# ---------------------------------------------------------------- with a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 2e-6)])
@pytest.mark.parametrize("new", [1, 4])
def test_numerics_on_a_gpu(dtype, tolerance, new):
    past = [0, 511, 512, 513, 3000, 1700]
    for H, K, size in ((32, 8, 128), (28, 4, 128), (16, 16, 64), (8, 1, 96), (8, 2, 256)):
        check(problem(past, 3072, new, H, K, size, size, dtype), tolerance)
        check(problem(past, 3072, new, H, K, size, size, dtype), tolerance, window=600, softcap=5.0)
    for H in (16, 128):
        check_latent(latent_problem(past, 3072, new, H, 512, 64, dtype), tolerance, scale=0.04)


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    """The last row of a latent cache of more than 2^31 numbers."""
    slots = 2**31 // (4 * 576) + 100
    latent = torch.zeros(5, slots, 576, dtype=torch.bfloat16, device=DEVICE)
    latent[-1, :700] = torch.randn(700, 576, device=DEVICE)
    q_lat, q_rope, _, _ = latent_problem([0] * 5, 1, 1, 16, 512, 64, torch.bfloat16)
    past = torch.tensor([3, 3, 3, 3, 699], device=DEVICE)
    have = decode_latent(q_lat, q_rope, latent, past, 0.04, impl="triton")[-1:]
    cut = [x[-1:].double() for x in (q_lat, q_rope, latent[:, :700])]
    close(have, decode_latent(*cut, past[-1:], 0.04, impl="torch"), 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("latent", [False, True])
def test_no_race(latent):
    """A hundred calls over many splits of ragged rows."""
    past = [32_000, 1, 17_000, 600, 24_575, 0, 511, 9_999]
    if latent:
        *inputs, at = latent_problem(past, 32_768, 2, 16, 512, 64, torch.bfloat16)
        call = lambda: decode_latent(*inputs, at, 0.04, impl="triton", check=False)
    else:
        inputs = problem(past, 32_768, 2, 8, 2, 128, 128, torch.bfloat16)
        call = lambda: decode_attention(*inputs, impl="triton", check=False)
    check_equal_bits_under_load(lambda: (call(),), 100)


@pytest.mark.gpu
def test_a_step_can_be_recorded():
    """As a CUDA graph: replayed with other lengths it gives what a call would."""
    q, k, v, past = problem([5, 900], 2048, 1, 8, 2, 128, 128, torch.bfloat16)
    how = dict(impl="triton", check=False)
    decode_attention(q, k, v, past, **how)  # compiled before it is recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = decode_attention(q, k, v, past, **how)
    past.copy_(torch.tensor([2000, 17]))
    graph.replay()
    assert torch.equal(o, decode_attention(q, k, v, past, **how))
