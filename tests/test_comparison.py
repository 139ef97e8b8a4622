"""Comparisons at toy size: cells that are killed, changed or finished; the tables; the figures."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

from experiments import pretrain
from experiments.studies import algorithms, comparison, group_size, hybrid, kl, overoptimization, processes, reduction
from experiments.studies import comparison_figures as figures
from experiments.studies import comparison_tables as tables
from experiments.studies.comparison import START, Config, Measure, Method, cells_of, command, complete, end, load
from experiments.variants import hybrid as variants_hybrid
from minir1 import tasks
from minir1.log import read_metrics
from minir1.model import hf
from minir1.model.config import ModelConfig
from minir1.tokenizer import word_level

# ---- processes, with stub scripts ----------------------------------------------------------------

TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
options = dict(zip(sys.argv[1:], sys.argv[2:]))
out, seed, steps = Path(options["--out"]), int(options["--seed"]), int(options["--steps"])
print("cores", sorted(os.sched_getaffinity(0)))
print("threads", os.environ["OMP_NUM_THREADS"], "resumed", "--resume" in sys.argv)
out.mkdir(parents=True, exist_ok=True)
time.sleep(float(options.get("--sleep", 0)))
if options.get("--kill") == "yes" and not (out / "half").exists():
    (out / "half").write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
if options.get("--fail") == "yes":
    sys.exit("the loss is not finite")
rows = [{"step": 0, "eval/pass@1": 0.3}]
for step in range(1, steps + 1):
    rows.append({"step": step, "train/sampled_tokens": 100, "train/length": 0.5, "train/accuracy": 0.1 * step})
    rows[-1] |= {"time/rollout_s": 1.0, "time/judge_s": 0.25, "time/update_s": 2.0}
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(out / "pass").write_text(str(float(options["--learning-rate"]) * 1000 + seed / 100))
with open(out.parent.parent / "runs.txt", "a") as file:
    file.write(f"{out.parent.name}/{out.name}\\n")
"""
MEASURE = """
import json, sys
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
trained = Path(options["--policy"]).parent / "pass"
result = {"pass@1": float(trained.read_text()) if trained.exists() else 0.1, "split": options["--split"]}
Path(options["--out"]).write_text(json.dumps(result))
"""
ROOT = Path(__file__).parent.parent
METHODS = {"a": Method("A", "train"), "b": Method("B", "train", {"clip": 0.3})}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Two methods, two seeds, scripts that take milliseconds."""
    scripts = tmp_path / "toy_scripts"
    (scripts / "studies").mkdir(parents=True)
    (scripts / "train.py").write_text(TRAIN)
    (scripts / "studies" / "comparison.py").write_text(MEASURE)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(comparison, "PACKAGE", "toy_scripts")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    paths = {"out": tmp_path / "runs", "results": tmp_path / "docs" / "toy.json", "figure": tmp_path / "toy.png"}
    return Config(checkpoint=tmp_path / "base", seeds=(0, 1), steps=2, **paths)


def done(config) -> list[str]:
    path = config.out / "runs.txt"
    return sorted(path.read_text().split()) if path.exists() else []


def test_every_cell_is_run_measured_and_stored(toy, capsys):
    cells = cells_of(METHODS, toy)
    assert [cell.name for cell in cells] == [START, "a/0", "b/0", "a/1", "b/1"]  # seed by seed
    assert complete(cells, toy) == {}
    stored = load(toy.results)
    assert stored.keys() == {cell.name for cell in cells} and stored["b/1"]["pass@1"] == pytest.approx(0.31)
    lines = toy.results.read_text().splitlines()
    assert len(lines) == 2 + 5 and all(line.startswith('"') for line in lines[1:-1])  # a line per cell
    expected = "train --task countdown --template chat --device cpu --steps 2 --seed 1 --learning-rate 0.0003"
    expected += " --prompts 16 --num-generations 8 --max-completion-length 384"
    expected += " --eval-every 8 --eval-answers 1 --clip 0.3"
    assert stored["b/1"]["command"] == expected and stored[START]["command"] == ""
    assert stored["a/0"]["tokens/sampled"] == 200 and stored["a/0"]["tokens/trained"] == 2 * 128 * 0.5
    assert stored["a/0"]["seconds/rollout"] == 2 and stored["a/0"]["seconds/total"] == 6.5
    assert stored["a/0"]["curve"] == {"tokens": [100, 200], "accuracy": [0.1, 0.2], "length": [0.5, 0.5]}
    assert "tokens/sampled" not in stored[START]
    output = capsys.readouterr().out
    assert "5 of 5 cells, about 0 min left" in output and "b/1: test pass@1 31.0%" in output
    log = (toy.out / "a" / "0.log").read_text()
    assert "threads 1 resumed False" in log
    if hasattr(os, "sched_setaffinity"):
        assert len(json.loads(log[len("cores ") : log.index("]") + 1])) == 1
    assert complete(cells, toy) == {} and len(done(toy)) == 4  # nothing is run again


def test_a_killed_cell_resumes_and_a_failing_one_stops_no_other(toy, capsys):
    methods = METHODS | {"k": Method("K", "train", {"kill": "yes"}), "f": Method("F", "train", {"fail": "yes"})}
    toy = replace(toy, seeds=(0,))
    failed = complete(cells_of(methods, toy), toy)
    assert failed.keys() == {"k/0", "f/0"}
    assert "failed with -9" in failed["k/0"] and "failed with 1" in failed["f/0"]
    assert failed["f/0"].endswith("the loss is not finite") and "the loss is not finite" in capsys.readouterr().out
    assert load(toy.results).keys() == {START, "a/0", "b/0"}
    with pytest.raises(SystemExit, match="failed: f/0, k/0; the logs lie in") as stop:
        end(failed, toy)
    assert isinstance(stop.value.code, str)  # a message: the status is 1
    end({}, toy)
    assert complete(cells_of(methods, toy), toy).keys() == {"f/0"}
    assert load(toy.results).keys() == {START, "a/0", "b/0", "k/0"} and done(toy) == ["a/0", "b/0", "k/0"]
    assert (toy.out / "k" / "0.log").read_text().count("resumed True") == 1


def test_another_command_base_or_measurement_is_refused(toy):
    cells = cells_of(METHODS, toy)
    complete(cells, toy)
    for changed, message in (
        (replace(toy, steps=3), "a/0 was done with command 'train .* --steps 2 .*', now 'train .* --steps 3"),
        (replace(toy, test_answers=8), "start was done with measured '400 test problems of countdown, 4 answers"),
    ):
        with pytest.raises(ValueError, match=message):
            complete(cells_of(METHODS, changed), changed)
    (toy.checkpoint / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match="start was done with base '[0-9a-f]{12}', now '[0-9a-f]{12}'"):
        complete(cells, toy)
    toy.results.unlink()  # the folders of the trainings record it too
    failed = complete(cells, toy)
    assert failed.keys() == {"a/0", "b/0", "a/1", "b/1"} and "was run with" in failed["a/0"]
    with pytest.raises(ValueError, match="holds no \\*.safetensors"):
        complete(cells, replace(toy, checkpoint=toy.out))


@pytest.mark.parametrize("change", [{"jobs": 0}, {"steps": 0}, {"seeds": (1, 1)}, {"seeds": ()}], ids=str)
def test_bad_settings_are_named(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} = "):
        Config(**change)


RUNNER = """
import sys
from pathlib import Path
from experiments.studies.processes import run_or_resume
folder = Path(sys.argv[1])
words = [sys.executable, "-m", "toy_scripts.train", "--out", str(folder)]
words += ["--seed", "0", "--steps", "1", "--learning-rate", "1", "--sleep", "1"]
run_or_resume(words, folder, "asked")
"""


def test_after_a_kill_of_the_runner_alone_the_next_one_waits(toy, capsys):
    folder = toy.out / "a" / "0"
    folder.parent.mkdir(parents=True)
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, str(folder)])
    while not folder.exists():
        time.sleep(0.02)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert not done(toy)  # the training continues without it
    again = [sys.executable, "-m", "toy_scripts.train", "--out", str(folder)]
    again += ["--seed", "0", "--steps", "1", "--learning-rate", "1"]
    with pytest.raises(ValueError, match="was run with 'asked', not 'other'"):
        processes.run_or_resume(again, folder, "other")
    processes.run_or_resume(again, folder, "asked")
    assert "waiting for a process of an earlier call" in capsys.readouterr().out
    assert done(toy) == ["a/0", "a/0"]  # one after the other


# ---- the sweep -----------------------------------------------------------------------------------


def test_algorithms_sweep_choose_and_compare(toy, monkeypatch, capsys):
    monkeypatch.setattr(algorithms, "METHODS", {"grpo": METHODS["a"], "rloo": METHODS["b"]})
    drawn = []
    monkeypatch.setattr(algorithms, "draw", lambda config: drawn.append(len(load(config.results))))
    config = replace(toy, steps=6, seeds=(0, 1, 2))
    assert algorithms.rates(config) == [1e-4, 3e-4, 9e-4]
    sweep = algorithms.sweep(config)
    assert len(sweep) == 6 and {(cell.steps, cell.split) for cell in sweep} == {(3, "validation")}
    assert {cell.seed for cell in sweep}.isdisjoint(config.seeds)
    stored = {}
    monkeypatch.setattr(algorithms.tables, "show", lambda title, *rest: stored.update(rest[0]))
    algorithms.main(config)
    assert drawn[-1] == len(stored) == 6 + 1 + 6
    for name in ("grpo", "rloo"):
        assert all("--learning-rate 0.0009 " in stored[f"{name}/{seed}"]["command"] for seed in range(3))
    assert stored["grpo/0"]["split"] == "test" and stored["sweep/grpo/0.0001"]["split"] == "validation"
    assert "sweep/grpo/0.0001" in capsys.readouterr().out
    assert algorithms.chosen(stored, config) == {"grpo": 9e-4, "rloo": 9e-4}
    del stored["sweep/grpo/0.0001"]
    assert algorithms.chosen(stored, config) == {"rloo": 9e-4}  # no choice before its sweep is done
    assert [cell.name for cell in algorithms.trained(stored, config)] == [START, "rloo/0", "rloo/1", "rloo/2"]
    stored["sweep/rloo/0.0003"]["pass@1"] = stored["sweep/rloo/0.0009"]["pass@1"]
    assert algorithms.chosen(stored, config) == {"rloo": 3e-4}  # the smaller of equals


def test_a_failing_sweep_leaves_its_method_out_and_the_status_says_so(toy, monkeypatch):
    monkeypatch.setattr(algorithms, "METHODS", {"a": METHODS["a"], "f": Method("F", "train", {"fail": "yes"})})
    monkeypatch.setattr(algorithms, "draw", lambda config: None)
    monkeypatch.setattr(algorithms.tables, "show", lambda *rest: None)
    with pytest.raises(SystemExit, match=r"failed: (sweep/f/0.000\d(, )?){3};"):
        algorithms.main(toy)
    assert {START, "a/0", "a/1"} < load(toy.results).keys() and "f/0" not in load(toy.results)


ABLATIONS = {
    "algorithms": (algorithms.METHODS, algorithms.DEFAULT),
    "kl": (kl.METHODS, kl.DEFAULT),
    "overoptimization": (overoptimization.methods(overoptimization.DEFAULT), overoptimization.DEFAULT),
    "reduction": (reduction.METHODS, reduction.DEFAULT),
    "group_size": (group_size.methods(group_size.DEFAULT), group_size.DEFAULT),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_scripts_understand_their_commands(name):
    methods, config = ABLATIONS[name]
    for cell in cells_of(methods, config)[1:]:
        script, *words = command(cell, config)
        script = importlib.import_module(f"experiments.{script}")
        read = tyro.cli(script.Config, args=words)
        assert read.steps == config.steps and read.seed == cell.seed and read.prompts * read.num_generations == 128
        for key, value in cell.options.items():
            assert getattr(read, key.replace("-", "_")) == value


def test_the_weight_of_rl_is_varied_alone():
    cells = cells_of(hybrid.methods(hybrid.DEFAULT), replace(hybrid.DEFAULT, seeds=(3,)))[1:]
    data = Path("runs/hybrid-study/sft.jsonl")
    assert [cell.options for cell in cells] == [{"alpha": a, "sft-data": data} for a in (0, 0.25, 0.5, 0.75, 1)]
    read = [tyro.cli(variants_hybrid.Config, args=command(cell, hybrid.DEFAULT)[1:]) for cell in cells]
    assert len({replace(config, alpha=1.0) for config in read}) == 1
    assert [config.alpha for config in read] == [0, 0.25, 0.5, 0.75, 1]


def test_a_hybrid_study_at_toy_size(toy_base, tmp_path, monkeypatch):
    monkeypatch.setattr(hybrid, "ALPHAS", (0.0, 1.0))
    size = {"steps": 2, "prompts": 2, "num_generations": 2, "max_completion_length": 12, "eval_every": 2, "problems": 4}
    paths = {"out": tmp_path / "runs", "results": tmp_path / "hybrid.json", "figure": tmp_path / "hybrid.png"}
    config = Config(toy_base("dense") / "checkpoint", **size, **paths, test_answers=2, seeds=(0,))
    with pytest.raises(ValueError, match=r"sft.jsonl is no file: put the dialogues to imitate there"):
        hybrid.main(config)
    config.out.mkdir()
    line = json.dumps({"prompt": "make 7 from 3,4", "completion": "<think>3+4=7</think><answer>3+4</answer>"})
    (config.out / "sft.jsonl").write_text(line + "\n")
    monkeypatch.setattr(comparison, "command", lambda *args: [*command(*args), "--min-mixed", "0"])
    hybrid.main(config)
    assert load(config.results).keys() == {START, "0/0", "1/0"} and config.figure.stat().st_size > 0
    rows = [read_metrics(config.out / name / "0") for name in ("0", "1")]
    assert ["train/sft_loss" in run[1] for run in rows] == [True, False]


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_published_cells_are_those_of_the_scripts(name, monkeypatch):
    """So that a comparison continues from them."""
    methods, config = ABLATIONS[name]
    published = load(ROOT / config.results)
    monkeypatch.setattr(comparison, "fingerprint", lambda folder: published[START]["base"])
    cells = cells_of(methods, config) if name != "algorithms" else algorithms.sweep(config)
    cells += algorithms.trained(published, config) if name == "algorithms" else []
    assert {cell.name for cell in cells} == published.keys()
    comparison.refuse_changed(cells, published, config)


def test_group_sizes_must_divide_the_answers_of_a_step():
    with pytest.raises(ValueError, match="prompts · num_generations = 96: must be a multiple of 64"):
        group_size.methods(Config(prompts=12))


# ---- the measurement -----------------------------------------------------------------------------

TINY = ModelConfig(dim=16, layers=1, heads=2, kv_lora=8, nope=4, rope=4, v_dim=8, ffn=16, experts=2, expert_ffn=8)


def test_a_policy_is_measured(tmp_path, capsys):
    tokenizer = word_level(*tasks.load("countdown").vocabulary())
    for name, seed in (("base", 0), ("policy", 1)):
        torch.manual_seed(seed)
        model = pretrain.build_model(pretrain.Config(model=TINY), tokenizer)
        hf.save(model, tokenizer, tmp_path / name)
    config = Measure(tmp_path / "policy", tmp_path / "base", problems=3, num_generations=2, max_completion_length=9)
    config = replace(config, device="cpu", out=tmp_path / "m.json")
    measured = comparison.main(config)
    assert measured == json.loads(config.out.read_text()) and measured["right"] == [0, 0, 0]
    assert measured["pass@1"] == 0 and measured["answers"] == 2 and measured["drift"] != 0
    assert "test pass@1 0.0% [0.0, 70.8]" in capsys.readouterr().out  # exact: no interval of three is a point
    assert comparison.measure(replace(config, base=config.policy))["drift"] == pytest.approx(0, abs=1e-5)


def test_the_cost_of_a_refilled_batch():
    """In each of two steps 200 tokens are sampled, of which 8 answers of 10 and of 12 tokens are trained on."""
    step = {"train/sampled_tokens": 200, "time/rollout_s": 2.0, "time/update_s": 1.5, "train/accuracy": 0.8}
    rows = [{"step": 0, "preflight/pass@1": 1.0}]
    rows += [step | {"step": 1, "train/length": 10.0, "train/kl": 0.1}, step | {"step": 2, "train/length": 12.0}]
    stored = comparison.cost_and_curve(rows, 8)
    assert stored.pop("curve") == {"tokens": [200, 400], "accuracy": [0.8, 0.8], "length": [10.0, 12.0]}
    assert stored.pop("tokens/sampled") == 400 and stored.pop("tokens/trained") == 8 * 22
    assert stored == {"seconds/rollout": 4.0, "seconds/update": 3.0, "seconds/total": 7.0}


# ---- tables --------------------------------------------------------------------------------------


def result(solved: float, **more) -> dict:
    """100 problems, of which the first `solved` share is right in all 4 answers."""
    right = [4 * (p < 100 * solved) for p in range(100)]
    cell = {"pass@1": solved, "pass@1_low": solved - 0.05, "pass@1_high": solved + 0.05, "right": right, "answers": 4}
    cell |= {"length": 50.4, "truncated": 0.01, "entropy": 0.1234, "false_yes": 0.02, "drift": 1.5}
    cell |= {"tokens/sampled": 2e6, "tokens/trained": 1e6, "seconds/rollout": 3.0, "seconds/update": 4.0}
    curve = {"tokens": [10, 20, 30], "accuracy": [0.1, 0.3, solved], "length": [5, 6, 7], "reward": [0.0, 1.0, 2.0]}
    return cell | {"seconds/total": 8.0, "curve": curve} | more


def results(**solved: tuple[float, ...]) -> dict:
    cells = {f"{name}/{seed}": result(one) for name, values in solved.items() for seed, one in enumerate(values)}
    return {"start": result(0.3)} | cells


def test_a_row_per_method():
    stored = results(a=(0.78, 0.80, 0.82), b=(0.5, 0.6))
    start, first, second, third = tables.reached(stored, METHODS | {"c": Method("C", "")})
    assert start == ["start", "30.0% [25.0, 35.0]", "", "", "50", "1.0%", "0.123", "2.0%", "1.50"]
    # 80 ± t·s/√n = 80 ± 4.303·2/√3
    assert first[:4] == ["A", "80.0% [75.0, 85.0]", "+50.0", "yes"] and len(first) == len(tables.REACHED)
    assert second[:4] == ["B", "55.0%", "+25.0", "2 seeds"] and third == ["C", "pending"] + [""] * 7
    assert tables.costs(stored, METHODS)[0] == ["A", "2.000", "1.000", "3", "4", "8"]
    assert tables.reached({}, METHODS) == [] and tables.costs({}, METHODS) == []


def test_above_the_start_means_intervals_that_do_not_touch():
    assert tables.above(result(0.3), [result(v) for v in (0.40, 0.41, 0.42)]) is True
    assert tables.above(result(0.3), [result(v) for v in (0.30, 0.41, 0.52)]) is False
    assert tables.above(result(0.3), [result(0.9)] * 2) is None
    stored = results(a=(0.4, 0.41, 0.42), b=(0.3, 0.41, 0.52))
    assert tables.against_start(stored, METHODS) == "Significantly above the start: A. Not: B."
    assert tables.against_start(results(a=(0.4,)), METHODS) == ""


def test_differences_are_paired_by_seed_and_by_problem():
    ends = tables.difference(*(tables.of(results(a=(0.78, 0.80, 0.82), b=(0.70, 0.70, 0.70)), n) for n in "ab"))
    mean, low, high = ends["seeds"]
    assert (mean, low, high) == pytest.approx((0.10, 0.10 - 4.303 * 0.02 / 3**0.5, 0.10 + 4.303 * 0.02 / 3**0.5))
    mean, low, high = ends["problems"]
    assert mean == pytest.approx(0.10) and 0.03 < low < 0.08 < 0.12 < high < 0.17
    same = tables.difference(*(tables.of(results(a=(0.5, 0.6, 0.7), b=(0.4, 0.5, 0.6)), n) for n in "ab"))
    assert same["seeds"] == pytest.approx((0.1, 0.1, 0.1))  # what the seeds share cancels
    other = {seed + 1: one for seed, one in tables.of(results(a=(0.5, 0.6, 0.7)), "a").items()}
    assert tables.difference(tables.of(results(a=(0.5, 0.6, 0.7)), "a"), other) is None  # two seeds in common


def test_a_significant_difference_needs_both_intervals():
    inside, above = (0.1, -0.01, 0.21), (0.1, 0.05, 0.15)
    assert tables.significant({"seeds": above, "problems": above})
    assert not tables.significant({"seeds": inside, "problems": above})
    assert not tables.significant({"seeds": above, "problems": inside})
    stored = results(a=(0.6, 0.6, 0.6), b=(0.8, 0.8, 0.8), c=(0.5, 0.6, 0.7))
    methods = METHODS | {"c": Method("C", "")}
    verdict = "Significantly different from A by both intervals: B (+20.0 points). "
    verdict += "Not significantly different, so that no order is claimed: C (+0.0 points)."
    assert tables.verdict(stored, methods, "a") == verdict
    assert [line[0] for line in tables.against(stored, methods, "a")] == ["B", "C"]
    assert tables.verdict(results(a=(0.5,)), METHODS, "a") == ""


def test_other_quantities_are_paired_by_seed():
    """B drifts by 1, 2 and 3 nats more than A with the same seed: 2 ± 4.303 / √3."""
    stored = results(a=(0.5, 0.5, 0.5), b=(0.5, 0.5, 0.5), c=(0.5, 0.5))
    for seed in range(3):
        stored[f"a/{seed}"] = stored[f"a/{seed}"] | {"drift": 10.0 * seed}
        stored[f"b/{seed}"] = stored[f"b/{seed}"] | {"drift": 10.0 * seed + 1 + seed}
    assert tables.paired(stored, METHODS, "a", "drift") == [["B", "+2.0", "[-0.5, +4.5]", "no"]]
    stored["b/0"]["drift"], stored["b/2"]["drift"] = 1.9, 22.1
    assert tables.paired(stored, METHODS, "a", "drift") == [["B", "+2.0", "[+1.8, +2.2]", "yes"]]


def test_pages_name_the_pending_cells_and_the_command():
    page = algorithms.page_result({})
    assert page.startswith("Pending, 67 of 67 cells: `sweep/grpo/0.0001`, ")
    assert page.endswith("```\npython -m experiments.studies.algorithms --checkpoint runs/base/checkpoint\n```")
    assert "| GRPO | pending | pending | pending |" in algorithms.page_sweep({})
    stored = {name: result(0.5 + 0.01 * number) for number, name in enumerate(sorted(algorithms.names()))}
    page, sweep = algorithms.page_result(stored), algorithms.page_sweep(stored)
    assert "All 67 cells are done, from the base" in page
    assert "| GRPO, lr 0.0009 | " in page and "![" in page and "Tokens sampled in training" in page
    assert "At the upper edge: GRPO, " in sweep and "**" in sweep
    page = reduction.page({"start": result(0.3), "per_answer/0": result(0.5)})
    assert "| per answer | 50.0% | +20.0 | 1 seed |" in page and "| token mean | pending |" in page
    assert "Pending, 8 of 10 cells: `token/0`, `fixed/0`, `per_answer/1`" in page


def test_the_edges_of_the_grid_are_named():
    stored = {f"sweep/{n}/{r:g}": result(0.5 - abs(i - 1) / 10) for n in algorithms.METHODS
             for i, r in enumerate(algorithms.rates(algorithms.DEFAULT))}  # fmt: skip
    assert algorithms.edges(stored) == "No method's best rate lies at an edge of the grid."
    stored["sweep/gspo/0.0001"]["pass@1"] = 0.9
    assert "smaller rate might be better still: GSPO. At the upper edge: none." in algorithms.edges(stored)
    assert algorithms.edges({}) == ""


def test_the_page_of_an_overoptimised_reward():
    curve = {"tokens": [1] * 12, "proxy": [float(s) for s in range(12)], "accuracy": [0.4] * 2 + [0.6] * 8 + [0.1] * 2}
    stored = {"start": result(0.3)} | {f"free/{seed}": result(0.1, curve=curve) for seed in range(3)}
    assert overoptimization.rows(stored) == [["without KL", "0.50", "10.50", "40.0%", "60.0%", "10.0%"]]
    page = overoptimization.page(stored)
    assert "| with KL 0.05 | pending |" in page and "Pending, 6 of 10 cells: `kl/0`, `rules/0`, `kl/1`" in page
    assert overoptimization.page({}).startswith("Pending, 10 of 10 cells: `start`")
    control = {"rules/0": result(0.8, curve={"tokens": [1] * 6, "accuracy": [0.4, 0.5, 0.6, 0.7, 0.8, 0.7]})}
    assert overoptimization.rows(control) == [["rules without KL", "-", "-", "40.0%", "80.0%", "70.0%"]]


def test_the_reward_model_is_made_once(toy, monkeypatch, tmp_path):
    for name in ("preference_pairs.py", "reward_model.py"):
        (tmp_path / "toy_scripts" / name).write_text(
            "import sys\nfrom pathlib import Path\n"
            "out = Path(sys.argv[sys.argv.index('--out') + 1])\nout.mkdir()\n(out / 'result.json').write_text('{}')\n"
        )
    monkeypatch.setattr(overoptimization, "PACKAGE", "toy_scripts")
    overoptimization.reward_model(toy)
    overoptimization.reward_model(toy)  # a second time mkdir would fail
    asked = (toy.out / "reward_model.command").read_text()
    assert f"--pairs {toy.out}/pairs/train.jsonl --held-out {toy.out}/pairs/held_out.jsonl" in asked


def test_kl_in_the_reward_is_compared_with_its_own_algorithm():
    page = kl.page(results(plain=(0.5, 0.5, 0.5), none=(0.9, 0.9, 0.9), reward=(0.7, 0.7, 0.7)))
    assert "Significantly different from no KL (REINFORCE) by both intervals: k1 in reward 0.05 (+20.0 points)" in page


# ---- figures -------------------------------------------------------------------------------------


def words(figure) -> list[str]:
    texts = [text.get_text() for owner in [figure, *figure.axes] for text in owner.texts]
    return texts + [axes.get_title(loc="left") for axes in figure.axes]


def test_the_figures(tmp_path):
    stored = results(a=(0.78, 0.80, 0.82), b=(0.5, 0.6))
    drawn = tables.parts(stored, METHODS | {"c": Method("C", "")})
    assert drawn["ends"] == {"A": [0.78, 0.80, 0.82], "B": [0.5, 0.6]} and drawn["intervals"].keys() == {"A"}
    figure = figures.algorithms(tables.start(stored), **drawn, path=tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert {"Test pass@1: 30% → between 55% and 80%", "A", "B", "80%", "55%", "start"} <= set(words(figure))
    assert figure.axes[1].lines[-1].get_xdata()[-1] == 0.03  # thousand tokens
    np.testing.assert_allclose(figure.axes[1].lines[-1].get_ydata()[0], 0.2)  # a mean of the first two steps
    panels = {"length": ("Length", "tokens"), "accuracy": ("Training", "share"), "kl": ("KL", "nats")}
    figure = figures.settings(tables.start(stored), **drawn, path=tmp_path / "s.png", panels=panels)
    assert {"Length", "Training", "KL"} <= set(words(figure)) and len(figure.axes) == 4
    assert not figure.axes[3].lines  # nothing measured it
    single = {key: {"A": value["A"]} for key, value in drawn.items()}
    figure = figures.algorithms((0.1, 0.09, 0.11), **single, path=tmp_path / "a.png")
    assert "Test pass@1, A: 10% → 80%" in words(figure) and any("start at 10%" in text for text in words(figure))


def test_the_figure_of_an_overoptimised_reward(tmp_path):
    runs = [{"proxy": list(range(12)), "accuracy": [0.5] * 6 + [0.2] * 6}] * 3
    control = [{"accuracy": [0.5] * 6 + [0.8] * 6}]
    figure = figures.overoptimization({"without KL": runs, "rules": control}, tmp_path / "o.png")
    assert {"without KL: learned reward 0.5 → 10.5, right answers 50% → 20%", "rules"} <= set(words(figure))
    assert [len(axes.lines) for axes in figure.axes] == [4, 2, 4, 0]  # the control has no proxy
    figure = figures.overoptimization({"rules": control}, tmp_path / "o.png")
    assert "rules: right answers 50% → 80%" in words(figure)
