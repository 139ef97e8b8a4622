"""The claims of the paper: what one run shows of each, and whether it holds by a stated rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.report_run import Pipeline
from minir1 import tasks
from minir1.answer_file import Saved
from minir1.judge import EASE, Answer, behaviour, majority_vote, rights
from minir1.metrics import paired_bootstrap, with_interval

LEVEL, CONSISTENT = -0.02, 0.98  # level: low end of the difference in accuracy; consistent: mean over the answers


class Claim(NamedTuple):
    """A claim of the paper, and what this run says about it."""

    text: str
    shown: str
    threshold: str
    holds: bool


def right(row: list[Answer]) -> float:
    """The share of right answers among those judged; NaN if there are none."""
    return float(rights([row])[0])


def preference(row: list[Answer]) -> float:
    """The mean of the verifier's scores["preference"]; NaN for answers without."""
    scores = [answer.scores["preference"] for answer in row if "preference" in answer.scores]
    return float(np.mean(scores)) if scores else np.nan


def tokens(row: list[Answer]) -> float:
    """Mean length."""
    return float(np.mean([answer.tokens for answer in row]))


def paired(
    answers: dict[str, Saved], later: str, earlier: str, value: Callable[[list[Answer]], float] = right
) -> tuple[float, float, float] | None:
    """(mean, low, high) of later - earlier, of one value per problem; None where a stage has no answers."""
    if not {later, earlier} <= answers.keys():
        return None
    grids = [answers[name].answers.get("sampled", {}) for name in (later, earlier)]
    both = sorted(grids[0].keys() & grids[1].keys())
    a, b = (np.array([value(grid[p]) for p in both]) for grid in grids)
    known = np.isfinite(a) & np.isfinite(b)
    return paired_bootstrap(a[known], b[known]) if known.any() else None


def points(difference: tuple[float, float, float]) -> str:
    """+1.3 points [-0.4, 3.1]"""
    return "{:+.1f} points [{:.1f}, {:.1f}]".format(*(100 * x for x in difference))


def share(values: dict[str, float], key: str, form: str = ".1%") -> str:
    """A share in percent, or another value in its format, with its interval if there is one."""
    ends = [values.get(f"{key}{end}") for end in ("", "_low", "_high")]
    return f"{ends[0]:{form}}" if None in ends else with_interval(*ends, form)


def claims(run: Pipeline) -> list[Claim]:
    """What can be said of each claim of the paper; those that this run cannot answer are left out."""
    stated: list[Claim | None] = [_gain(run), _thinking(run), _longer(run), _checks(run)]
    tests, zero, final = run.tests, run.tests.get("r1-zero", {}), run.final
    label = run.label(final) if final else ""
    staged = final not in ("", "base", "r1-zero")
    if (own := zero.get("language_consistency")) is not None:
        text, limit = "RL alone leaves languages mixed", f"R1-Zero's language consistency is below {CONSISTENT}"
        stated.append(Claim(text, f"language consistency of R1-Zero {own:.3f}", limit, own < CONSISTENT))
        if (new := tests.get("rl-1", {}).get("language_consistency")) is not None:
            cost = paired(run.answers, "rl-1", "r1-zero")
            shown = f"{own:.3f} → {new:.3f}" + (f"; accuracy {points(cost)}" if cost else "")
            text = "A cold start and a language reward fix the mixing, at a small cost in accuracy"
            limit = f"RL 1's language consistency is at least {CONSISTENT}, its accuracy level (low end at least -2)"
            stated.append(Claim(text, shown, limit, new >= CONSISTENT and bool(cost) and cost[1] >= LEVEL))
    if staged and (level := paired(run.answers, final, "r1-zero")):
        text = f"The final model ({label}) is at least level with R1-Zero in accuracy"
        limit = "low end of the paired difference at least -2 points"
        stated.append(Claim(text, points(level), limit, level[1] >= LEVEL))
    for key, words in (("language_consistency", "language consistency"), ("repetition", "repetition")):
        old, new = zero.get(key), tests[final].get(key) if staged else None
        if old is not None and new is not None:
            limit = f"at least {CONSISTENT}" if key != "repetition" else "at most half of R1-Zero's"
            holds = new >= CONSISTENT if key != "repetition" else new <= old / 2
            text = f"The final model ({label}) is more readable: {words}"
            stated.append(Claim(text, f"{old:.3f} → {new:.3f}", limit, holds))
    return [claim for claim in [*stated, _preferred(run), _majority(run)] if claim]


def distillation(values: dict[str, float]) -> Claim:
    """values: of one seed, as studies/distill_vs_rl.py `figures` returns."""
    gain = tuple(values[f"texts/over_rl{end}"] / 100 for end in ("", "_low", "_high"))
    shown = f"taught {share(values, 'texts/pass@1')}, by RL {share(values, 'rl/pass@1')}: {points(gain)}"
    text = "Answers of the final model teach a small student more than RL on it"
    return Claim(text, shown, "the interval of the paired difference is above 0", gain[1] > 0)


def _gain(run: Pipeline) -> Claim | None:
    if (gain := paired(run.answers, "r1-zero", "base")) is None:
        return None
    means = [run.tests[name].get("pass@1") for name in ("base", "r1-zero")]
    shown = points(gain) if None in means else "{:.1%} → {:.1%}: {}".format(*means, points(gain))
    return Claim("RL with rule rewards alone raises held-out accuracy", shown, "the interval is above 0", gain[1] > 0)


def _thinking(run: Pipeline) -> Claim | None:
    values = run.tests.get("r1-zero", {})
    if not {"pass@1", "pass@1_low", "forced", "forced_high"} <= values.keys():
        return None
    shown = f"R1-Zero {share(values, 'pass@1')}; forced to answer at once {share(values, 'forced')}"
    limit = "the two intervals do not overlap"
    return Claim("The thinking matters", shown, limit, values["pass@1_low"] > values["forced_high"])


def _longer(run: Pipeline) -> Claim | None:
    if (more := paired(run.answers, "r1-zero", "base", tokens)) is None:
        return None
    shown = "{:+.1f} tokens [{:.1f}, {:.1f}]".format(*more) + _by_level(run, "length", ".0f")
    return Claim("Answers grow longer under RL", shown, "the interval is above 0", more[1] > 0)


def _checks(run: Pipeline) -> Claim | None:
    old, new = (run.tests.get(name, {}).get("checks") for name in ("base", "r1-zero"))
    values = [_counted(run, name, "checks") for name in ("base", "r1-zero")]
    both = sorted(values[0].keys() & values[1].keys())
    if old is None or new is None or not both:
        return None
    more = paired_bootstrap(*([one[p] for p in both] for one in reversed(values)))
    shown = f"{old:.2f} → {new:.2f} explicit checks per answer: " + "{:+.2f} [{:.2f}, {:.2f}]".format(*more)
    shown += _by_level(run, "checks", ".2f")
    return Claim("Checking grows under RL", shown, "the interval is above 0", more[1] > 0)


def _tested(run: Pipeline, name: str) -> tuple[tasks.Task, dict[int, tuple[tasks.Problem, list[Answer]]]] | None:
    """The task of a stage's test, and by index each problem with its sampled answers; None without answers.

    Also None where the answers do not say their task and split, or the task is no longer there or has other problems.
    """
    saved = run.answers.get(name)
    if not saved or not {"task", "split"} <= saved.settings.keys():
        return None
    try:
        task = tasks.load(saved.settings["task"], saved.settings.get("data"))
        listed = {(p.prompt, p.reference): p for p in task.problems(saved.settings["split"])}
    except ValueError:
        return None
    sampled = saved.answers.get("sampled", {})
    if any(saved.asked[index] not in listed for index in sampled):
        return None
    return task, {index: (listed[saved.asked[index]], row) for index, row in sampled.items()}


def _counted(run: Pipeline, name: str, key: str) -> dict[int, float]:
    """Index of each problem -> the mean over its answers of what the task counts under `key`."""
    if (tested := _tested(run, name)) is None:
        return {}
    counts = {p: behaviour(tested[0], [problem], [row]) for p, (problem, row) in tested[1].items()}
    return {p: count[key] for p, count in counts.items() if key in count}


def _by_level(run: Pipeline, key: str, form: str) -> str:
    """; easy 11 → 14, hard 30 → 41"""
    values = [(level, [run.tests[name].get(f"{key}_{level}") for name in ("base", "r1-zero")]) for level in EASE]
    changes = [f"{level} {pair[0]:{form}} → {pair[1]:{form}}" for level, pair in values if None not in pair]
    return f"; {', '.join(changes)}" if changes else ""


def _preferred(run: Pipeline) -> Claim | None:
    if (change := paired(run.replies, "rl-2", "sft-2", preference)) is None:
        return None
    values = [run.general[name] for name in ("sft-2", "rl-2")]
    means = [share(one, "preference", ".2f") for one in values if "preference" in one]
    shown = f"preference {' → '.join(means)}: " + "{:+.2f} [{:.2f}, {:.2f}], paired".format(*change)
    model = run.stages.get("reward-model")
    if model and "eval/accuracy" in model.result:
        shown += f"; the reward model agrees with {share(model.result, 'eval/accuracy')} of held-out pairs"
    text = "RL on a learned reward raises what people prefer on general prompts"
    return Claim(text, shown, "the interval of RL 2 minus SFT 2 is above 0", change[1] > 0)


def _majority(run: Pipeline) -> Claim | None:
    values = run.tests.get(run.final, {})
    keys = [key for key in values if key.startswith("maj@") and key[4:].isdigit()]
    if not keys or "pass@1" not in values:
        return None
    best = max(keys, key=lambda key: int(key[4:]))
    if (gain := _gain_of_majority(run, run.final, int(best[4:]))) is None:
        return None
    shown = f"{run.label(run.final)}: {share(values, 'pass@1')} by one answer, {share(values, best)} by {best}"
    text, limit = "The majority of several answers beats one answer", "the interval is above 0"
    return Claim(text, f"{shown}: {points(gain)}", limit, gain[1] > 0)


def _gain_of_majority(run: Pipeline, name: str, k: int) -> tuple[float, float, float] | None:
    """(mean, low, high) of maj@k minus pass@1, paired over the problems with at least k judged answers."""
    if (tested := _tested(run, name)) is None:
        return None
    task, rows = tested
    judged = [(problem, [a for a in row if not a.unjudged]) for problem, row in rows.values()]
    judged = [(problem, row) for problem, row in judged if len(row) >= k]
    votes = [majority_vote(task, problem, row, k) for problem, row in judged]
    return paired_bootstrap(votes, rights([row for _, row in judged])) if judged else None
