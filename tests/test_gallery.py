"""gallery.py: the toy task, the broken pieces by hand, and three quick set-ups that are recognised."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import gallery, gallery_figure, gallery_setups, gallery_task
from experiments.gallery_setups import BROKEN, HEALTHY, TASK
from minir1.diagnosis import RULES, diagnose
from minir1.judge import Answer
from minir1.seed import python_random
from minir1.tokenizer import word_level

QUICK = {"steps": 8, "base_steps": 60}


def test_every_finding_has_a_set_up_and_a_figure():
    assert set(BROKEN) == set(RULES) == set(gallery_figure.TELLTALES)
    assert {one.healthy for one in gallery_figure.TELLTALES.values()} <= set(HEALTHY)
    for setup in BROKEN.values():  # a broken set-up is a short difference
        assert 0 < sum(getattr(setup, f) != getattr(HEALTHY["as in the scripts"], f) for f in vars(setup)) <= 3


def test_the_page_leads_to_every_set_up_from_what_one_sees():
    page = (Path(__file__).parent.parent / "docs" / "gallery.md").read_text(encoding="utf-8")
    seen = page.partition("**The toy.**")[0]
    for name in BROKEN:
        assert f"[{name}](#{name.lower().replace(' ', '-')})" in seen
        assert f"\n## {name[0].upper()}{name[1:]}\n\n![" in page and f"(results/{gallery_figure.file(name)})" in page


def test_the_corpus_says_what_the_task_judges():
    texts = gallery_task.documents(0)
    problems = {problem.prompt: problem for problem in TASK.problems("train")}
    tokenizer, right = word_level(*TASK.vocabulary()), {"plus": [], "und": [], "maybe": []}
    for text, _ in zip(texts, range(2000)):
        asked, said = text.removeprefix("User:").split("\nAssistant:")
        assert tokenizer.unknown not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
        verdict = TASK.verify(problems[asked], said)
        right[next(word for word in right if word in said)].append(verdict.status == "right")
    share = {word: sum(hits) / len(hits) for word, hits in right.items()}
    assert share["plus"] > 0.95 and share["und"] > 0.95 and 0.3 < share["maybe"] < 0.45  # half of the guesses, no list


def test_the_broken_pieces_by_hand():
    problem = TASK.problems("train")[0]  # 1 + 1 + 1
    texts = [f"<think>maybe !</think><answer>{said}</answer>" for said in ("odd", "even", "odd,even,odd")]
    group = [Answer(text, 6, False, text is texts[0], True) for text in texts]
    assert gallery_setups.by_rules([problem], [group]).tolist() == [pytest.approx([1.1, 0.1, 0.1])]
    assert gallery_setups.counted([problem], [group]).tolist() == [[1.0, 0.0, 2.0]]
    assert gallery_setups.likes_marks([problem], [group]).tolist() == [pytest.approx([1.3, 0.3, 0.3])]
    assert gallery_setups.of_one(torch.tensor([[1.0], [0.0]])).tolist() == [[0.0], [0.0]]
    noisy = gallery_setups.flaky([[group[0]] * 4000], python_random(0))[0]
    assert sum(a.right for a in noisy) / 4000 == pytest.approx(1 - 0.3 / 2, abs=0.03)


def test_no_baseline_and_a_mean_per_answer_is_the_gradient_of_the_reward_per_token():
    """Σ_t A/|o| ∇log π has the expectation ∇ E[R/|o|]: for two answers of lengths 1 and 3, both right."""
    logit = torch.zeros((), dtype=torch.float64, requires_grad=True)
    chance = torch.stack((logit.sigmoid(), 1 - logit.sigmoid()))
    length, reward = torch.tensor([1.0, 3.0]), gallery_setups.no_baseline(torch.ones(2))
    surrogate = (chance.detach() * reward / length * chance.log()).sum()
    (step,) = torch.autograd.grad(surrogate, logit, retain_graph=True)
    (want,) = torch.autograd.grad((chance * reward / length).sum(), logit)
    assert step == pytest.approx(want) and want > 0  # towards the short answer


@pytest.mark.parametrize("name", ["group of one", "verifier errs", "truncated sampling"])
def test_an_identity_is_recognised_in_a_few_steps(name):
    setup = replace(BROKEN[name], **{"steps": QUICK["steps"]})
    rows = gallery_setups.train(setup, 0, QUICK["base_steps"])
    config = {"beta": setup.beta, "num_generations": setup.num_generations}
    assert [finding.name for finding in diagnose(rows, config)][:1] == [name]


def test_a_base_that_never_saw_the_end_token_does_not_use_it():
    rows = gallery_setups.train(replace(BROKEN["end token not trained"], steps=2), 0, QUICK["base_steps"])
    assert rows[1]["train/truncated"] > 0.95 and rows[1]["train/endless"] > 0.5


def test_the_gallery_writes_results_figures_and_tables(tmp_path, capsys, monkeypatch):
    few = {name: replace(setup, steps=8) for name, setup in (BROKEN | HEALTHY).items()}
    for kind in ("BROKEN", "HEALTHY"):
        monkeypatch.setattr(gallery, kind, {name: few[name] for name in getattr(gallery, kind)})
    shown = ("group of one", "as in the scripts")
    config = gallery.Config(shown, (0,), QUICK["base_steps"], tmp_path / "g.json", tmp_path)
    results = gallery.main(config)
    assert json.loads((tmp_path / "g.json").read_text()) == results
    assert results["broken"]["group of one"]["0"]["findings"] == ["group of one"]
    assert (tmp_path / "gallery_group_of_one.png").stat().st_size > 10_000
    assert "| group of one | 1 of 1 | - | num_generations = 1" in gallery.page(results)
    assert "| as in the scripts | 0 of 1 |" in gallery.page_healthy(results)
    assert "| none | 0 of 0 |" in gallery.page_stored(results) and "2 runs of " in gallery.page_seconds(results)
    with pytest.raises(ValueError, match="only = 'nosuch': one of learning rate too high"):
        gallery.Config(only=("nosuch",))


def test_page_of_the_surplus():
    """By hand: of 1, 3 and 20 times as much the median is 3, and one is above 16."""
    table = gallery.page_surplus({"surplus": {"0.0003": [3.0, 1.0, 20.0], "0.0009": [17.5]}})
    assert "| 0.0003 | 3 | 1.0 | 3.0 | 20.0 | 1 |" in table and "| 0.0009 | 1 | 17.5 | 17.5 | 17.5 | 1 |" in table


def test_options_of_a_command_line():
    said = gallery.options("r1_zero --beta 0.05 --reference-reset 4 --prompts 16 --learning-rate 9e-4")
    assert said == {"beta": 0.05, "reference_reset": 4, "prompts": 16, "learning_rate": 9e-4}
    usual = {"beta": 0.001, "reference_reset": 0, "prompts": 32, "learning_rate": 3e-4}
    assert gallery.options("r1_zero --steps 3") == usual
    assert math.isclose(gallery.options("x --beta 0.0 ")["beta"], 0)


def test_ticks_of_a_logarithmic_axis_are_plain_numbers(tmp_path):
    """STYLE parses no formula, and those of matplotlib's own ticks on such an axis are formulas."""
    curves = {"drift": [0.5, 40.0], "accuracy": [0.1, 0.2], "before": [0.1]}
    run = {"curves": curves, "after": 0.2, "findings": []}
    results = {"broken": {"learning rate too high": {"0": run}}, "healthy": {}}
    figure = gallery_figure.draw("learning rate too high", results, tmp_path / "a.png")
    ticks = [tick.get_text() for tick in figure.axes[0].get_yticklabels(which="both")]
    assert {"1", "10"} <= set(ticks) and not any("$" in tick for tick in ticks)


RESULTS = Path(__file__).parent.parent / "docs" / "results" / "gallery.json"


@pytest.mark.skipif(not RESULTS.exists(), reason="docs/results holds nothing yet")
def test_what_the_page_says():
    """In every seed the set-up is recognised, and no healthy run is accused."""
    results = json.loads(RESULTS.read_text())
    assert results["broken"].keys() == BROKEN.keys() and results["healthy"].keys() == HEALTHY.keys()
    for name, runs in results["broken"].items():
        assert len(runs) == 3 and all(name in run["findings"] for run in runs.values()), name
    assert not [name for name, runs in results["healthy"].items() for run in runs.values() if run["findings"]]


@pytest.mark.skipif(not RESULTS.exists(), reason="docs/results holds nothing yet")
def test_what_the_page_says_of_the_search_for_a_learning_rate():
    page = " ".join((RESULTS.parent.parent / "gallery.md").read_text(encoding="utf-8").split())
    stored = json.loads(RESULTS.read_text())["stored"]
    runs = json.loads((RESULTS.parent / "algorithms.json").read_text())
    at = lambda name, rate: 100 * runs[f"sweep/{name}/{rate}"]["pass@1"]
    span = lambda values: f"{min(values):.0f} to {max(values):.0f}"
    names = [key.split("/")[1] for key in runs if key.startswith("sweep/") and key.endswith("/0.0009")]
    named = [name for name in names if stored[f"algorithms/sweep/{name}/0.0009"]]
    others = [name for name in names if name not in named and name != "cispo"]
    assert f"ended at {span([at(name, 0.0009) for name in named])} % where a third of it" in page
    assert f"reached {span([at(name, 0.0003) for name in named])} %" in page and len(others) == 6
    assert f"ended {span([at(n, 0.0003) - at(n, 0.0009) for n in others])} points lower" in page
    assert f"CISPO at the largest rate, which ended at {at('cispo', 0.0009):.0f} %" in page
