"""experiments/studies/balance.py at toy size: runs, choice of a strength, tables, figure."""

import json
from dataclasses import replace

import pytest
import torch

from experiments.studies import balance, balance_figures
from minir1.log import read_metrics
from minir1.model.config import ModelConfig
from minir1.model.moe import Routing

TINY = ModelConfig(
    dim=16, layers=2, heads=2, kv_lora=8, nope=4, rope=4, v_dim=8, ffn=16, experts=4, expert_ffn=8, experts_per_token=1
)
STRENGTHS = {"none": (0.0,), "sequence": (0.1,), "batch": (0.1,), "bias": (0.01, 0.1)}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setattr(balance, "STRENGTHS", STRENGTHS)
    paths = {"out": tmp_path / "runs", "results": tmp_path / "balance.json", "figure": tmp_path / "balance.png"}
    sizes = {"seeds": (0, 5), "steps": 4, "batch": 256, "model": TINY, "eval_every": 2, "eval_batches": 1}
    return balance.Config(**sizes, device="cpu", **paths)


def test_the_comparison_at_toy_size(toy, monkeypatch, capsys):
    results = balance.main(toy)
    assert results == json.loads(toy.results.read_text()) and toy.figure.read_bytes().startswith(b"\x89PNG")
    assert "held-out loss" in capsys.readouterr().out
    assert {m: list(one["seeds"]) for m, one in results["methods"].items()} == dict.fromkeys(STRENGTHS, ["0", "5"])
    runs = {path.name: read_metrics(path) for path in toy.out.iterdir()}
    assert len(runs) == 5 + 4 and all(len(rows) == 4 for rows in runs.values())
    assert all(["eval/loss" in row for row in rows] == [False, True, False, True] for rows in runs.values())
    first = {name: rows[0]["train/loss"] for name, rows in runs.items()}
    assert len({first[name] for name in first if name.endswith("-0")}) == 1  # the same weights and data
    assert first["none-0-0"] != first["none-0-5"]
    last = [runs[name][-1]["train/loss"] for name in ("none-0-0", "sequence-0.1-0", "batch-0.1-0", "bias-0.1-0")]
    assert len(set(last)) == 4

    with pytest.raises(ValueError, match="none-0-0 already holds a run: continue with --resume"):
        balance.main(toy)
    with pytest.raises(ValueError, match="none-0-0 was run for 4 steps, not 5"):
        balance.main(replace(toy, steps=5, resume=True))
    (toy.out / "bias-0.1-0" / "result.json").unlink()
    done, original = [], balance.train
    monkeypatch.setattr(balance, "train", lambda run, out: done.append(run.name) or original(run, out))
    again = balance.main(replace(toy, resume=True))
    assert done == ["bias-0.1-0"] and len(read_metrics(toy.out / "bias-0.1-0")) == 4  # anew, and only this one
    for one in (again, results):
        del one["tuning"]["bias"]["0.1"]["seconds"]
        for result in one["methods"]["bias"]["seeds"].values():
            del result["seconds"]
    assert again == results


def test_the_auxiliary_losses():
    scores = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1], [0.7, 0.3]])
    record = [Routing(scores, scores.argmax(-1, keepdim=True))] * 2
    lengths = torch.tensor([2, 2])
    # f = 2·(3/4, 1/4), P = (2.8, 1.2)/4, in each of two layers
    assert balance.auxiliary("batch", record, lengths).item() == pytest.approx(2 * (1.5 * 0.7 + 0.5 * 0.3))
    # first document: f = (1, 1), P sums to 1; second: f = (2, 0), P = (0.8, 0.2)
    assert balance.auxiliary("sequence", record, lengths).item() == pytest.approx(2 * (1 + 1.6) / 2)
    assert balance.auxiliary("bias", record, lengths) == balance.auxiliary("none", record, lengths) == 0.0


def result(loss: float, violation: float) -> dict[str, float]:
    return {"eval/loss": loss, "eval/max_violation": violation, "eval/max_violation_worst": 2 * violation} | {
        "train/max_violation": violation + 1
    }


def test_the_cheapest_of_the_most_even_is_chosen():
    assert balance.choose({0.1: result(2.0, 0.40), 0.01: result(1.9, 0.50), 0.001: result(1.0, 0.51)}) == 0.01
    assert balance.choose({0.0: result(2.0, 3.0)}) == 0.0


def test_tables():
    losses = {"0": 1.0, "1": 1.2, "2": 1.4}
    none = {seed: result(loss, 2.0) for seed, loss in losses.items()}
    bias = {seed: result(loss - 0.1, 0.5) for seed, loss in losses.items()}
    methods = {"none": {"strength": 0.0, "seeds": none}, "bias": {"strength": 0.01, "seeds": bias}}
    first, second = balance.rows({"methods": methods})
    # 1.2 ± t·s/√n = 1.2 ± 4.303·0.2/√3; the differences are all alike
    assert first[:3] == ["no balancing", "1.2000 [0.7031, 1.6969]", "-"]
    assert second[0] == "selection bias, γ = 0.01" and second[2] == "-0.1000 [-0.1000, -0.1000]"
    assert second[3:] == ["0.50 [0.50, 0.50]", "1.00 [1.00, 1.00]", "1.50 [1.50, 1.50]"]
    uneven = {seed: result(1.0, violation) for seed, violation in zip("012", (0.0, 0.1, 0.8))}
    methods["bias"]["seeds"] = uneven  # the interval is cut at 0
    assert balance.rows({"methods": methods})[1][3].startswith("0.30 [0.00, ")
    tuning = {"batch": {"0.1": result(1.23456, 0.5)}}
    assert balance.tuning_rows({"tuning": tuning}) == [["loss by batch, α = 0.1", "1.2346", "0.50", "1.00"]]


def test_the_figure_names_the_final_values(tmp_path):
    def run(loss, violation):
        return [{"step": s, "train/loss": loss, "train/max_violation": violation} for s in range(1, 13)]

    curves = {"no balancing": [run(1.0, 3.0), run(1.2, 3.2)], "selection bias, γ = 1": [run(1.0, 0.5), run(1.0, 0.5)]}
    figure = balance_figures.balance(curves, tmp_path / "a.png")
    words = [text.get_text() for text in figure.texts]
    assert "Balancing: MaxVio 3.1 → 0.5; losses end within 0.100 nats" in words
    assert {"MaxVio 3.10 · loss 1.100", "MaxVio 0.50 · loss 1.000"} | set(curves) <= set(words)
    assert [axes.get_xlabel() for axes in figure.axes] == ["step", "step"]
