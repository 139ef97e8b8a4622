"""Studies of distillation at toy size: cells that resume, what they train on, and the figures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_preference_pairs import save_base

from experiments import evaluate
from experiments.studies import distill_figures, distill_vs_rl, distill_ways
from minir1 import cli
from minir1.files import write_json
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
    small = {"tokens": 300, "batch": 4, "length": 12, "held_out": 4, "seeds": (0,)}
    figure = tmp_path / "ways.png"
    return distill_ways.Config(teacher, out=tmp_path / "ways", results=tmp_path / "ways.json", figure=figure, **small)


def test_every_way_trains_on_as_many_tokens_and_is_measured(ways, monkeypatch):
    distill_ways.prepare(ways)
    results = {name: distill_ways.cell(ways, name, 0) for name in distill_ways.WAYS}
    texts = [distill_ways.Document(*text) for text in torch.load(ways.out / "texts.pt")]
    total = sum(sum(text.trained) for text in texts)
    assert total >= ways.tokens
    for name, way in distill_ways.WAYS.items():
        on = ways.batch * (ways.length - 1) * (len(texts) // ways.batch + 1) / 2 if way.on else 0
        assert abs(results[name]["tokens"] - total) <= on
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
    for name, (script, options) in distill_vs_rl.commands(config, tmp_path / "r1", 0).items():
        module = __import__(f"experiments.{script}", fromlist=["Config"])
        monkeypatch.setattr("sys.argv", ["script", *options.split()])
        found = []
        cli.run(found.append, module.Config)
        read = [str(getattr(found[0], key, None)) for key in ("checkpoint", "student", "teacher")]
        assert {path for path in read if path != "None" and path.startswith(str(tmp_path))} <= written, name
        assert found[0].out == tmp_path / "seed-0" / name and found[0].seed == 0
        written.add(f"{found[0].out}/checkpoint")


def test_the_figures_of_the_comparison(tmp_path, toy_base, monkeypatch):
    folder = tmp_path / "seed-0"
    for i, name in enumerate(distill_vs_rl.WAYS):
        evaluate.main(evaluate.Config(
            checkpoint=toy_base() / "checkpoint", problems=3, num_generations=2, max_completion_length=12, seed=i,
            forced=False, out=folder / "test" / name, device="cpu",
        ))  # fmt: skip
    write_json(folder / "kept" / "result.json", {"seconds": 7.0})
    for name in ("texts", "logits"):
        write_json(folder / name / "result.json", {"tokens": 100, "seconds/distill": 3.0})
    for name in ("rl", "texts-rl", "on-policy"):
        key = "seconds/distill" if name == "on-policy" else "seconds/rl"
        write_json(folder / name / "result.json", {key: 5.0})
        lines = [{"step": 0, "eval/pass@1": 0.1}, {"step": 1, "train/sampled_tokens": 40, "eval/pass@1": 0.2}]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = distill_vs_rl.figures(folder)
    assert values["texts/seconds"] == 10.0 and values["texts/tokens"] == 100
    assert values["on-policy/seconds"] == 15.0 and values["on-policy/tokens"] == 140 and values["rl/tokens"] == 40
    assert values["curve"] == [[0, 0.1], [40, 0.2]] and values["rl/over_rl"] == 0.0
    results = [values] * 3
    assert len(distill_vs_rl.rows(results)) == len(distill_vs_rl.WAYS)
    assert "250% of the tokens" in distill_vs_rl.finding(results)
    distill_figures.draw_against_rl(results, distill_vs_rl.WAYS, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
