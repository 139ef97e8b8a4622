"""experiments/studies/estimators.py: the results agree with the identities and with the published ones."""

import json
from functools import partial
from pathlib import Path

import pytest

from experiments.studies import estimators, estimators_figures
from experiments.studies import estimators_catalogue as catalogue
from experiments.studies.estimators_figures import BLUE, GREEN, ORANGE
from minir1.advantages import leave_one_out
from minir1.losses import reinforce

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results():
    return estimators.run()


def test_the_published_numbers_are_these(results):
    published = json.loads((ROOT / "docs" / "results" / "estimators.json").read_text())
    assert published.keys() == results.keys()
    for part, values in results.items():
        for name, value in values.items():
            assert published[part][name] == pytest.approx(value, abs=1e-9), (part, name)


def test_which_estimators_are_unbiased_or_only_shorten_the_step(results):
    on = results["on_policy"]
    unbiased = {name for name, f in on.items() if f["bias"] < 1e-9}
    assert unbiased == {"reinforce", "constant", "rloo", "gae_1", "gae_true"}
    scaled = {name: f["scale"] for name, f in on.items() if f["direction"] < 1e-9 <= f["bias"]}
    assert scaled == pytest.approx({"batch": 7 / 8, "dr_grpo": 3 / 4})
    for f in on.values():  # the bias consists of that of the scale and that of the direction
        assert f["bias"] ** 2 == pytest.approx((f["scale"] - 1) ** 2 + (f["scale"] * f["direction"]) ** 2, abs=1e-9)
        assert f["cosine"] == pytest.approx((1 + f["direction"] ** 2) ** -0.5)
    assert on["rloo"]["deviation"] == pytest.approx(on["dr_grpo"]["deviation"])
    assert on["gspo"] == pytest.approx(on["grpo"]) and on["sequence"] == pytest.approx(on["std"], abs=1e-5)


def test_a_batch_is_the_draws_of_both_problems(results):
    """An estimator that ignores the other problem has the same moments over the draws of both."""
    answers = catalogue.everything()

    def others(rows):
        return leave_one_out(answers.rewards[rows].view(2, 4)).view(-1, 1).expand(-1, 2)

    both = partial(catalogue.of_batch, loss=reinforce, advantage=others, weight=catalogue.fixed_over_batch)
    pair = catalogue.problems()
    one = estimators.measure(catalogue.Estimator("", "", both, True), pair, estimators.ascent(pair))
    assert one == pytest.approx(results["on_policy"]["rloo"], abs=1e-9)
    assert len(answers.own) == 3**4 and len(answers.other) == 15  # kinds: one token, two and wrong, two and right


def test_which_gradients_of_distillation_are_unbiased_and_which_are_the_same(results):
    f = results["distillation"]
    assert {name for name, one in f.items() if one["forward"] < 1e-9} == {"texts", "forward"}
    assert {name for name, one in f.items() if one["reverse"] < 1e-9} == {"to_go"}
    for sampled, whole in (("texts", "forward"), ("on", "exact")):
        same = [f[name][key] for name in (sampled, whole) for key in ("forward", "reverse")]
        assert same[:2] == pytest.approx(same[2:], abs=1e-9)
        assert f[whole]["deviation"] < f[sampled]["deviation"] / 2
    kl = results["kl"]["k2"]  # its expectation is Σ_t ∇KL_t(π‖π_ref), as on policy with discount 0
    assert f["on"]["reverse"] == pytest.approx(kl["bias"])


def test_the_deviation_follows_the_binomial_formula(results):
    f = results["problems"]
    for name in ("hard", "even"):
        assert f[f"{name}/w"] == pytest.approx(estimators.deviation_weight(f[f"{name}/p"], 4), abs=1e-5)  # eps = 1e-6
    assert estimators.deviation_weight(0.3, 2) == pytest.approx(2**-0.5)  # k = 1: σ = 1/√2, times (G-1)/G
    assert estimators.deviation_weight(0.2, 1000) == pytest.approx(1 / 0.4, rel=2e-3)


def test_the_kl_that_each_term_descends(results):
    kl = results["kl"]
    hits = {name: {key for key in ("bias", "to_steps", "to_reverse_steps") if f[key] < 1e-9} for name, f in kl.items()}
    whole = {"bias"}
    assert hits == {"reward": whole, "answer": whole, "k2": {"to_steps"}, "k3": {"to_reverse_steps"}, "k1": set()}
    assert kl["k1"]["scale"] == 0 and kl["k1"]["deviation"] is None and kl["k1"]["noise"] > 1
    assert kl["reward"]["noise"] < kl["answer"]["noise"]


def test_only_the_sequence_level_ratio_removes_all_bias(results):
    for step in ("moved_0.1", "moved_0.3"):
        part = results[step]
        assert [name for name in estimators.MOVED if part[name]["bias"] < 1e-9][0] == "answer"
        assert part["token"]["bias"] < part["none"]["bias"]
    near, far = results["moved_0.1"], results["moved_0.3"]
    assert near["setting"]["clipped"] == 0 and near["clip"] == pytest.approx(near["token"])
    assert far["setting"]["clipped"] > 0 and far["clip"]["bias"] > far["token"]["bias"]
    assert far["answer"]["deviation"] > near["answer"]["deviation"]


def test_the_page_has_a_row_per_estimator(results):
    assert len(estimators.page(results).splitlines()) == 2 + len(estimators.ON_POLICY)
    assert "| k2 in the loss | Σ_t ∇KL_t(π‖π_ref) |" in estimators.page_kl(results)
    assert "| G = 4 | 1.50 |" in estimators.page_problems(results)
    assert "0.0% of tokens clipped" in estimators.page_moved(results)


def test_the_figure_colours_by_what_is_biased(tmp_path):
    def one(direction, scale, bias):
        return {"direction": direction, "scale": scale, "bias": bias, "deviation": 2.0}

    gradients = {"A": one(0.0, 1.0, 0.0), "B": one(1e-16, 0.5, 0.5), "C": one(0.3, 1.0, 0.3)}
    targets = {"bias": 0.0, "to_steps": 0.2, "to_reverse_steps": 0.4}
    kl = {"D": targets, "E": dict.fromkeys(targets, 1.0)}
    figure = estimators_figures.estimators(gradients, kl, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    title = "Expected direction of policy-gradient estimators: that of ∇J for 2 of 3"
    assert figure.texts[0].get_text() == title
    bias, noise, terms = figure.axes
    assert [line.get_color() for line in bias.lines[1::2]] == [GREEN, BLUE, ORANGE]
    assert [text.get_text() for text in bias.texts] == ["0", "0   step × 0.50", "30%"]
    assert [line.get_xdata()[0] for line in noise.lines[1::2]] == [2.0, 2.0, 2.0]
    assert any(text.get_text() == "no gradient at all, only noise" for text in terms.texts)
