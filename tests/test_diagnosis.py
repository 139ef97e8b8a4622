"""diagnosis.py: each rule on metrics made by hand, at both sides of its bound; and on the runs that studies stored."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments.gallery import of_studies
from minir1.diagnosis import (
    RULES,
    SURPLUS,
    Quarters,
    diagnose,
    drift,
    fall,
    fall_from_best_steps,
    far,
    no_signal,
    quarters,
    start,
    values,
)

RESULTS = Path(__file__).parent.parent / "docs" / "results"
CONFIG = {"beta": 0.001, "num_generations": 8, "reference_reset": 0}
RISE = np.linspace(0.3, 0.9, 40)


def rows(before=None, **columns) -> list[dict]:
    """Forty steps of a healthy run, with other columns and another row of step 0."""
    healthy = {
        "accuracy": RISE, "reward": RISE + 0.1, "length": 50, "kl": 0.02, "format": 1.0, "truncated": 0.02,
        "endless": 0.0, "contradictions": 0.0, "grad_norm": 0.2, "clip_fraction": 0.01, "mixed_groups": 0.6,
        "ratio": 1.0, "ratio_deviation": 1e-7, "idle_experts": 0.0,
    }  # fmt: skip
    columns = {name: np.broadcast_to(column, 40) for name, column in (healthy | columns).items()}
    first = {f"preflight/{k}": v for k, v in ({"pass@1": 0.3, "format": 0.95} | (before or {})).items()}
    steps = [{f"train/{name}": float(column[t]) for name, column in columns.items()} for t in range(40)]
    return [{"step": 0} | first, *({"step": t + 1} | step for t, step in enumerate(steps))]


def names(table: list[dict], **config) -> list[str]:
    return [finding.name for finding in diagnose(table, CONFIG | config)]


def falling(top: float, bottom: float) -> np.ndarray:
    """Up to `top`, then down to `bottom`."""
    parts = np.linspace(0.3, top, 10), np.full(10, top), np.linspace(top, bottom, 10), np.full(10, bottom)
    return np.concatenate(parts)


FAR = SURPLUS * -math.log(0.3) / 50  # nats per token at the bound, for answers of 50 tokens
FLAT = np.tile([0.69, 0.71], 20)
EARLY = np.array([0.7, 0.9, 0.9] + [0.4] * 7 + [0.6] * 30)  # a collapse within the first quarter, and half a recovery
NONE = {"accuracy": 0.0, "reward": 0.0}
BROKEN = [  # name of the finding, columns that show it, the same just within the bound, changes of the config
    ("group of one", {"grad_norm": 0.0}, {"grad_norm": 0.002}, {"num_generations": 1}),
    ("group of one", {"grad_norm": 0.001}, {"grad_norm": 0.02}, {"num_generations": 1, "beta": 1.0}),
    ("group of one", {"grad_norm": 0.0}, {"grad_norm": 0.0} | NONE, {"num_generations": 1}),
    ("group of one", {"grad_norm": 0.0}, {"grad_norm": math.nan}, {"num_generations": 1}),
    ("truncated sampling", {"ratio": 0.95, "ratio_deviation": 0.05}, {"ratio": 0.96, "ratio_deviation": 0.05}, {}),
    ("truncated sampling", {"ratio": 0.99, "ratio_deviation": 0.01}, {"ratio": 1.01, "ratio_deviation": 0.01}, {}),
    ("verifier errs", {"contradictions": 0.1}, {"contradictions": 0.0}, {}),
    ("wrong template", {"format": 0.0} | NONE, {"format": 0.0}, {}),
    ("wrong template", {"format": 0.0} | NONE, {"format": 0.0, "truncated": 0.6} | NONE, {}),
    ("end token not trained", {"truncated": 0.9, "endless": 0.6}, {"truncated": 0.9, "endless": 0.4}, {}),
    ("router collapse", {"idle_experts": 0.5}, {"idle_experts": 0.375}, {}),
    ("learning rate too high",
     {"accuracy": falling(0.8, 0.6), "reward": falling(0.9, 0.7), "clip_fraction": 0.3},
     {"accuracy": falling(0.8, 0.6), "reward": falling(0.9, 0.7), "clip_fraction": 0.1}, {}),
    ("learning rate too high",
     {"accuracy": falling(0.8, 0.6), "reward": falling(0.9, 0.7), "kl": 1.1 * FAR},
     {"accuracy": falling(0.8, 0.75), "reward": falling(0.9, 0.85), "kl": 1.1 * FAR}, {}),
    ("learning rate too high",
     {"accuracy": EARLY, "reward": EARLY, "kl": 1.1 * FAR}, {"accuracy": EARLY, "reward": EARLY, "kl": 0.9 * FAR}, {}),
    ("no KL", {"kl": 1.1 * FAR}, {"kl": 0.9 * FAR}, {"beta": 0.0}),
    ("reward hacked", {"accuracy": falling(0.6, 0.4)}, {"accuracy": falling(0.6, 0.55)}, {}),
    ("reward hacked",
     {"accuracy": falling(0.6, 0.4)}, {"accuracy": falling(0.6, 0.4), "reward": falling(0.7, 0.5)}, {}),
    ("collapse to short answers",
     {"accuracy": falling(0.8, 0.6), "reward": falling(0.9, 0.7), "length": 100 * falling(0.8, 0.3)},
     {"accuracy": falling(0.8, 0.6), "reward": falling(0.9, 0.7), "length": 100 * falling(0.8, 0.65)}, {}),
    ("stale reference", {"accuracy": FLAT, "kl": 0.01}, {"accuracy": FLAT, "kl": 0.0009}, {"beta": 1.0}),
    ("stale reference", {"accuracy": FLAT, "kl": 0.02}, {"accuracy": FLAT, "kl": 0.03}, {"beta": 1.0}),
    ("stale reference", {"accuracy": FLAT, "kl": 0.01}, {"kl": 0.01}, {"beta": 1.0}),
    ("stale reference",
     {"accuracy": FLAT, "kl": 0.01}, {"accuracy": FLAT, "kl": 0.01, "mixed_groups": 0.2}, {"beta": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize("name, columns, within, config", BROKEN)
def test_a_rule_accuses_beyond_its_bound_and_not_within(name, columns, within, config):
    assert names(rows(**columns), **config) == [name]
    assert names(rows(**within), **config) == []


def test_what_does_not_compare_within_groups_may_have_groups_of_one_and_a_small_gradient():
    assert names(rows(grad_norm=0.0), num_generations=1) == ["group of one"]
    for script in ({"gamma": 1.0}, {"teacher": "runs/large/checkpoint"}):
        assert names(rows(grad_norm=0.0), num_generations=1, **script) == []


def test_a_reference_that_moves_is_not_stale():
    assert names(rows(accuracy=FLAT, kl=0.01), beta=1.0) == ["stale reference"]
    for moves in ({"reference_reset": 5}, {"tau": 0.02}):
        assert names(rows(accuracy=FLAT, kl=0.01), beta=1.0, **moves) == []


def test_every_rule_is_tested_and_gives_evidence_and_advice():
    assert {name for name, *_ in BROKEN} == set(RULES)
    for name, columns, _, config in BROKEN:
        (finding,) = diagnose(rows(**columns), CONFIG | config)
        assert any(letter.isdigit() for letter in finding.evidence) and len(finding.advice) > 20


def test_a_healthy_run_and_one_without_metrics_are_not_accused():
    assert names(rows()) == names(rows(), beta=0.0) == names(rows(), num_generations=1) == []
    assert names([]) == names([{"step": 0}]) == names([{"step": 0}, {"step": 1, "train/accuracy": 0.5}]) == []
    bare = [{"step": t, "train/accuracy": 0.5} for t in range(40)]
    assert diagnose(bare, {}) == []
    nulls = [{key: None if key != "step" else value for key, value in row.items()} for row in rows()]
    assert names(nulls) == []


def test_too_few_mixed_groups_are_no_signal():
    """The advice depends on whether answers are wrong or right."""
    outlook = {"mixed_groups": 0.04, "pass@1": 0.02, "truncated": 0.75}
    name, evidence, advice = no_signal(outlook, 0.05)
    assert name == "no signal" and "only 4.0% of the groups" in evidence
    assert "an easier --task (pass@1 is 2.0%)" in advice and "--max-completion-length (75.0% are truncated)" in advice
    advice = no_signal(outlook | {"pass@1": 0.98}, 0.05).advice
    assert "a harder --task (pass@1 is 98.0%)" in advice and "--max-completion-length" not in advice
    assert no_signal(outlook, 0.04) is no_signal(outlook, 0.0) is None


def test_what_is_measured_before_the_run():
    formats = {"format": 0.1, "format_chat": 0.9, "format_plain": 0.1}
    (finding,) = diagnose(rows(formats), CONFIG)
    assert finding.name == "wrong template" and "10% of the answers, with --template chat 90%" in finding.evidence
    assert names(rows(formats | {"format": 0.5})) == []
    assert names(rows({"references": 0.8})) == names(rows({"contradictions": 0.1})) == ["verifier errs"]
    assert names(rows({"references": 0.0})) == names(rows({"references": 0.95})) == []  # 0: references of another form


def test_a_reset_reference_is_not_stale_and_a_learned_reward_goes_before_the_rules():
    flat = rows(accuracy=FLAT, kl=0.01)
    assert names(flat, beta=1.0, reference_reset=5) == []
    learned = rows(accuracy=falling(0.6, 0.4), gold=falling(0.6, 0.4), reward=falling(0.7, 0.5), proxy=RISE)
    assert names(learned) == ["reward hacked"]


# ---- the parts ---------------------------------------------------------------------------------


def test_quarters_and_falls_by_hand():
    table = [{"step": 0, "x": 9.0}] + [{"step": t + 1, "x": x} for t, x in enumerate([1, 3, 4, 4, 2, 2, 0, 2])]
    assert values(table, "x").tolist() == [1, 3, 4, 4, 2, 2, 0, 2] and start(table, "x") == 9.0
    quarter = quarters(table, "x")
    assert quarter.mean.tolist() == [2, 4, 2, 1]
    # √2 / √2, and where both values agree the median of √2, 0, 0, √2 in place of 0; times 4 / (4 - 2)
    assert quarter.error == pytest.approx([2, 1, 1, 2]) and quarter.step == pytest.approx(0.5 * 2**0.5)
    assert fall(quarter) == 0.0  # 4 - 1 is not above 3·√(1² + 2²) = 6.7
    assert fall(quarter._replace(mean=np.array([2, 7.8, 2, 1]))) == pytest.approx(6.8)
    assert quarters(table[:-1], "x") is None and quarters(table, "y") is None


def test_what_was_measured_before_has_the_error_of_a_step():
    quarter = Quarters(np.array([0.5, 0.5, 0.5, 0.5]), np.full(4, 0.03), step=0.04)
    assert fall(quarter, 0.64) == 0.0 and fall(quarter, 0.66) == pytest.approx(0.16)  # 3·√(0.04² + 0.03²) = 0.15


def test_the_best_steps_are_lucky():
    """0.8 in three steps, 0.6 in the last quarter of twelve: m = 4, √(2 ln 4) = 1.67, p = 0.7."""
    accuracy = np.array([0.6] * 3 + [0.8] * 3 + [0.6] * 6)
    assert fall_from_best_steps(accuracy, None) == pytest.approx(0.2)
    # √(0.7·0.3 / 2P · (1/3 + 1/3)): 0.108 for P = 6, 0.132 for P = 4; times 1.67 it is 0.18 and 0.22
    assert fall_from_best_steps(accuracy, 6) == pytest.approx(0.2) and fall_from_best_steps(accuracy, 4) == 0.0
    long = np.repeat([0.6, 0.6, 0.8, 0.6], [200, 97, 3, 100])  # three steps of 400, a twelfth is 33
    assert fall_from_best_steps(long, None) == pytest.approx(0.2 * 3 / 33)


def test_drift_is_the_median_of_the_last_quarter():
    kl = np.full(40, 0.02)
    kl[-1] = 100.0  # k3 of one answer
    assert drift(rows(kl=kl)) == pytest.approx((0.02 * 50, -math.log(0.3)))
    assert drift(rows({"pass@1": 0.0})) is None
    assert far((17.0, 0.1)) and not far((15.0, 0.1)) and not far((31.0, 2.0)) and not far(None)


# ---- noise -------------------------------------------------------------------------------------


def measured(rng: np.random.Generator, p: float, problems: int) -> float:
    """The share of right answers, eight to each of some problems of different difficulty."""
    return rng.binomial(8, rng.beta(2 * p, 2 * (1 - p), problems)).mean() / 8


def noisy(rng: np.random.Generator, steps: int, P: int, course: np.ndarray, length: np.ndarray) -> list[dict]:
    """The rows of a healthy run, with the noise of the problems drawn."""
    first = {"step": 0, "preflight/pass@1": measured(rng, course[0], min(64, 4 * P))}
    found = [measured(rng, p, P) for p in course]
    columns = {"accuracy": found, "reward": [a + 0.1 for a in found], "length": length, "kl": [0.05] * steps}
    named = [{f"train/{name}": float(column[t]) for name, column in columns.items()} for t in range(steps)]
    return [first, *({"step": t + 1} | row for t, row in enumerate(named))]


@pytest.mark.parametrize("P", [4, 32])
@pytest.mark.parametrize("steps", [8, 40, 200])
def test_noise_is_rarely_accused(steps, P):
    """Long answers, whose KL is far beyond what right answers need, with a rising accuracy; and a constant accuracy
    with answers that become half as long, as is right."""
    rng, accused = np.random.default_rng(0), [0, 0]
    for _ in range(40):
        rising = noisy(rng, steps, P, np.linspace(0.4, 0.6, steps), np.full(steps, 1000.0))
        shorter = noisy(rng, steps, P, np.full(steps, 0.5), np.linspace(100, 50, steps))
        for kind, table in enumerate((rising, shorter)):
            accused[kind] += bool(names(table, prompts=P))
    assert max(accused) <= 4, accused


def test_problems_that_get_harder_are_no_fall():
    """With a difficulty window the accuracy in training falls to that of the window; the validation says what holds."""
    harder = {"accuracy": falling(0.8, 0.4), "reward": falling(0.9, 0.5), "clip_fraction": 0.3}
    window = {"difficulty_window": (0.2, 0.8)}
    assert names(rows(**harder)) == ["learning rate too high"] and names(rows(**harder), **window) == []
    for validation, found in ((RISE, []), (falling(0.8, 0.4), ["learning rate too high"])):
        table = rows(**harder)
        for t, row in enumerate(table[1:]):
            row["eval/pass@1"] = float(validation[t])
        assert names(table, **window) == found
    flat = rows(accuracy=FLAT, kl=0.01)  # the window keeps it where it is
    assert names(flat, beta=1.0) == ["stale reference"] and names(flat, beta=1.0, **window) == []


def test_an_end_that_is_learned_is_trained():
    endless = np.repeat([0.9, 0.0], [20, 20])
    assert names(rows(truncated=endless, endless=endless)) == []


# ---- runs that were made for something else ----------------------------------------------------


@pytest.mark.skipif(not (RESULTS / "overoptimization.json").exists(), reason="docs/results holds nothing yet")
def test_the_runs_of_the_studies():
    """Those against a learned reward are hacked, with and without KL; of the others only unstable ones are accused."""
    found = of_studies(RESULTS)["stored"]
    assert len(found) > 100
    for name, findings in found.items():
        hacked = name.startswith("overoptimization/") and "rules" not in name
        assert ("reward hacked" in findings) == hacked, name
        if findings and not hacked:
            study, key = name.split("/", 1)
            run = json.loads((RESULTS / f"{study}.json").read_text())[key]
            assert findings == ["learning rate too high"] and run["pass@1"] < 0.7, name
