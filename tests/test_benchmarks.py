"""Benchmarks of the model and of sampling at toy size: prefill, speculation, a step's profile, peers."""

import json
from dataclasses import replace

import pytest
import torch
from toys import BASE, DENSE

from experiments import pretrain
from experiments.benchmarks import bench_speculative, peers, prefill, profile_step
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


PEERS = peers.Config(
    prompts=2, num_generations=2, prompt_tokens=3, max_completion_length=(4, 5), qwen=replace(DENSE, vocab=40),
    qwen_rows=2, qwen_prompt=3, repeats=1, decode_steps=1,
)  # fmt: skip


def results_of(runs, repeats):
    """In place of `peers.alternate`: what each run returns."""
    return {name: run() for name, run in runs.items()}


def test_transformers_generates_as_many_tokens(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(peers, "alternate", results_of)
    cases = dict(peers.rollouts(PEERS))
    assert list(cases) == [f"rollout, {kind}, 4 × {n} tokens" for kind in ("MLA + MoE", "dense") for n in (4, 5)]
    for case, results in cases.items():
        tokens = int(case.split()[-2])
        assert results["ours"].length.tolist() == [3 + tokens] * 4
        assert results["transformers"].shape == (4, 3 + tokens)


def test_transformers_decodes_the_same_logits(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(peers, "alternate", results_of)
    for case, results in peers.decoding(PEERS):
        tolerance = {"rtol": 0, "atol": 1e-5 if case.endswith("float32") else 0.05}
        ours = results.pop("ours")
        assert len(results) == 2 and ours.std() > 0.1
        for theirs in results.values():
            torch.testing.assert_close(ours, theirs.logits[:, -1].float(), **tolerance)


def test_trl_scores_as_many_answers_of_the_same_length(monkeypatch):
    pytest.importorskip("trl")
    lengths, rewarded = [], peers.rewarded

    def spy(completions, **columns):
        lengths.append([len(ids) for ids in columns.get("completion_ids", [])])
        return rewarded(completions)

    monkeypatch.setattr(peers, "rewarded", spy)
    ((case, times),) = peers.grpo(PEERS)
    assert case == "GRPO step, dense, 4 × 4 tokens" and lengths == [[4] * 4, []] * 2  # TRL, ours, twice
    assert list(times) == ["ours", "TRL"] and all(len(seconds) == 1 and seconds[0] > 0 for seconds in times.values())


def test_the_ratio_is_theirs_by_ours(tmp_path, monkeypatch, capsys):
    case = "case", {"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 2.0, 8.0]}  # ratios 3, 1, 2
    monkeypatch.setitem(peers.PARTS, "grpo", lambda config: [case])
    figures = peers.main(replace(PEERS, parts=("grpo",), out=tmp_path / "peers.json"))
    assert figures == {"case/ours/seconds": 2, "case/theirs/seconds": 3, "case/theirs/ratio": 2}
    assert json.loads((tmp_path / "peers.json").read_text()) == figures
    assert "2.00" in capsys.readouterr().out
    times = peers.alternate({"a": lambda: None, "b": lambda: None}, 3)
    assert [len(seconds) for seconds in times.values()] == [3, 3]
