"""Studies of distillation at toy size: cells that resume, what they train on, and the figures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_preference_pairs import save_base

from experiments import evaluate
from experiments.studies import distill_figures, distill_vs_rl, distill_ways, thinking
from minir1 import cli, tasks
from minir1.files import read_json, write_json
from minir1.model import hf

STORIES = Path(__file__).parent.parent.parent / "shared" / "data" / "stories260k"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An untrained model whose BOS is its end token."""
    path = save_base(tmp_path_factory.mktemp("teacher"))
    model, tokenizer = hf.load(path)
    model.config = replace(model.config, bos=model.config.eos)
    hf.save(model, tokenizer, path)
    return path


@pytest.fixture
def ways(teacher, tmp_path):
    small = {"tokens": 300, "batch": 32, "length": 12, "held_out": 4, "seeds": (0,)}
    figure = tmp_path / "ways.png"
    return distill_ways.Config(teacher, out=tmp_path / "ways", results=tmp_path / "ways.json", figure=figure, **small)


def test_every_way_trains_on_as_many_tokens_and_is_measured(ways, monkeypatch):
    distill_ways.prepare(ways)
    results = {name: distill_ways.cell(ways, name, 0) for name in distill_ways.WAYS}
    texts = [distill_ways.Document(*text) for text in torch.load(ways.out / "texts.pt")]
    total = sum(sum(text.trained) for text in texts)
    assert total >= ways.tokens
    for name, way in distill_ways.WAYS.items():
        over = ways.batch * (ways.length - 1) if way.on else 1  # one batch at most
        assert total <= results[name]["tokens"] < total + over
        assert results[name]["perplexity"] > 0 and results[name]["forward_kl"] > 0 < results[name]["reverse_kl"]
    monkeypatch.setattr(distill_ways, "train", lambda *_: pytest.fail("trained again"))
    assert distill_ways.cell(ways, "texts", 0) == results["texts"]
    rows = distill_ways.rows({name: [result] * 3 for name, result in results.items()})
    assert [row[0] for row in rows] == [way.label for way in distill_ways.WAYS.values()]
    assert "Of 10 ways" in distill_ways.finding({name: [result] for name, result in results.items()})
    distill_figures.draw_ways({name: [result] * 3 for name, result in results.items()}, ways.figure)
    assert ways.figure.stat().st_size > 10_000


def test_the_student_is_a_smaller_teacher(teacher):
    model = hf.load(teacher)[0]
    student = distill_ways.student_of(model, 0)
    assert student.config.dim * 2 == model.config.dim and student.config.layers == model.config.layers
    again, other = distill_ways.student_of(model, 0), distill_ways.student_of(model, 1)
    weights = [x.embedding.weight for x in (student, again, other)]
    assert torch.equal(*weights[:2]) and not torch.equal(weights[0], weights[2])


def test_the_lowest_way_is_named_with_those_that_seeds_do_not_tell_apart():
    runs = lambda *values: [{"x": value} for value in values]
    results = {"a": runs(1.0, 1.1, 1.2), "b": runs(1.05, 1.1, 1.25), "c": runs(1.4, 1.5, 1.7), "d": runs(0.9, 1.6, 1.2)}
    assert distill_ways.lowest(results, "x") == ["a", "b", "d"]  # d - a: -0.1, 0.5, 0
    assert distill_ways.lowest({name: x[:2] for name, x in results.items()}, "x") == ["a"]


def test_a_folder_of_other_settings_is_refused(ways):
    distill_ways.prepare(ways)
    distill_ways.prepare(replace(ways, seeds=(0, 1), ways=("texts",), jobs=2))
    with pytest.raises(ValueError, match="was run with"):
        distill_ways.prepare(replace(ways, tokens=200))


def test_a_teacher_without_bos_and_unknown_ways_are_refused(ways, tmp_path):
    with pytest.raises(ValueError, match="has no BOS token"):
        distill_ways.prepare(replace(ways, teacher=save_base(tmp_path / "base")))
    with pytest.raises(ValueError, match="ways = nosuch: allowed are texts, forward"):
        replace(ways, ways=("texts", "nosuch"))


@pytest.mark.skipif(not STORIES.exists(), reason="no pre-trained model here")
def test_the_divergence_of_a_real_model_from_itself_is_zero(tmp_path):
    teacher = hf.load(STORIES)[0].requires_grad_(False)
    config = distill_ways.Config(STORIES, length=48, out=tmp_path)
    texts = distill_ways.examples_of(distill_ways.write_texts(teacher, 8, config, 0))
    forward, ce, own = distill_ways.measure(teacher, teacher, texts, 0.0)
    assert forward == pytest.approx(0, abs=1e-5) and ce == own and 0.5 < own < 2.0


# ---- against RL --------------------------------------------------------------------------------


def test_every_command_of_the_comparison_is_valid(tmp_path, monkeypatch):
    """The options are read by the scripts themselves; each reads what an earlier one writes."""
    monkeypatch.setattr(distill_vs_rl.checkpoint, "resolve", lambda path: path / "step-000040")
    config = distill_vs_rl.Config((tmp_path / "r1",), out=tmp_path)
    written = {str(tmp_path / "r1" / "rl-2" / "checkpoint" / "step-000040")}
    both = distill_vs_rl.commands(config, tmp_path / "r1", 0) | distill_vs_rl.tests(config, tmp_path / "r1", 0)
    for name, (script, options) in both.items():
        module = __import__(f"experiments.{script}", fromlist=["Config"])
        monkeypatch.setattr("sys.argv", ["script", *options.split()])
        found = []
        cli.run(found.append, module.Config)
        read = [str(getattr(found[0], key, None)) for key in ("checkpoint", "student", "teacher")]
        assert {path for path in read if path != "None" and path.startswith(str(tmp_path))} <= written, name
        assert found[0].out == tmp_path / "seed-0" / name and found[0].seed == 0
        written |= {f"{found[0].out}/checkpoint", f"{found[0].out}/checkpoint/step-000040"}


def test_what_is_done_is_not_run_again(tmp_path, monkeypatch):
    config, ran = distill_vs_rl.Config((tmp_path / "r1",), out=tmp_path), []
    (tmp_path / "r1" / "rl-2" / "checkpoint").mkdir(parents=True)

    def finish(words, folder, asked):
        ran.append(folder.name)
        write_json(folder / "result.json", {})

    monkeypatch.setattr(distill_vs_rl.checkpoint, "resolve", lambda path: path)
    monkeypatch.setattr(distill_vs_rl, "run_or_resume", finish)
    monkeypatch.setattr(distill_vs_rl, "figures", lambda folder: {"done": folder})
    for _ in range(2):
        assert distill_vs_rl.run(config, tmp_path / "r1", 0) == {"done": tmp_path / "seed-0"}
        assert len(ran) == 7 + len(distill_vs_rl.WAYS)


def test_the_figures_of_the_comparison(tmp_path, toy_base, monkeypatch):
    folder = tmp_path / "seed-0"
    for i, name in enumerate(distill_vs_rl.WAYS):
        evaluate.main(evaluate.Config(
            checkpoint=toy_base() / "checkpoint", problems=3, num_generations=2, max_completion_length=12, seed=i,
            forced=False, out=folder / "test" / name, device="cpu",
        ))  # fmt: skip
    write_json(folder / "kept" / "result.json", {"seconds": 7.0, "tokens": 900})
    for name in ("texts", "logits"):
        write_json(folder / name / "result.json", {"tokens": 100, "seconds/distill": 3.0})
    for name in ("rl", "texts-rl", "on-policy"):
        (folder / name).mkdir()
        lines = [{"step": 0, "eval/pass@1": 0.1}, {"step": 1, "train/sampled_tokens": 40, "eval/pass@1": 0.2}]
        lines[1] |= {"time/rollout_s": 2.0, "time/update_s": 3.0}
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = distill_vs_rl.figures(folder)
    assert values["texts/seconds"] == 10.0 and values["texts/tokens"] == 100
    assert values["on-policy/seconds"] == 15.0 and values["on-policy/tokens"] == 140 and values["rl/tokens"] == 40
    assert values["texts-rl/teacher_tokens"] == 900 and values["rl/teacher_tokens"] == 0 and values["rl/seconds"] == 5.0
    assert values["curve"] == [[0, 0.1], [40, 0.2]] and values["rl/over_rl"] == 0.0
    results = [values] * 3
    assert len(distill_vs_rl.rows(results)) == len(distill_vs_rl.WAYS)
    assert "250% of RL's, 2500% with the teacher's samples, the seconds 200% to 200%" in distill_vs_rl.finding(results)
    distill_figures.draw_against_rl(results, distill_vs_rl.WAYS, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


# ---- what thinking is worth --------------------------------------------------------------------


@pytest.fixture(scope="module")
def thought(tmp_path_factory, toy_base):
    """The settings and results of two seeds at toy size; for the head, half of the verdicts are by chance."""
    path = tmp_path_factory.mktemp("thinking")
    for name, kind in (("r1/r1-zero", "moe"), ("student/on-policy", "dense")):
        shutil.copytree(toy_base(kind) / "checkpoint", path / name / "checkpoint")
    config = thinking.Config(
        pipelines=(path / "r1",) * 2, students=(path / "student",) * 2, task="countdown", max_completion_length=16,
        train_problems=8, problems=4, num_generations=4, out=path / "out", results=path / "thinking.json",
        verify_figure=path / "verify.png", budget_figure=path / "budget.png",
    )  # fmt: skip
    real = tasks.load("countdown")
    by_length = lambda problem, text: tasks.Verdict("right" if len(text) % 2 else "wrong", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thinking.self_verify.tasks, "load", lambda *_, **__: replace(real, verify=by_length))
        for seed in (0, 1):
            thinking.seed_of(config, seed)
    return config, thinking.main(config)


def test_thinking_is_measured_once_for_each_seed(thought, monkeypatch):
    config, results = thought
    assert len(results) == 2 and results[0] != results[1]
    assert [*results[0]["budget"]] == [thinking.ZERO, thinking.STUDENT]
    assert results[0]["verify"] == read_json(config.out / "seed-0" / "verify" / "result.json")
    for name in ("verify_figure", "budget_figure"):
        assert getattr(config, name).stat().st_size > 10_000
    for module, name in ((thinking.self_verify, "main"), (thinking.budget, "curves")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("measured again"))
    assert thinking.seed_of(config, 1) == results[1]
    written = read_json(config.results)
    assert "right answers the head knows" in thinking.page_verify(written)
    assert thinking.page_budget(written).count("one answer, the whole budget") == 2


def test_means_and_intervals_over_seeds_by_hand():
    point = lambda right: {"right": right, "low": 0.0, "high": 1.0, "tokens": 10 * right}
    runs = [{"budget": {"m": {"limit": {"0": point(x)}}}} for x in (0.4, 0.5, 0.6)]
    mean = thinking.budgets(runs)["m"]["limit"]["0"]
    half = 4.302653 * 0.1 / 3**0.5  # Student's t, two degrees of freedom
    assert mean == pytest.approx({"right": 0.5, "low": 0.5 - half, "high": 0.5 + half, "tokens": 5.0}, abs=1e-4)
    assert thinking.budgets(runs[:2])["m"]["limit"]["0"] == pytest.approx(
        {"right": 0.45, "low": 0.0, "high": 1.0, "tokens": 4.5}
    )
    assert thinking.over([{"a": 1, "b": 2}, {"a": 3}]) == {"a": 2.0}


def test_the_majority_at_a_number_of_tokens_lies_between_its_points():
    run = {"pass@1": 0, "pass@4": 0, "maj@1": 0.2, "maj@4": 0.6, "tokens@1": 10.0, "tokens@4": 40.0}
    assert thinking.majority_at(run, 10) == pytest.approx(0.2)
    assert thinking.majority_at(run, 20) == pytest.approx(0.4)  # half-way in the logarithm
    assert thinking.majority_at(run, 1000) == pytest.approx(0.6)


def test_students_must_be_as_many_as_pipelines(tmp_path):
    with pytest.raises(ValueError, match="pipelines, students"):
        thinking.Config((tmp_path,), students=(tmp_path, tmp_path))
