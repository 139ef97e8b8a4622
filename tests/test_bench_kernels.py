"""The benchmark of the kernels at toy size, and how it measures."""
import json
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from experiments.benchmarks import bench_kernels, bench_logprob, bench_timing


def test_cpu_part_at_toy_size(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_logprob, "cpu_peak", lambda work, *args: len(work(*args)()))  # in this process
    shape, out = (40, 16, 600), tmp_path / "figures.json"
    config = bench_kernels.Config(device="cpu", shape=shape, chunks=(1,), small=((30, 8, 20),), repeats=1, out=out)
    figures = bench_kernels.main(config)
    assert json.loads(out.read_text()) == figures
    assert figures["torch/1/time_ratio"] > 0 and figures["kl/torch/1/time_ratio"] > 0
    assert figures["naive/memory_ratio"] == figures["naive/time_ratio"] == 1
    assert 0 < figures["small/30x8x20/torch/seconds"] < 1
    assert 0 < figures["accuracy/torch/logp"] < 1e-5 and 0 < figures["accuracy/torch/dw"] < 2e-6
    if not torch.cuda.is_available():
        assert "figures of the kernels themselves are missing" in capsys.readouterr().out


def test_a_gpu_by_name_or_an_error():
    if torch.cuda.is_available():
        pytest.skip("has CUDA")
    with pytest.raises(ValueError, match="device='cuda': this machine has no GPU"):
        bench_kernels.main(bench_kernels.Config(device="cuda"))
    with pytest.raises(ValueError, match="figure = roof.png: the roofline is that of a GPU"):
        bench_kernels.main(bench_kernels.Config(device="cpu", figure=Path("roof.png")))


def test_all_ways_compute_the_same():
    batch = bench_logprob.inputs((20, 8, 30), "cpu", torch.float32)
    want = bench_logprob.both_ways(bench_logprob.naive, [batch])(0)
    for f in (bench_logprob.checkpointed, bench_logprob.ours(), bench_logprob.ours(chunk_bytes=1)):
        for a, b in zip(bench_logprob.both_ways(f, [batch])(3), want):
            torch.testing.assert_close(a, b)
    batch = bench_logprob.inputs((20, 8, 30), "cpu", torch.float32, teacher=True)
    want = bench_logprob.both_ways(bench_logprob.full_softmax_kl, [batch])(0)
    for a, b in zip(bench_logprob.both_ways(bench_logprob.our_kl(), [batch])(0), want):
        torch.testing.assert_close(a, b)


@pytest.fixture
def gpu_part(monkeypatch):
    """The code of the GPU part on the CPU, where the kernels are interpreted."""
    if torch.cuda.is_available():
        pytest.skip("has CUDA")
    pytest.importorskip("minir1.kernels.kl", exc_type=ImportError)
    monkeypatch.setattr(bench_logprob, "COPIES", 1)
    monkeypatch.setattr(torch, "compile", lambda f: f)
    make, timed = bench_logprob.inputs, bench_timing.interleaved
    monkeypatch.setattr(bench_logprob, "inputs", lambda shape, device, *rest, **kw: make(shape, "cpu", *rest, **kw))
    monkeypatch.setattr(bench_timing, "interleaved", lambda runs, n, device, refused: timed(runs, n, "cpu", refused))
    monkeypatch.setattr(bench_timing, "cuda_peak", lambda run: float(sum(x.nbytes for x in run(0))))


def test_gpu_comparison_of_kl_without_one(gpu_part):
    """The peak of every implementation, and its ratio to the floor."""
    figures = bench_logprob.gpu_kl((20, 8, 30), repeats=1, tflops=1e-6)
    assert figures["kl/20x8x30/floor/seconds"] == pytest.approx(12 * 20 * 8 * 30 / 1e6)
    for name in ("naive", "compiled", "torch", "triton"):
        assert figures[f"kl/20x8x30/{name}/peak_mib"] == (20 + 30) * 8 * 2
        assert figures[f"kl/20x8x30/{name}/of_floor"] == pytest.approx(figures[f"kl/20x8x30/{name}/seconds"] / 0.0576)


def test_gpu_comparison_of_log_probs_without_one(gpu_part, monkeypatch):
    """A package that refuses is named, and the others are measured."""

    def refuse(*_):
        raise ValueError("V = 30 is too few")

    monkeypatch.setattr(bench_logprob, "others", lambda batches: {"package": refuse})
    figures = bench_logprob.gpu((20, 8, 30), repeats=1, tflops=1e-6)
    for name in ("naive", "compiled", "checkpointed", "torch", "hybrid", "fused"):
        peak, seconds, share = (figures[f"logprob/20x8x30/{name}/{key}"] for key in ("peak_mib", "seconds", "of_floor"))
        assert peak == (20 + 30) * 8 * 2 and share == pytest.approx(seconds / 0.0384)
    assert figures["logprob/20x8x30/package/refused"] == "ValueError: V = 30 is too few"
    assert sum("package" in key for key in figures) == 1
    ways = {"package": refuse, "torch": bench_logprob.ours()}
    batch = bench_logprob.errors((20, 8, 30), "cpu", ways, torch.float32)
    assert batch["accuracy/package/refused"] and batch["accuracy/torch/dw"] < 2e-6 and len(batch) == 5


class ToyGRPO:
    """Liger's chunked GRPO, as of 0.8.5, by its definition, with the options that are used here."""

    def __init__(self, beta=0.04, compiled=True, use_ref_model=True, chunk_size=1, epsilon_low=0.2, epsilon_high=0.2,
                 loss_type="dapo"):
        assert beta == 0 and not use_ref_model and loss_type == "bnpo" and chunk_size > 1
        self.clip = 1 - epsilon_low, 1 + epsilon_high

    def __call__(self, h, w, target, mask, advantages):
        logp = torch.log_softmax(h @ w.T, -1).gather(-1, target[..., None])[..., 0]  # [B, T]
        ratio = torch.exp(logp - logp.detach())
        loss = -torch.min(ratio * advantages[:, None], ratio.clamp(*self.clip) * advantages[:, None])
        return (loss * mask).sum() / mask.sum(), ()


def test_other_packages_are_asked_for_the_same_gradient(monkeypatch):
    """Stand-ins with the signatures of Liger and cut cross-entropy; all but Liger's cross-entropy take one gradient per
    token."""
    batch = bench_logprob.inputs((20, 8, 30), "cpu", torch.float32)
    assert bench_logprob.others([batch]).keys() <= {"liger", "liger_grpo", "cut_cross_entropy"}
    nll = lambda h, w, target, reduction: F.cross_entropy(h @ w.T, target, reduction=reduction)
    summed = lambda reduction: lambda w, h, target: nll(h, w, target, reduction)
    contents = {"liger_kernel": {}, "liger_kernel.chunked_loss": dict(LigerFusedLinearGRPOLoss=ToyGRPO),
                "liger_kernel.transformers": dict(LigerFusedLinearCrossEntropyLoss=summed),
                "cut_cross_entropy": dict(linear_cross_entropy=nll)}
    for name, content in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    h, w, target, g, _ = batch
    logp, _ = bench_logprob.naive(h, w, target)
    by_token = torch.autograd.grad((logp * g).sum(), (h, w), retain_graph=True)
    same_for_all = torch.autograd.grad(logp.sum() * g.sum(), (h, w))
    runs = bench_logprob.others([batch])
    assert runs.keys() == {"liger", "liger_grpo", "cut_cross_entropy"}
    for name, run in runs.items():
        for a, b in zip(run(3), same_for_all if name == "liger" else by_token):
            torch.testing.assert_close(a, b)


def test_the_real_chunked_grpo_has_this_gradient(monkeypatch):
    pytest.importorskip("liger_kernel.chunked_loss")
    monkeypatch.setattr(torch, "compile", lambda f: f)
    h, w, target, g, _ = batch = bench_logprob.inputs((5000, 8, 30), "cpu", torch.float32)  # three chunks
    logp, _ = bench_logprob.naive(h, w, target)
    want = torch.autograd.grad((logp * g).sum(), (h, w))
    for a, b in zip(bench_logprob.whole_loss(bench_logprob.liger_grpo, [batch])(0), want):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_interleaved_and_against():
    calls = []

    def spend(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    variants = {
        "a": lambda i: (calls.append(("a", i)), spend(0.002)),
        "b": lambda i: (calls.append(("b", i)), spend(0.006)),
    }
    times = bench_timing.interleaved(variants, 3, "cpu")
    assert calls == [(name, i) for i in range(4) for name in "ab"]
    figures = bench_timing.against(times, "a")
    assert figures["a"][1] == 1 and 2.5 < figures["b"][1] < 3.5 and figures["b"][0] == pytest.approx(0.006, rel=0.2)


def test_what_does_not_fit_or_compile_is_refused_and_a_mistake_is_not():
    triton = pytest.importorskip("triton")
    refused = {}

    def give(error):
        raise error

    uncompiled = triton.CompilationError("def f():\n    tl.dot(1)", SimpleNamespace(lineno=2, col_offset=4), "no such")
    unfit = triton.OutOfResources(180000, 101376, "shared memory")
    assert bench_timing.attempt(lambda: give(unfit), "a", refused) is None
    assert bench_timing.attempt(lambda: give(uncompiled), "b", refused) is None
    assert bench_timing.attempt(lambda: give(AssertionError()), "c", refused) is None
    assert bench_timing.attempt(lambda: 5, "d", refused) == 5
    with pytest.raises(TypeError, match="a mistake"):
        bench_timing.attempt(lambda: give(TypeError("a mistake")), "e", refused)
    assert refused.pop("a").startswith("OutOfResources: out of resource: shared memory, Required: 180000, Hardware")
    assert refused == {"b": "CompilationError: no such", "c": "AssertionError: no reason given"}


def test_a_variant_that_fails_leaves_the_comparison(capsys):
    """Also in a later round."""

    def full(after):
        def run(i):
            if i >= after:
                raise torch.OutOfMemoryError("out of memory.\nMuch more.")

        return run

    variants = {"first": full(0), "good": lambda i: i, "late": full(2)}
    refused = {}
    times = bench_timing.interleaved(variants, 3, "cpu", refused)
    assert times.keys() == {"good"} and len(times["good"]) == 3
    assert refused == dict.fromkeys(("first", "late"), "OutOfMemoryError: out of memory.")
    assert "late: OutOfMemoryError: out of memory.\n" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        bench_timing.interleaved(variants, 3, "cpu")
    assert bench_timing.interleaved({"first": full(0)}, 3, "cpu", {}) == {}


def _allocate(mib):
    return lambda: torch.ones(mib << 18)


def test_cpu_peak():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc")
    assert bench_timing.cpu_peak(_allocate, 64) == pytest.approx(64, abs=4)


@pytest.mark.gpu
def test_gpu_part_at_toy_size():
    config = bench_kernels.Config(device="cuda", gpu_shapes=((256, 128, 1000),), gpu_repeats=2,
                                  attention=False)
    figures = bench_kernels.main(config)
    assert figures["tflops"] > 0 and figures["logprob/256x128x1000/hybrid/seconds"] > 0
    assert figures["kl/256x128x1000/triton/seconds"] > 0 and figures["kl/256x128x1000/compiled/of_floor"] > 0
