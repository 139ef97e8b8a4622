"""The benchmark of attention at toy size, and what it counts."""

import pytest
import torch

from experiments.benchmarks import attention_tiles, bench_attention, decode_splits
from experiments.benchmarks.bench_attention import Shape

TOY = Shape(2, 9, 4, 2, 12, 8)


def test_all_ways_compute_the_same():
    batch = bench_attention.inputs(TOY, "cpu", torch.float64)
    for how in (bench_attention.forward, bench_attention.both_ways):
        first, *others = (how(f, [batch])(0) for f in bench_attention.ways(TOY, "cpu").values())
        for other in others:
            for a, b in zip(first, other):
                torch.testing.assert_close(a, b)


def test_cpu_at_toy_size():
    figures = bench_attention.training(TOY, "cpu", torch.float32, 1, 1e-3)
    for part in ("forward", "both"):
        for name in ("torch", "sdpa"):
            assert figures[f"attention/{TOY}/{part}/{name}/seconds"] > 0
    assert figures[f"attention/{TOY}/both/sdpa/tflops"] > 0
    figures = bench_attention.decoding(TOY, False, "cpu", torch.float32, 1, 1.0)
    assert figures[f"decode/{TOY}/torch/tb_s"] > 0 and figures[f"decode/{TOY}/sdpa/of_floor"] > 0
    latent = Shape(2, 9, 4, 1, 12, 8)
    assert bench_attention.decoding(latent, True, "cpu", torch.float32, 1, 1.0)[f"latent/{latent}/torch/seconds"] > 0
    errors = bench_attention.errors(TOY, "cpu", torch.float32)
    assert len(errors) == 8 and all(0 < x < 1e-6 for x in errors.values())


def test_a_way_that_cannot_run_costs_its_own_figures_only(monkeypatch):
    """Also if it is the first, and in every comparison."""

    def refuse(q, k, v):
        raise RuntimeError("No available kernel.\nAborting.")

    ways = bench_attention.ways
    monkeypatch.setattr(bench_attention, "ways", lambda shape, device: {"flash": refuse} | ways(shape, device))
    figures = bench_attention.training(TOY, "cpu", torch.float32, 1, 1.0)
    figures |= bench_attention.errors(TOY, "cpu", torch.float32)
    for part in (f"attention/{TOY}/forward", f"attention/{TOY}/both", f"accuracy/{TOY}"):
        assert figures[f"{part}/flash/refused"] == "RuntimeError: No available kernel."
    assert sum("flash" in key for key in figures) == 3
    assert figures[f"attention/{TOY}/both/torch/seconds"] > 0 and figures[f"accuracy/{TOY}/sdpa/dq"] > 0

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(bench_attention, "decode_attention", out_of_memory)
    figures = bench_attention.decoding(TOY, False, "cpu", torch.float32, 1, 1.0)
    assert figures[f"decode/{TOY}/torch/refused"] == "OutOfMemoryError: CUDA out of memory."
    assert figures[f"decode/{TOY}/sdpa/seconds"] > 0 and f"decode/{TOY}/torch/seconds" not in figures


def test_counts():
    """B = 4, H = 16, T = 4096, causal, D = 128: 0.275 TFLOP forward; MLA 320 / 256 of it."""
    plain, latent = Shape(4, 4096, 16, 16, 128, 128), Shape(4, 4096, 16, 16, 192, 128)
    assert bench_attention.operations(plain, False) == 2 * 64 * (4096**2 / 2) * 256
    assert bench_attention.operations(plain, True) == 3.5 * bench_attention.operations(plain, False)
    assert bench_attention.operations(latent, False) == 1.25 * bench_attention.operations(plain, False)
    assert bench_attention.cache_bytes(Shape(2, 10, 8, 4, 64, 64)) == 2 * 10 * 4 * 128 * 2
    assert bench_attention.cache_bytes(Shape(2, 10, 8, 1, 576, 512)) == 2 * 10 * 576 * 2


def test_roofline(tmp_path):
    shape = Shape(2, 10, 8, 1, 576, 512)
    figures = {"tflops": 100.0, "tb_s": 2.0, f"attention/{TOY}/forward/triton/seconds": 1e-9,
             f"latent/{shape}/triton/seconds": 1e-6, f"latent/{shape}/torch/seconds": 1.0}
    labelled = bench_attention.points(figures)
    assert labelled.keys() == {f"attention {TOY} forward", f"latent {shape}"}
    assert labelled[f"latent {shape}"] == (2 * 8 * (576 + 512) / (576 * 2), pytest.approx(2 * 160 * 1088 / 1e6))
    more = bench_attention.points({"logprob/4x2x6/fused/seconds": 1e-9, "logprob/4x2x6/naive/seconds": 1.0})
    assert more == {"logprob 4x2x6 fused": (8 * 48 / (4 * 2 * 10), pytest.approx(8 * 48 / 1e3))}
    bench_attention.roofline(figures | {"logprob/4x2x6/fused/seconds": 1e-9}, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 1000


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("has CUDA")
    with pytest.raises(ValueError, match="needs a GPU that torch can use, and there is none here"):
        bench_attention.main(bench_attention.Config())


@pytest.mark.gpu
def test_gpu_at_toy_size(tmp_path):
    config = bench_attention.Config(training=(Shape(2, 256, 4, 2, 64, 64),), decoding=(Shape(2, 600, 4, 2, 64, 64),),
                                    latents=(Shape(2, 600, 16, 1, 576, 512),), repeats=2, figure=tmp_path / "roof.png")
    figures = bench_attention.main(config)
    assert figures["latent/2x600x16x1x576x512/triton/tb_s"] > 0


def test_tiles(tmp_path):
    """Six queries over eight keys in tiles of two: the last meets the last, so the diagonal is one tile off."""
    e, m, w = attention_tiles.EMPTY, attention_tiles.MASKED, attention_tiles.WHOLE
    assert attention_tiles.tiles(6, 8, 2, True, None) == [[w, m, e, e], [w, w, m, e], [w, w, w, m]]
    assert attention_tiles.tiles(6, 8, 2, True, 3) == [[m, m, e, e], [e, m, m, e], [e, e, m, m]]
    attention_tiles.main(attention_tiles.Config(out=tmp_path / "tiles.png"))
    assert (tmp_path / "tiles.png").stat().st_size > 1000


def test_splits(tmp_path):
    """Slots in pieces of four: a token in slot 5 sees the first piece and half of the second."""
    idle, part, whole = decode_splits.EMPTY, decode_splits.MASKED, decode_splits.WHOLE
    assert decode_splits.pieces(5, 16, 4) == [whole, part, idle, idle]
    assert decode_splits.pieces(7, 8, 4) == [whole, whole] and decode_splits.pieces(0, 8, 4) == [part, idle]
    decode_splits.main(decode_splits.Config(out=tmp_path / "splits.png"))
    assert (tmp_path / "splits.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"past = \(16,\): 0 to 15"):
        decode_splits.main(decode_splits.Config(past=(16,), slots=16, split=4, out=tmp_path / "none.png"))
