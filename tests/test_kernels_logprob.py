"""The Triton log-prob against fp64: in the interpreter without a GPU, compiled with one."""
import pytest
import torch
from test_kernels_attention import DEVICE, Guarded, check_equal_bits_under_load
from test_ops import IGNORE, SETTINGS, gradients, masked_by_hand, masked_vocabulary, problem, reference

from minir1.kernels import logprob as kernel
from minir1.ops import linear_logprob

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ENGINES = ["hybrid", "fused"]
GRADIENT = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # relative norm, against fp64
each_engine = pytest.mark.parametrize("engine", ENGINES)


def put(*tensors):
    return [x.to(DEVICE) for x in tensors]


def ours(target, engine, **kw):
    return lambda h, w: linear_logprob(h, w, target, impl="triton", engine=engine, entropy=True, **kw)


def upstream(N, seed=1):
    """Gradients of log-prob and entropy that differ from token to token."""
    return torch.randn(2, N, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def compare(have, want, dtype, atol):
    for a, b in zip(have[:2], want[:2]):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=0, atol=atol)
    for a, b in zip(have[2:], want[2:]):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.double() - b).norm() <= GRADIENT[dtype] * b.norm()


def check_values(h, w, target, engine, atol):
    """Only values: here gradients are small differences of large numbers."""
    have = ours(target, engine)(h, w)
    compare(have, reference(h.double(), w.double(), target), h.dtype, atol)
    return have[0]


def check(h, w, target, engine, atol=1e-5, chunk_bytes=None, **kw):
    """Values and gradients of both outputs against fp64."""
    g, g_H = upstream(len(h))
    want = gradients(lambda h, w: reference(h, w, target, **kw), h.double(), w.double(), g, g_H)
    have = gradients(ours(target, engine, chunk_bytes=chunk_bytes, **kw), h, w, g, g_H)
    compare(have, want, h.dtype, atol)
    return have


@pytest.mark.parametrize("N, V", [(0, 63), (1, 1), (1, 300), (31, 64), (33, 65), (129, 193)])
@each_engine
def test_ragged_shapes(N, V, engine):
    """Up to three splits, three tiles of tokens and three of columns in the interpreter."""
    check(*put(*problem(N, D=40, V=V, dtype=torch.float32)), engine)


@pytest.mark.parametrize("kw", SETTINGS[1:])
@each_engine
def test_settings(kw, engine):
    check(*put(*problem(33, D=40, V=130, dtype=torch.float32)), engine, **kw)


@each_engine
def test_masked_entries(engine):
    def on_device(*inputs, **kw):
        return [x.cpu() for x in linear_logprob(*put(*inputs), impl="triton", engine=engine, **kw)]

    masked_by_hand(on_device, entropy=True)
    masked_vocabulary(on_device, temperature=0.7)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@each_engine
def test_16_bit_inputs(dtype, engine):
    """Nothing but the inputs, dx and the gradients is rounded."""
    check(*put(*problem(33, D=72, V=130, dtype=dtype)), engine, **SETTINGS[-1])


@each_engine
def test_many_chunks_in_the_backward(engine):
    """One row and 128 columns at a time: dh and dw are summed over chunks."""
    check(*put(*problem(4, D=24, V=300, dtype=torch.float32, ignored=0)), engine, chunk_bytes=1)


@pytest.mark.parametrize("engine,kw", [
    ("hybrid", {}), ("fused", {}), ("hybrid", dict(softcap=50.0)), ("fused", dict(softcap=20.0)),
    ("fused", dict(softcap=3.0, temperature=1.6, logit_scale=1.7)),
    ("hybrid", dict(softcap=30.0, temperature=0.6, logit_scale=0.3)),
])
def test_as_accurate_as_torch(engine, kw):
    """Logits of deviation 6, under caps that most are far below or far above. The largest error of many tokens
    is random to a tenth; the norm of all is not."""
    h, w, target = put(*problem(512, D=32, V=500, dtype=torch.float32, size=6.0, ignored=0))
    exact = reference(h.double(), w.double(), target, **kw)
    theirs = reference(h, w, target, **kw)
    for a, b, want in zip(ours(target, engine, **kw)(h, w), theirs, exact):
        assert (a - want).abs().max() <= 1.2 * (b - want).abs().max()
        assert (a - want).norm() <= 1.1 * (b - want).norm()


@pytest.mark.parametrize("V", [63, 130])
@each_engine
def test_padding_columns_add_nothing(V, engine):
    """All logits about -120: a column past V with logit 0 would dominate."""
    h = torch.full((3, 1), -1.0)
    w = 120 + torch.rand(V, 1, generator=torch.Generator().manual_seed(0))
    h, w, target = put(h, w, torch.tensor([0, 1, V - 1]))
    assert (check_values(h, w, target, engine, atol=2e-5) < 0).all()
    ones = torch.ones(2, 3, device=DEVICE)
    *_, dh, dw = gradients(ours(target, engine), h, w, *ones)
    exact = gradients(lambda h, w: reference(h, w, target), h.double(), w.double(), *ones)
    assert (dh - exact[2]).norm() <= 2e-6 * w.norm() and (dw - exact[3]).norm() <= 1e-5


@each_engine
def test_large_logits_keep_their_digits(engine):
    check_values(*put(torch.ones(1, 1), torch.tensor([[30000.0], [29999.0]]), torch.tensor([0])), engine, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_is_batch_invariant_to_the_bit(dtype):
    """A row alone, a slice and a shuffle. The interpreter multiplies with numpy, whose rounding depends on
    the position of a row in a tile: there the inputs are such that products and their sums are exact."""
    h, w, target = put(*problem(70, D=40, V=300, dtype=dtype))
    if kernel.INTERPRET:
        h, w = (h * 4).round() / 4, (w * 8).round() / 8
    run = lambda rows: ours(target[rows], "fused")(h[rows], w)
    logp, ent = run(slice(None))
    for rows in (slice(37, 38), slice(69, 70), slice(5, 40), torch.randperm(70)):
        part, part_H = run(rows)
        assert torch.equal(part, logp[rows]) and torch.equal(part_H, ent[rows])


@each_engine
def test_a_repeated_call_gives_equal_bits(engine):
    h, w, target = put(*problem(40, D=40, V=200, dtype=torch.float32))
    first, second = (gradients(ours(target, engine), h, w, *upstream(40)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@each_engine
def test_targets_ignored_and_out_of_range(engine):
    h, w, target = put(*problem(6, dtype=torch.float32, ignored=0))
    logp, ent = kernel.linear_logprob(h, w, torch.where(target == target[2], 67, target), engine=engine, entropy=True)
    assert logp.isnan().any() and torch.equal(logp.isnan(), target == target[2]) and ent.isfinite().all()
    target[1], h[1] = IGNORE, float("nan")  # which padding may hold
    logp, ent, dh, dw = gradients(ours(target, engine), h, w, *upstream(6))
    assert logp[1] == ent[1] == 0 and not dh[1].any()
    assert all(x.isfinite().all() for x in (logp, ent, dh, dw))


@each_engine
def test_all_labels_ignored(engine):
    """Values and gradients are 0, even for hidden states of NaN."""
    h, w, target = put(*problem(35, V=130, dtype=torch.float32))
    h[3], target[:] = float("nan"), IGNORE
    logp, ent, dh, dw = gradients(ours(target, engine), h, w, *upstream(35))
    assert logp.shape == ent.shape == (35,) and dh.shape == h.shape and dw.shape == w.shape
    assert all(x.eq(0).all() for x in (logp, ent, dh, dw))  # and not NaN


AXIS = 65535  # programs on axis y or z of a grid


class Launches:
    """Replaces a module of kernels: records the grids, and launches nothing."""

    def __init__(self, jit):
        self.jit, self.grids = jit, {}

    def __getattr__(self, name):
        return self if name.endswith("_kernel") and not setattr(self, "last", name) else getattr(self.jit, name)

    def __getitem__(self, grid):
        self.grids.setdefault(self.last, []).append(grid)
        return lambda *args, **kw: None


@each_engine
def test_grids_hold_any_number_of_tokens(monkeypatch, engine):
    """More blocks of tokens than axes y and z may have go along x; with a large vocabulary too. On the meta device."""
    monkeypatch.setattr(kernel, "jit", launches := Launches(kernel.jit))
    largest = max(blocks["BLOCK_N"] for blocks in (*kernel.BLOCKS.values(), kernel.FOLD))
    N, V = AXIS * max(largest, 128) + 1, 3 * kernel.SPLIT
    monkeypatch.setattr(kernel, "TILE_N", N)  # even where the hybrid engine would take them in one piece
    h, w = (torch.empty(n, 16, device="meta", dtype=torch.bfloat16) for n in (N, V))
    target, grad = torch.empty(N, device="meta", dtype=torch.int64), torch.empty(2, N, device="meta")
    _, stat = kernel._forward(h, w, target, {}, engine)
    kernel._backward(h, w, target, stat, grad, {}, engine, 1 << 40, True, True)
    assert launches.grids.keys() == {"finish_kernel"} | (
        {"partials_kernel", "dx_kernel"} if engine == "fused" else {"fold_kernel", "unfold_kernel"})
    for grid in sum(launches.grids.values(), []):
        assert AXIS < grid[0] < 2**31 and all(n <= AXIS for n in grid[1:])


@pytest.mark.parametrize("used, frozen", [("logp", "h"), ("logp", "w"), ("entropy", "h"), ("entropy", "w")])
@each_engine
def test_one_output_and_one_input(used, frozen, engine):
    """With the gradient of a sum, whose stride is 0."""
    h, w, target = put(*problem(9, dtype=torch.float32))
    pick = 0 if used == "logp" else 1
    x = (w if frozen == "h" else h).requires_grad_()
    pair = (h, x) if frozen == "h" else (x, w)
    (want,) = torch.autograd.grad(reference(*(a.double() for a in pair), target)[pick].sum(), x)
    (have,) = torch.autograd.grad(ours(target, engine)(*pair)[pick].sum(), x)
    assert (have - want).norm() <= 2e-6 * want.norm()


@pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's, where the interpreter meets an infinity
@each_engine
def test_reads_and_writes_only_its_own(monkeypatch, engine):
    """Inputs, not contiguous, are surrounded by infinities; outputs are NaN before and lie between guards."""
    N, D, V = 33, 40, 130
    h, w, target = put(*problem(N, D, V, dtype=torch.float32, ignored=0))
    around_h = h.new_full((N + 2, 2 * D + 4), float("inf"))
    around_w = w.new_full((D + 2, V + 2), float("inf"))
    around_h[1:-1, 2:-2:2], around_w[1:-1, 1:-1] = h, w.T
    monkeypatch.setattr(kernel, "torch", guarded := Guarded())
    check(around_h[1:-1, 2:-2:2].detach(), around_w[1:-1, 1:-1].T.detach(), target, engine)
    assert len(guarded.all) == 4  # log-probs, statistics, partial sums, dx
    assert guarded.intact() and all(x.isfinite().all() for x in guarded.all)


@pytest.mark.parametrize("stretched", ["h", "w"])
@each_engine
def test_stride_0_is_read_as_it_is(stretched, engine):
    h, w, target = put(*problem(9, V=30, dtype=torch.float32, ignored=0))
    h = h[:1].expand(9, -1) if stretched == "h" else h
    w = w[:1].expand(30, -1) if stretched == "w" else w
    for a, b in zip(ours(target, engine)(h, w), reference(h.double(), w.double(), target)):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- with a GPU


def test_a_piece_of_dw_fits_the_bytes_of_dx_too():
    """By hand: 4 tokens leave dx room for 16,384 columns, but 256 rows of dw of width 256 are 262,144 bytes."""
    h, w, columns = torch.randn(4, 256), torch.randn(1000, 256), []
    kernel._two_products(h, w, lambda dx, n, v: columns.append(v) or dx.zero_(), 256 * 256 * 4, True, True)
    least = min(1000, max(256, kernel.DX_COLUMNS))
    assert [(v.start, v.stop) for v in columns] == [(a, min(1000, a + least)) for a in range(0, 1000, least)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@each_engine
def test_gpu_numerics(dtype, engine):
    """At a size with several tiles, splits and chunks: values to 1e-4, gradients no worse than torch's own."""
    h, w, target = put(*problem(1500, D=256, V=9000, dtype=dtype))
    g, g_H = upstream(1500)
    want = gradients(lambda h, w: reference(h, w, target), h.double(), w.double(), g, g_H)
    compare(gradients(ours(target, engine, chunk_bytes=8 << 20), h, w, g, g_H), want, dtype, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:])
@each_engine
def test_gpu_16_bit_gradients_are_as_good_as_torch_has_them(dtype, engine):
    h, w, target = put(*problem(512, D=256, V=9000, dtype=dtype, ignored=0))
    g, g_H = upstream(512)
    want = gradients(lambda h, w: reference(h, w, target), h.double(), w.double(), g, g_H)
    theirs = gradients(lambda h, w: [x.float() for x in reference(h, w, target)], h, w, g, g_H)
    for a, b, exact in zip(gradients(ours(target, engine), h, w, g, g_H), theirs, want):
        assert (a - exact).norm() <= 1.5 * (b - exact).norm()


@pytest.mark.gpu
@each_engine
def test_gpu_offsets_beyond_32_bits(engine):
    """h and w of more than 2^31 elements, as strided views; the last row and the last column count."""
    N, D, V, apart = 3, 64, 300, (1 << 31) // 128
    h, w, target = problem(N, D, V, dtype=torch.bfloat16, ignored=0)
    target[-1] = V - 1
    far_h = torch.empty(1 + (N - 1) * (1 << 30) + D, dtype=h.dtype, device="cuda")
    far_h = far_h.as_strided((N, D), (1 << 30, 1)).copy_(h)
    far_w = torch.empty(V * apart, dtype=w.dtype, device="cuda").as_strided((V, D), (apart, 1)).copy_(w)
    check(far_h, far_w, target.cuda(), engine)


@pytest.mark.gpu
@each_engine
def test_gpu_more_blocks_of_tokens_than_axis_y_has(engine):
    """65,536 blocks of 128 and a little: forward, and the gradients of the last tokens."""
    N = 128 * (AXIS + 1) + 5
    h, w, target = put(*problem(N, D=16, V=300, dtype=torch.bfloat16, ignored=0))
    g, g_H = upstream(N)
    logp, ent, dh, _ = gradients(ours(target, engine), h, w, g, g_H)
    tail = slice(-300, None)
    want = gradients(lambda h, w: reference(h, w, target[tail]), h[tail].double(), w.double(), g[tail], g_H[tail])
    compare((logp[tail], ent[tail], dh[tail]), want[:3], h.dtype, atol=1e-4)
    assert logp.isfinite().all() and (logp < 0).all()


@pytest.mark.gpu
@each_engine
def test_gpu_a_large_dx(engine):
    """300,000 tokens and 9,000 columns: dx of 2.7e9 elements, from one launch of more than 65,535 blocks."""
    h, w, target = put(*problem(300_000, D=16, V=9000, dtype=torch.bfloat16, ignored=0))
    g, g_H = upstream(len(h))
    logp, ent, dh, dw = gradients(ours(target, engine, chunk_bytes=6 << 30), h, w, g, g_H)
    tail = slice(-500, None)
    want = gradients(lambda h, w: reference(h, w, target[tail]), h[tail].double(), w.double(), g[tail], g_H[tail])
    compare((logp[tail], ent[tail], dh[tail]), want[:3], h.dtype, atol=1e-4)
    pieces = gradients(ours(target, engine), h, w, g, g_H)[3]
    assert (dw.double() - pieces.double()).norm() <= 1e-2 * dw.double().norm()


@pytest.mark.gpu
@each_engine
def test_gpu_races(engine):
    h, w, target = put(*problem(3000, D=256, V=20_000, dtype=torch.bfloat16))
    check_equal_bits_under_load(lambda: gradients(ours(target, engine), h, w, *upstream(3000)), 20)
