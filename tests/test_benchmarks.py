"""Benchmarks of the model and of sampling at toy size: prefill, speculation, a step's profile."""

import json
from dataclasses import replace

import pytest
import torch
from toys import BASE

from experiments import pretrain
from experiments.benchmarks import bench_speculative, prefill, profile_step
from minir1.log import read_metrics


def test_prefill_benchmark_at_toy_size(tmp_path):
    config = prefill.Config(lengths=(300,), chunk=128, whole=0, out=tmp_path / "found.json")
    figures = prefill.main(config)
    assert json.loads((tmp_path / "found.json").read_text()) == figures and "one_call/300/seconds" not in figures
    assert figures["cache/300/gib"] == 4 * 300 * 80 * 4 / 2**30  # layers · tokens · (64 + 16) · 4 bytes
    seconds, cpu, peak, cache = prefill.measure(300, None, replace(config, threads=torch.get_num_threads()))
    assert seconds > 0 and cpu > 0 and 0.1 < peak < 20 and cache == figures["cache/300/gib"]


def test_speculation_is_measured_on_a_base_that_is_made_once(tmp_path, monkeypatch, capsys):
    out = tmp_path / "speculative.json"
    config = bench_speculative.Config(
        depths=(1,), pretrain=replace(BASE, steps=2, batch=512, device="cpu"), base=tmp_path, rows=(2,), problems=4,
        temperatures=(1.0,), max_completion_length=8, repeats=1, out=out,
    )
    threads = torch.get_num_threads()
    try:
        figures = bench_speculative.main(config)
    finally:
        torch.set_num_threads(threads)  # it measures on one
    assert json.loads(out.read_text()) == figures
    assert 0 <= figures["D=1/rows=2/T=1/accepted_1"] <= 1 <= figures["D=1/rows=2/T=1/tokens_a_pass"] <= 2
    assert all(figures[f"D=1/rows=2/T=1/{way}_tok_s"] > 0 for way in ("generate", "speculate"))
    metrics = read_metrics(tmp_path / "depth-1")
    assert len(metrics) == 2 and all(row["train/mtp_loss"] > 0 for row in metrics)
    monkeypatch.setattr(pretrain, "main", None)  # the base is there
    assert bench_speculative.trained(config, depth=1)[0].config.mtp_depth == 1
    assert "speculation after 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize("dense", [False, True])
def test_the_profile_of_a_step(tmp_path, dense, capsys):
    sizes = {"prompts": 2, "num_generations": 2, "max_completion_length": 4, "pretrain_tokens": 160, "repeats": 1}
    out = tmp_path / "new" / "p.json"
    figures = profile_step.main(profile_step.Config(dense=dense, **sizes, device="cpu", out=out))
    assert json.loads(out.read_text()) == figures
    for name, tokens in (("rollout", 16), ("update", 16), ("pretrain", 160)):
        assert figures[f"{name}/tok_s"] * figures[f"{name}/seconds"] == pytest.approx(tokens)
    for name in ("rollout", "update"):
        shares = [value for key, value in figures.items() if key.startswith(f"{name}/") and "::" in key]
        assert shares == sorted(shares, reverse=True) and 0.3 < sum(shares) <= 1
    assert "time of the update by operator" in capsys.readouterr().out
