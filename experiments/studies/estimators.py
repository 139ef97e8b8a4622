"""Is an estimator biased, in which direction, and how noisy is it? Answered by listing every answer, without sampling.

    python -m experiments.studies.estimators

Two problems; three tokens, one of them the end, at most two steps: seven answers to each. The policy is a table of
logits. A batch is four answers to each problem; a problem has 7^4 such draws. For each estimator the library's own
advantage, loss and weight (estimators_catalogue.py) give the gradient g of every draw; with the probabilities of the
draws follow, exactly,

    scale       E g · ∇J / |∇J|²                   what it multiplies the step by, on the way of ∇J
    direction   |E g - scale ∇J| / (scale |∇J|)    what it adds across that way, 0 for none
    bias        |E g - ∇J| / |∇J|                  both together
    deviation   √(N tr Cov g) / |E g|              noise to signal of one answer; a batch of N has 1/√N of it

The same for KL terms against ∇KL(π‖π_ref), and for a policy that has moved since it sampled. In float64, without
sampling; tests/test_enumeration.py holds what is claimed here to 1e-12.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from experiments.studies import estimators_figures as figures_estimators
from experiments.studies.estimators_catalogue import (
    CLIP,
    DRAWN,
    KL,
    MASK,
    MOVED,
    ON_POLICY,
    OTHER,
    OTHER_OF,
    REWARDS,
    ROW_MASK,
    ROWS,
    Estimator,
    G,
    Problem,
    problems,
    spread,
)
from minir1 import enumeration as exact
from minir1.advantages import leave_one_out
from minir1.files import replace_text
from minir1.log import table
from minir1.losses import is_clipped


@dataclass(frozen=True)
class Config:
    """Where the results go."""

    results: Path = Path("docs/results/estimators.json")
    figure: Path = Path("docs/results/estimators.png")


SIZES, CHANCES = (4, 8, 16, 64), (0.01, 0.05, 0.2, 0.5)

# ---- what they come to ------------------------------------------------------------------------


def against(truth: Tensor, mean: Tensor, variance: float, answers: int) -> dict[str, float]:
    """The figures of the docstring."""
    scale = (mean @ truth / (truth @ truth)).item()
    none = mean.norm() < 1e-9 * truth.norm()  # zero: it has no direction
    return {
        "scale": 0.0 if none else scale,
        "cosine": math.nan if none else torch.nn.functional.cosine_similarity(mean, truth, dim=0).item(),
        "direction": math.nan if none else ((mean - scale * truth).norm() / (abs(scale) * truth.norm())).item(),
        "bias": ((mean - truth).norm() / truth.norm()).item(),
        "deviation": math.nan if none else math.sqrt(answers * variance) / mean.norm().item(),
        "noise": math.sqrt(answers * variance) / truth.norm().item(),  # over |∇J| instead
    }


def measure(estimator: Estimator, pair: list[Problem], truth: Tensor) -> dict[str, float]:
    """One estimator over batches of G answers to each problem. The problems share no logits: variances add up."""
    P = len(pair)
    if estimator.whole_batch:
        means, variances = zip(*(over_batches(estimator, *both) for both in (pair, pair[::-1])))
        return against(truth, torch.cat(means), sum(variances), P * G)
    means, variances = zip(*(problem.moments(estimator.loss(problem)) for problem in pair))
    return against(truth, torch.cat(means) / P, sum(variances) / P**2, P * G)


def over_batches(estimator: Estimator, problem: Problem, other: Problem) -> tuple[Tensor, float]:
    """Moments of one problem's part of g, over its own draws and what the other problem's may be beside them."""
    own, beside = (exact.probability_of(x.sampler, DRAWN) for x in (problem, other))
    chance = torch.zeros(len(OTHER), dtype=torch.float64).index_add(0, OTHER_OF, beside)  # of each kind of company
    losses = (estimator.loss(problem, answers) for answers in OTHER)
    found = torch.cat([exact.estimates(loss, problem.logp, problem.scores, DRAWN) for loss in losses])
    return exact.moments(found, torch.outer(chance, own).flatten())


def ascent(pair: list[Problem]) -> Tensor:
    """∇J, J the mean over the problems."""
    return torch.cat([p.gradient(exact.expected_reward(p.logp, REWARDS)) for p in pair]) / len(pair)


def clipped_share(pair: list[Problem]) -> float:
    """How many of a token's contributions the clip of `MOVED` removes, in expectation."""
    A, share = spread(leave_one_out(REWARDS[DRAWN])), []
    for problem in pair:
        cut = is_clipped(problem.logp[ROWS], problem.sampler[ROWS], A, **CLIP) & ROW_MASK
        p = exact.probability_of(problem.sampler, DRAWN)
        count = [(p @ x.view(len(DRAWN), -1).sum(1).double()).item() for x in (cut, ROW_MASK)]
        share.append(count[0] / count[1])
    return sum(share) / len(share)


def deviation_weight(p: float, size: int) -> float:
    """w(p), by which std multiplies the gradient of a problem solved with probability p, in groups of `size`.

    w(p) = (G-1)/G Σ_{k=1}^{G-1} C(G-2, k-1) p^{k-1} (1-p)^{G-k-1} / σ_k,  σ_k² = k (G-k) / (G (G-1)): k right answers
    of G have the sample deviation σ_k. Towards 1/√(p(1-p)) for large G.
    """
    terms = (
        math.comb(size - 2, k - 1) * p ** (k - 1) * (1 - p) ** (size - k - 1) / math.sqrt(k * (size - k))
        for k in range(1, size)
    )
    return (size - 1) / size * math.sqrt(size * (size - 1)) * sum(terms)


def reweighting(pair: list[Problem]) -> dict[str, float]:
    """p and w(p) of each problem: what the deviation of a group multiplies its gradient by."""
    found = {f"G={size}/{p}": deviation_weight(p, size) for size in SIZES for p in CHANCES}
    for name, problem in zip(("hard", "even"), pair):
        truth = problem.gradient(exact.expected_reward(problem.logp, REWARDS))
        mean = problem.moments(ON_POLICY["std"].loss(problem))[0]
        found[f"{name}/p"] = exact.expected_reward(problem.logp, REWARDS).item()
        found[f"{name}/w"] = (mean @ truth / (truth @ truth)).item()
    return found


def kl_terms(pair: list[Problem]) -> dict[str, dict[str, float]]:
    """Every KL term against ∇KL(π‖π_ref), and how far it is from the gradients of each step's KL."""
    whole, forward, reverse = [], [], []
    for problem in pair:
        p, ref_lp = problem.logp.detach().sum(1).exp(), problem.ref_lp.detach()
        whole.append(-problem.gradient(exact.sequence_kl(problem.logp, problem.ref_logp.detach())))
        forward.append(-problem.gradient(p @ exact.step_kl(problem.lp, ref_lp, MASK).sum(1)))
        reverse.append(-problem.gradient(p @ exact.step_kl(ref_lp, problem.lp, MASK).sum(1)))
    whole, forward, reverse = (torch.cat(x) / len(pair) for x in (whole, forward, reverse))
    found = {}
    for name, estimator in KL.items():
        mean = torch.cat([problem.moments(estimator.loss(problem))[0] for problem in pair]) / len(pair)
        steps = {"to_steps": forward, "to_reverse_steps": reverse}
        found[name] = measure(estimator, pair, whole) | {
            key: ((mean - target).norm() / target.norm()).item() for key, target in steps.items()
        }
    return found


def run(steps: tuple[float, ...] = (0.1, 0.3)) -> dict[str, dict]:
    """Everything, as it is written to docs/results/estimators.json: part -> estimator -> figure."""
    pair = problems()
    truth = ascent(pair)
    found = {"on_policy": {name: measure(one, pair, truth) for name, one in ON_POLICY.items()}}
    found["problems"] = reweighting(pair)
    found["kl"] = kl_terms(pair)
    for step in steps:
        away = problems(step)
        part = {name: measure(one, away, ascent(away)) for name, one in MOVED.items()}
        ratio = max((p.logp - p.sampler).detach()[MASK].abs().max().exp().item() for p in away)
        found[f"moved_{step:g}"] = part | {"setting": {"clipped": clipped_share(away), "largest_ratio": ratio}}
    return json.loads(json.dumps(found).replace("NaN", "null"))


# ---- what is shown ----------------------------------------------------------------------------


def _share(x: float | None) -> str:
    return "-" if x is None else "0" if x < 1e-9 else f"{x:.1%}"


def _number(x: float | None, digits: int = 2) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


ON_COLUMNS = ["", "comes to", "scale", "cosine", "bias of direction", "bias", "deviation"]
KL_COLUMNS = ["", "comes to", "bias to ∇KL(π‖π_ref)", "to Σ_t ∇KL_t(π‖π_ref)", "to Σ_t ∇KL_t(π_ref‖π)", "noise"]
MOVED_COLUMNS = ["", "left over", "bias, small step", "deviation", "bias, large step", "deviation"]


def on_rows(found: dict) -> list[list[str]]:
    """The estimators of ∇J where the policy itself has sampled."""
    rows = []
    for name, one in ON_POLICY.items():
        f = found["on_policy"][name]
        numbers = [_number(f["scale"], 3), _number(f["cosine"], 4), _share(f["direction"]), _share(f["bias"])]
        rows.append([one.label, one.claim, *numbers, _number(f["deviation"])])
    return rows


def kl_rows(found: dict) -> list[list[str]]:
    """The KL terms."""
    return [
        [one.label, one.claim, *(_share(found["kl"][name][key]) for key in ("bias", "to_steps", "to_reverse_steps"))]
        + [_number(found["kl"][name]["noise"])]
        for name, one in KL.items()
    ]


def moved_rows(found: dict) -> list[list[str]]:
    """Away from the policy that sampled."""
    parts = [part for name, part in found.items() if name.startswith("moved_")]
    return [
        [
            one.label,
            one.claim,
            *(f(part[name][k]) for part in parts for k, f in (("bias", _share), ("deviation", _number))),
        ]
        for name, one in MOVED.items()
    ]


def _page(columns: list[str], rows: list[list[str]], words: int = 2) -> str:
    lines = [columns, ["---"] * words + ["---:"] * (len(columns) - words), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def page(found: dict) -> str:
    """docs/estimators.md: the estimators of ∇J."""
    return _page(ON_COLUMNS, on_rows(found))


def page_kl(found: dict) -> str:
    """docs/estimators.md: the KL terms."""
    return _page(KL_COLUMNS, kl_rows(found))


def page_moved(found: dict) -> str:
    """docs/estimators.md: away from the policy that sampled."""
    parts = [part["setting"] for name, part in found.items() if name.startswith("moved_")]
    words = [f"ratios up to {s['largest_ratio']:.2f}, {s['clipped']:.1%} of tokens clipped" for s in parts]
    return _page(MOVED_COLUMNS, moved_rows(found)) + f"\n\nSmall step: {words[0]}; large step: {words[1]}."


def page_problems(found: dict) -> str:
    """docs/estimators.md: w(p), by the formula and of the two problems."""
    f = found["problems"]
    rows = [[f"G = {size}", *(_number(f[f"G={size}/{p}"]) for p in CHANCES)] for size in SIZES]
    return _page(["w(p)", *(f"p = {p}" for p in CHANCES)], rows, words=1) + (
        f"\n\nThe two problems have p = {f['hard/p']:.3f} and {f['even/p']:.3f}, so w = {f['hard/w']:.3f} and "
        f"{f['even/w']:.3f} at G = {G}."
    )


def main(config: Config) -> dict[str, dict]:
    """Enumerate, write, draw, print."""
    found = run()
    config.results.parent.mkdir(parents=True, exist_ok=True)
    replace_text(config.results, json.dumps(found, indent=1) + "\n")
    labels = {"on_policy": ON_POLICY, "kl": KL}
    named = {part: {one.label: found[part][name] for name, one in group.items()} for part, group in labels.items()}
    figures_estimators.estimators(named["on_policy"], named["kl"], config.figure)
    table("Estimators of ∇J, on policy", ON_COLUMNS, on_rows(found))
    table("KL terms", KL_COLUMNS, kl_rows(found))
    table("Away from the policy that sampled", MOVED_COLUMNS, moved_rows(found))
    return found


if __name__ == "__main__":
    main(tyro.cli(Config))
