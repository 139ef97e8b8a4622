"""The benchmark of the kernels at toy size, and how it measures."""
import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments" / "benchmarks"))  # as python does for a script

import bench_kernels  # noqa: E402
import bench_logprob  # noqa: E402
import bench_timing  # noqa: E402


def test_cpu_part_at_toy_size(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_logprob, "cpu_peak", lambda work, *args: len(work(*args)()))  # in this process
    shape, out = (40, 16, 600), tmp_path / "found.json"
    config = bench_kernels.Config(device="cpu", shape=shape, budgets=(0,), small=((30, 8, 20),), repeats=1, out=out)
    found = bench_kernels.main(config)
    assert json.loads(out.read_text()) == found
    assert found["twin/0/time_ratio"] > 0 and found["kl/twin/0/time_ratio"] > 0
    assert found["naive/memory_ratio"] == found["naive/time_ratio"] == 1
    assert 0 < found["small/30x8x20/twin/seconds"] < 1
    assert 0 < found["accuracy/twin/logp"] < 1e-5 and 0 < found["accuracy/twin/dw"] < 2e-6
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
    for f in (bench_logprob.checkpointed, bench_logprob.twin(), bench_logprob.twin(1)):
        for a, b in zip(bench_logprob.both_ways(f, [batch])(3), want):
            torch.testing.assert_close(a, b)
    batch = bench_logprob.inputs((20, 8, 30), "cpu", torch.float32, teacher=True)
    want = bench_logprob.both_ways(bench_logprob.full_softmax_kl, [batch])(0)
    for a, b in zip(bench_logprob.both_ways(bench_logprob.tiled_kl(), [batch])(0), want):
        torch.testing.assert_close(a, b)


def test_gpu_comparison_of_kl_without_one(monkeypatch):
    """The same code on the CPU, where the kernel is interpreted: every way, its peak and its share of the floor."""
    if torch.cuda.is_available():
        pytest.skip("has CUDA")
    pytest.importorskip("minir1.kernels.kl", exc_type=ImportError)
    monkeypatch.setattr(bench_logprob, "COPIES", 1)
    monkeypatch.setattr(torch, "compile", lambda f: f)
    make, timed = bench_logprob.inputs, bench_logprob.interleaved
    monkeypatch.setattr(bench_logprob, "inputs", lambda shape, device, *rest, **kw: make(shape, "cpu", *rest, **kw))
    monkeypatch.setattr(bench_logprob, "interleaved", lambda runs, repeats, device: timed(runs, repeats, "cpu"))
    monkeypatch.setattr(bench_logprob, "cuda_peak", lambda run: float(sum(x.nbytes for x in run(0))))
    found = bench_logprob.gpu_kl((20, 8, 30), repeats=1, tflops=1e-6)
    assert found["kl/20x8x30/floor/seconds"] == pytest.approx(12 * 20 * 8 * 30 / 1e6)
    for name in ("naive", "compiled", "twin", "triton"):
        assert found[f"kl/20x8x30/{name}/peak_mib"] == (20 + 30) * 8 * 2
        assert found[f"kl/20x8x30/{name}/of_floor"] == pytest.approx(found[f"kl/20x8x30/{name}/seconds"] / 0.0576)


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
    found = bench_timing.against(times, "a")
    assert found["a"][1] == 1 and 2.5 < found["b"][1] < 3.5 and found["b"][0] == pytest.approx(0.006, rel=0.2)


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
    found = bench_kernels.main(config)
    assert found["tflops"] > 0 and found["logprob/256x128x1000/hybrid/seconds"] > 0
    assert found["kl/256x128x1000/triton/seconds"] > 0 and found["kl/256x128x1000/compiled/of_floor"] > 0
