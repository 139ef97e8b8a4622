"""Is an estimator biased, in which direction, and how noisy is it? Computed from all answers, without sampling.

    python -m experiments.studies.estimators

Two problems; three tokens, one of them the end, at most two steps: seven answers to each. The policy is a table of
logits. A batch is four answers to each problem; a problem has 7^4 such draws. The library's own advantage, loss and
weight (estimators_catalogue.py) give the gradient g of every draw, and the probabilities of the draws give exactly

    scale       E g · ∇J / |∇J|²                   the factor on ∇J along its own direction
    direction   |E g - scale ∇J| / (scale |∇J|)    the part orthogonal to ∇J, relative to it
    bias        |E g - ∇J| / |∇J|                  both together
    deviation   √(N tr Cov g) / |E g|              noise to signal of one answer; a batch of N has 1/√N of it

The same is computed for KL terms against ∇KL(π‖π_ref), and for a policy that has moved since it sampled, in float64.
tests/test_enumeration.py checks the claims of this file to 1e-12.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from experiments.studies import estimators_catalogue as catalogue
from experiments.studies import estimators_distill as distill
from experiments.studies import estimators_figures as figures
from experiments.studies.estimators_catalogue import KL, MOVED, ON_POLICY, Estimator, Problem, everything, problems
from minir1 import cli
from minir1 import enumeration as exact
from minir1.advantages import leave_one_out
from minir1.files import plain, write_json
from minir1.log import markdown_table, table
from minir1.losses import is_clipped
from minir1.settings import new_file


@dataclass(frozen=True)
class Config:
    """Where the results go."""

    results: Path = Path("docs/results/estimators.json")
    figure: Path = Path("docs/results/estimators.png")

    def __post_init__(self):
        new_file(self, "results", "figure")


SIZES, CHANCES = (4, 8, 16, 64), (0.01, 0.05, 0.2, 0.5)

# ---- moments of the estimators ----------------------------------------------------------------


def against(truth: Tensor, mean: Tensor, variance: float, answers: int) -> dict[str, float]:
    """The quantities of the module's docstring, and the cosine of E g and ∇J."""
    scale = (mean @ truth / (truth @ truth)).item()
    none = mean.norm() < 1e-9 * truth.norm()  # a zero gradient has no direction
    return {
        "scale": 0.0 if none else scale,
        "cosine": math.nan if none else torch.nn.functional.cosine_similarity(mean, truth, dim=0).item(),
        "direction": math.nan if none else ((mean - scale * truth).norm() / (abs(scale) * truth.norm())).item(),
        "bias": ((mean - truth).norm() / truth.norm()).item(),
        "deviation": math.nan if none else math.sqrt(answers * variance) / mean.norm().item(),
        "noise": math.sqrt(answers * variance) / truth.norm().item(),  # relative to |∇J|
    }


def measure(estimator: Estimator, pair: list[Problem], truth: Tensor) -> dict[str, float]:
    """One estimator over batches of G answers to each problem. The problems share no logits: variances add up."""
    P = len(pair)
    if estimator.whole_batch:
        means, variances = zip(*(over_batches(estimator, *both) for both in (pair, pair[::-1])))
        return against(truth, torch.cat(means), sum(variances), P * catalogue.G)
    means, variances = zip(*(problem.moments(estimator.loss) for problem in pair))
    return against(truth, torch.cat(means) / P, sum(variances) / P**2, P * catalogue.G)


def over_batches(estimator: Estimator, problem: Problem, other: Problem) -> tuple[Tensor, float]:
    """Moments of one problem's part of g, over its own draws combined with those of the other problem."""
    answers = everything()
    own, beside = (exact.probability_of(x.sampler, answers.drawn) for x in (problem, other))
    chance = torch.zeros(len(answers.other), dtype=torch.float64).index_add(0, answers.other_of, beside)  # of each kind
    losses = (partial(estimator.loss, problem, other=rows) for rows in answers.other)
    estimates = torch.cat([exact.estimates(loss, problem.logp, problem.scores, answers.drawn) for loss in losses])
    return exact.moments(estimates, torch.outer(chance, own).flatten())


def reward_of(problem: Problem) -> Tensor:
    """J of one problem, the probability that it is solved."""
    return exact.expected_reward(problem.logp, everything().rewards)


def ascent(pair: list[Problem]) -> Tensor:
    """∇J, J the mean over the problems."""
    return torch.cat([problem.gradient(reward_of(problem)) for problem in pair]) / len(pair)


def clipped_share(pair: list[Problem]) -> float:
    """The expected share of tokens that the clip of `MOVED` removes."""
    answers, A, shares = everything(), catalogue.of_rewards(leave_one_out), []
    for problem in pair:
        logp, sampled = problem.logp[answers.rows], problem.sampler[answers.rows]
        clipped = is_clipped(logp, sampled, A, **catalogue.CLIP) & answers.row_mask
        p = exact.probability_of(problem.sampler, answers.drawn)
        count = [(p @ x.view(len(p), -1).sum(1).double()).item() for x in (clipped, answers.row_mask)]
        shares.append(count[0] / count[1])
    return sum(shares) / len(shares)


def deviation_weight(p: float, size: int) -> float:
    """w(p), the factor of std on the gradient of a problem solved with probability p, in groups of G = `size`.

    w(p) = (G-1)/G Σ_{k=1}^{G-1} C(G-2, k-1) p^{k-1} (1-p)^{G-k-1} / σ_k,  σ_k² = k (G-k) / (G (G-1)), where σ_k is the
    sample deviation of k right answers of G. For large G it tends to 1/√(p(1-p)).
    """
    terms = (
        math.comb(size - 2, k - 1) * p ** (k - 1) * (1 - p) ** (size - k - 1) / math.sqrt(k * (size - k))
        for k in range(1, size)
    )
    return (size - 1) / size * math.sqrt(size * (size - 1)) * sum(terms)


def reweighting(pair: list[Problem]) -> dict[str, float]:
    """w(p) by the formula, and p and w of the two problems."""
    result = {f"G={size}/{p}": deviation_weight(p, size) for size in SIZES for p in CHANCES}
    for name, problem in zip(("hard", "even"), pair):
        truth = problem.gradient(reward_of(problem))
        result[f"{name}/p"] = reward_of(problem).item()
        result[f"{name}/w"] = (problem.moments(ON_POLICY["std"].loss)[0] @ truth / (truth @ truth)).item()
    return result


def kl_terms(pair: list[Problem]) -> dict[str, dict[str, float]]:
    """Every KL term against ∇KL(π‖π_ref), and its distance from the gradients of the KL of each step."""
    mask, whole, forward, reverse = everything().mask, [], [], []
    for problem in pair:
        p, ref_lp = problem.logp.detach().sum(1).exp(), problem.ref_lp.detach()
        whole.append(-problem.gradient(exact.sequence_kl(problem.logp, problem.ref_logp.detach())))
        forward.append(-problem.gradient(p @ exact.step_kl(problem.lp, ref_lp, mask).sum(1)))
        reverse.append(-problem.gradient(p @ exact.step_kl(ref_lp, problem.lp, mask).sum(1)))
    whole, forward, reverse = (torch.cat(x) / len(pair) for x in (whole, forward, reverse))
    result = {}
    for name, estimator in KL.items():
        result[name] = measure(estimator, pair, whole)
        for key, target in (("to_steps", forward), ("to_reverse_steps", reverse)):
            result[name][key] = measure(estimator, pair, target)["bias"]
    return result


def run(steps: tuple[float, ...] = (0.1, 0.3)) -> dict[str, dict]:
    """All results, as written to docs/results/estimators.json: part -> estimator -> quantity."""
    pair = problems()
    truth, mask = ascent(pair), everything().mask
    result = {"on_policy": {name: measure(one, pair, truth) for name, one in ON_POLICY.items()}}
    result |= {"problems": reweighting(pair), "kl": kl_terms(pair), "distillation": distill.run(pair)}
    for step in steps:
        away = problems(step)
        ratio = max((p.logp - p.sampler).detach()[mask].abs().max().exp().item() for p in away)
        result[f"moved_{step:g}"] = {name: measure(one, away, ascent(away)) for name, one in MOVED.items()}
        result[f"moved_{step:g}"]["setting"] = {"clipped": clipped_share(away), "largest_ratio": ratio}
    return plain(result)


# ---- tables ------------------------------------------------------------------------------------


def share(x: float | None) -> str:
    return "-" if x is None else "0" if x < 1e-9 else f"{x:.1%}"


def number(x: float | None, digits: int = 2) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


ON_COLUMNS = ["", "expectation", "scale", "cosine", "bias of direction", "bias", "deviation"]
KL_COLUMNS = ["", "expectation", "bias to ∇KL(π‖π_ref)", "to Σ_t ∇KL_t(π‖π_ref)", "to Σ_t ∇KL_t(π_ref‖π)", "noise"]
MOVED_COLUMNS = ["", "remaining bias", "bias, small step", "deviation", "bias, large step", "deviation"]


def on_rows(results: dict) -> list[list[str]]:
    """A row per estimator of ∇J on policy, columns as in ON_COLUMNS."""
    lines = []
    for name, one in ON_POLICY.items():
        f = results["on_policy"][name]
        numbers = [number(f["scale"], 3), number(f["cosine"], 4), share(f["direction"]), share(f["bias"])]
        lines.append([one.label, one.claim, *numbers, number(f["deviation"])])
    return lines


def kl_rows(results: dict) -> list[list[str]]:
    """A row per KL term, columns as in KL_COLUMNS."""
    lines = []
    for name, one in KL.items():
        f = results["kl"][name]
        biases = [share(f[key]) for key in ("bias", "to_steps", "to_reverse_steps")]
        lines.append([one.label, one.claim, *biases, number(f["noise"])])
    return lines


def moved_rows(results: dict) -> list[list[str]]:
    """A row per estimator of ∇J after the policy has moved, columns as in MOVED_COLUMNS."""
    parts, lines = [part for name, part in results.items() if name.startswith("moved_")], []
    for name, one in MOVED.items():
        numbers = [(share(part[name]["bias"]), number(part[name]["deviation"])) for part in parts]
        lines.append([one.label, one.claim, *(cell for pair in numbers for cell in pair)])
    return lines


# ---- the blocks of docs/estimators.md ----------------------------------------------------------


def page(results: dict) -> str:
    return markdown_table(ON_COLUMNS, on_rows(results), words=2)


def page_kl(results: dict) -> str:
    return markdown_table(KL_COLUMNS, kl_rows(results), words=2)


def page_distill(results: dict) -> str:
    return markdown_table(distill.COLUMNS, distill.rows(results["distillation"]), words=2)


def page_moved(results: dict) -> str:
    parts = [part["setting"] for name, part in results.items() if name.startswith("moved_")]
    small, large = (f"ratios up to {s['largest_ratio']:.2f}, {s['clipped']:.1%} of tokens clipped" for s in parts)
    lines = markdown_table(MOVED_COLUMNS, moved_rows(results), words=2)
    return f"{lines}\n\nSmall step: {small}; large step: {large}."


def page_problems(results: dict) -> str:
    f = results["problems"]
    rows = [[f"G = {size}", *(number(f[f"G={size}/{p}"]) for p in CHANCES)] for size in SIZES]
    text = f"The two problems have p = {f['hard/p']:.3f} and {f['even/p']:.3f}, "
    text += f"so w = {f['hard/w']:.3f} and {f['even/w']:.3f} at G = {catalogue.G}."
    return markdown_table(["w(p)", *(f"p = {p}" for p in CHANCES)], rows) + "\n\n" + text


def main(config: Config) -> dict[str, dict]:
    """Enumerate, write, draw, print."""
    results = run()
    write_json(config.results, results)
    gradients = {one.label: results["on_policy"][name] for name, one in ON_POLICY.items()}
    figures.estimators(gradients, {one.label: results["kl"][name] for name, one in KL.items()}, config.figure)
    table("Estimators of ∇J, on policy", ON_COLUMNS, on_rows(results))
    table("KL terms", KL_COLUMNS, kl_rows(results))
    table("After the policy has moved", MOVED_COLUMNS, moved_rows(results))
    table("Distillation", distill.COLUMNS, distill.rows(results["distillation"]))
    return results


if __name__ == "__main__":
    cli.run(main, Config)
