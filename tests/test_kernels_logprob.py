"""The Triton log-prob against fp64: in the interpreter without a GPU, compiled with one."""
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
kernel = pytest.importorskip("minir1.kernels.logprob", exc_type=ImportError)  # a checkout without links

from test_ops import IGNORE, SETTINGS, problem, reference  # noqa: E402

from minir1.ops import linear_logprob  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def put(*tensors):
    return [x.to(DEVICE) for x in tensors]


def check(h, w, target, atol, **kw):
    logp, ent = linear_logprob(h, w, target, impl="triton", entropy=True, **kw)
    want, want_H = reference(h.double(), w.double(), target, **kw)
    assert logp.dtype == ent.dtype == torch.float32
    torch.testing.assert_close(logp.double(), want, rtol=0, atol=atol)
    torch.testing.assert_close(ent.double(), want_H, rtol=0, atol=atol)
    return logp, ent


@pytest.mark.parametrize("V", [1, 63, 64, 65, 300])  # up to three splits of the interpreter
@pytest.mark.parametrize("N", [0, 1, 31, 33, 129])
def test_ragged_shapes(N, V):
    check(*put(*problem(N, D=40, V=V, dtype=torch.float32)), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kw", SETTINGS)
def test_settings_and_dtypes(kw, dtype):
    """With 16-bit inputs too: nothing but the inputs is rounded."""
    check(*put(*problem(33, D=72, V=130, dtype=dtype)), atol=1e-5, **kw)


def test_as_accurate_as_torch():
    h, w, target = put(*problem(64, D=64, V=1000, dtype=torch.float32, size=4.0, ignored=0))
    exact, _ = reference(h.double(), w.double(), target)
    theirs, _ = reference(h, w, target)
    ours, _ = linear_logprob(h, w, target, impl="triton")
    assert (ours - exact).abs().max() <= 1.2 * (theirs - exact).abs().max()


@pytest.mark.parametrize("V", [63, 65, 130])
def test_phantom_columns_add_nothing(V):
    """All logits about -120: a column past V with logit 0 would swallow the rest."""
    h = torch.full((3, 1), -1.0)
    w = 120 + torch.rand(V, 1, generator=torch.Generator().manual_seed(0))
    logp, _ = check(*put(h, w, torch.tensor([0, 1, V - 1])), atol=2e-5)
    assert (logp < 0).all()


def test_large_logits_keep_their_digits():
    check(*put(torch.ones(1, 1), torch.tensor([[30000.0], [29999.0]]), torch.tensor([0])), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance_to_the_bit(dtype):
    """A row alone, a slice and a shuffle. The interpreter multiplies with numpy, whose rounding depends on
    the place of a row in a tile: there the inputs are such that products and their sums are exact."""
    h, w, target = put(*problem(70, D=72, V=300, dtype=dtype))
    if kernel.INTERPRET:
        h, w = (h * 4).round() / 4, (w * 8).round() / 8
    run = lambda rows: linear_logprob(h[rows], w, target[rows], impl="triton", entropy=True)
    logp, ent = run(slice(None))
    again = run(slice(None))
    assert torch.equal(logp, again[0]) and torch.equal(ent, again[1])
    for rows in (slice(0, 1), slice(37, 38), slice(69, 70), slice(5, 40), torch.randperm(70)):
        part, part_H = run(rows)
        assert torch.equal(part, logp[rows]) and torch.equal(part_H, ent[rows])


def test_targets_ignored_and_out_of_range():
    h, w, target = put(*problem(6, dtype=torch.float32, ignored=0))
    target[1], target[2], target[3] = IGNORE, 67, -1
    logp, ent = linear_logprob(h, w, target, impl="triton", entropy=True)
    assert logp[1] == 0 and ent[1] == 0
    assert logp.isnan().tolist() == [False, False, True, True, False, False]
    assert linear_logprob(h, w, target, impl="triton", ignore_index=-1)[0][3] == 0


@pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's, where the interpreter meets an infinity
def test_reads_and_writes_only_its_own(monkeypatch):
    """Inputs lie among infinities, outputs are NaN before and stand between guards."""
    N, D, V = 33, 40, 130
    h, w, target = put(*problem(N, D, V, dtype=torch.float32))
    around_h = h.new_full((N + 2, 2 * D + 4), float("inf"))
    around_w = w.new_full((D + 2, V + 2), float("inf"))
    around_h[1:-1, 2:-2:2], around_w[1:-1, 1:-1] = h, w.T
    guarded = []

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *shape, **kw):
            n = torch.Size(shape).numel()
            whole = torch.full((n + 512,), 12345.0, **kw)
            whole[256 : n + 256] = float("nan")
            guarded.append(whole)
            return whole[256 : n + 256].view(shape)

    monkeypatch.setattr(kernel, "torch", Torch())
    check(around_h[1:-1, 2:-2:2], around_w[1:-1, 1:-1].T, target, atol=1e-5)
    assert len(guarded) == 3
    for whole in guarded:
        assert (whole[:256] == 12345).all() and (whole[-256:] == 12345).all()
        assert whole.isfinite().all()


COMPILE = """
import os, re, subprocess, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import torch, minir1.kernels.logprob as L

tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
fn = L._partials_kernel
for arch in (80, 90):
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        blocks = L._blocks(dtype)
        options = {k: blocks.pop(k) for k in ("num_warps", "num_stages")}
        const = dict(SOFTCAP=True, INTERPRET=False, stride_hd=1, stride_wd=1, **blocks)
        kinds = dict(h_ptr="*" + name, w_ptr="*" + name, target_ptr="*i64", part_ptr="*fp32",
                     scale="fp32", cap="fp32", inv_temperature="fp32")
        signature = {a: "constexpr" if a in const else kinds.get(a, "i32") for a in fn.arg_names}
        index = {a: (i,) for i, a in enumerate(fn.arg_names)}
        aligned = ("h_ptr", "w_ptr", "D", "stride_hn", "stride_wv")
        by_16 = {index[a]: [["tt.divisibility", 16]] for a in aligned}
        source = ASTSource(fn, signature, {index[a]: v for a, v in const.items()}, by_16)
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(built.asm["cubin"]), f.flush()
            run = lambda flag: subprocess.check_output([tool, flag, f.name], text=True)
            usage, sass = run("-res-usage"), run("-sass")
        narrow = len(re.findall(r"tt.addptr .*, tensor<[0-9x]*xi32>", built.asm["ttir"]))
        print(arch, name, re.search(r"STACK:(\\d+)", usage)[1], built.metadata.shared,
              len(re.findall(r"\\bHGMMA", sass)), len(re.findall(r"\\bHMMA", sass)), narrow)
"""


def test_compiles_for_gpus_that_are_not_here():
    """sm_80 and sm_90: no spill to speak of, shared memory fits, tensor cores for bf16, 64-bit offsets."""
    import triton

    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    if not os.path.exists(os.path.join(tools, "cuobjdump")):
        pytest.skip("this triton carries no cuobjdump")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, env=env, cwd=root, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^(\d+) (\w+) (\d+) (\d+) (\d+) (\d+) (\d+)$", done.stdout, re.M)
    assert len(lines) == 4, done.stdout
    for arch, name, *numbers in lines:
        spilled, shared, hgmma, hmma, narrow = map(int, numbers)
        assert spilled <= (0 if arch == "90" else 256), (arch, name, spilled)  # bytes a thread
        assert shared <= (227 if arch == "90" else 163) * 1024
        assert narrow == 0
        assert (hgmma if arch == "90" else hmma) > 0 or name == "fp32"
        assert name == "bf16" or hgmma == hmma == 0  # fp32 is not rounded to tf32
