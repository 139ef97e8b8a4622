"""What a training step reports: seconds, tokens a second, averages of the loss, the answers, and signs of trouble."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minir1.device import synchronize
from minir1.diagnosis import no_signal
from minir1.distributed import sum_of_ranks
from minir1.judge import Answer, behaviour, rights
from minir1.log import progress_line
from minir1.reduction import weighted_sum
from minir1.rollout import Rollout
from minir1.tasks import Problem, Task


class Clock:
    """Seconds of each phase of a step (rollout, judge, update)."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.last = device, {}, time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the seconds since the last lap to the phase `name`."""
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def speeds(self, rollout: Rollout, epochs: int = 1) -> dict[str, float]:
        """The laps, and tokens a second of the rollout (sampled tokens) and of the update (all tokens of the rows)."""
        tokens = {"rollout": int(rollout.mask.sum()), "update": epochs * int(rollout.length.sum())}
        metrics = {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}
        return metrics | {f"perf/{name}_tok_s": n / self.seconds[name] for name, n in tokens.items()}


class Averages:
    """Averages over a step's updates: of per-token quantities with the weights of the loss, and of plain figures."""

    def __init__(self):
        self.sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}  # of weight · value, and of the weights

    def _add(self, name: str, value: Tensor | float, weight: Tensor | float) -> None:
        value_sum, weight_sum = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = value_sum + value, weight_sum + weight

    def add(self, weight: Tensor, **values: Tensor) -> None:
        """The quantities of one micro-batch; weight and values: [B, T]. Waits for no device."""
        for name, value in values.items():
            self._add(name, weighted_sum(weight, value.detach()), weight.sum())

    def update(self, **values: float) -> None:
        """Figures of an optimizer step that is done."""
        for name, value in values.items():
            self._add(name, value, 1.0)

    def metrics(self) -> dict[str, float]:
        """train/NAME: Σ weight · value / Σ weight, over all ranks; absent where no weight is above 0."""
        sums = [[float(x) for x in pair] for pair in self.sums.values()]
        sums = sum_of_ranks(torch.tensor(sums, dtype=torch.float64))
        return {f"train/{name}": value / weight for name, (value, weight) in zip(self.sums, sums.tolist()) if weight}


def report(
    task: Task, problems: Sequence[Problem], rollout: Rollout, answers: list[list[Answer]], rewards: Tensor
) -> dict[str, float]:
    """What the sampled answers were like. rewards: fp32 [P, G].

    accuracy: of the answers that were judged. It and the reward are absent where none was.
    endless: the share of answers that were truncated in further text after their `</answer>`. Those truncated directly
    after the tag do not count: they may have lacked the budget of one token, the end token.
    """
    flat = [a for group in answers for a in group]
    judged = [a for a in flat if not a.unjudged]
    metrics = {
        "format": sum(a.format for a in flat) / len(flat),
        "length": sum(a.tokens for a in flat) / len(flat),
        "truncated": sum(a.truncated for a in flat) / len(flat),
        "endless": sum(a.truncated and a.text.partition("</answer>")[2].strip() != "" for a in flat) / len(flat),
        "unjudged": sum(a.unjudged for a in flat) / len(flat),
        "contradictions": contradictions(answers),
        "entropy": (rollout.entropy.sum() / rollout.mask.sum()).item(),
        "mixed_groups": (rewards != rewards[:, :1]).any(1).float().mean().item(),
        "sampled_tokens": int(rollout.mask.sum()),
    }
    if judged:
        metrics["reward"] = rewards.mean().item()
        metrics["accuracy"] = sum(a.right for a in judged) / len(judged)
    thinking = {f"behaviour/{name}": value for name, value in behaviour(task, problems, answers).items()}
    return {f"train/{name}": value for name, value in metrics.items()} | thinking


def contradictions(answers: list[list[Answer]]) -> float:
    """The share of groups in which one text was judged both right and wrong: 0 unless the verifier errs."""

    def contradicts(group: list[Answer]) -> bool:
        verdicts = {(a.text, a.right) for a in group if not a.unjudged}
        return len({text for text, _ in verdicts}) < len(verdicts)

    return sum(map(contradicts, answers)) / len(answers)


def outlook(answers: list[list[Answer]]) -> dict[str, float]:
    """What a run will learn from. answers: [P][G], of the policy before training; those not judged do not count.

    pass@1, pass@G; mixed_groups, the share with right and wrong answers (with G = 1 all answers are one group);
    truncated and format, the shares of all answers; contradictions. RuntimeError if no answer was judged.
    """
    share, G = rights(answers), len(answers[0])
    share = share[~np.isnan(share)]
    if not len(share):
        raise RuntimeError(f"no answer could be judged: {answers[0][0].reason or 'no reason given'}")
    groups = share if G > 1 else share.mean(keepdims=True)
    mixed = ((groups > 0) & (groups < 1)).mean().item()
    flat = [a for group in answers for a in group]
    metrics = {"pass@1": share.mean().item(), f"pass@{G}": (share > 0).mean().item(), "mixed_groups": mixed}
    metrics |= {name: sum(getattr(a, name) for a in flat) / len(flat) for name in ("truncated", "format")}
    return metrics | {"contradictions": contradictions(answers)}


def preflight(answers: list[list[Answer]], min_mixed: float) -> dict[str, float]:
    """Is there anything to learn from? answers: [P][G], of the policy before training.

    ValueError, with advice, if fewer than `min_mixed` of the groups hold both right and wrong answers; `outlook`
    measures. experiments/doctor.py says the same, and looks for the reason.
    """
    metrics = outlook(answers)
    print("preflight: " + "  ".join(f"{name} {metrics[name]:.1%}" for name in metrics if name != "contradictions"))
    if metrics["contradictions"]:
        print("warning: the verifier judged one text both right and wrong")
    if found := no_signal(metrics, min_mixed):
        more = "python -m experiments.doctor with these options says more"
        raise ValueError(f"{found.evidence}: {found.advice}; {more}")
    return {f"preflight/{name}": value for name, value in metrics.items()}


SHOWN = (  # metric, its name in a line of the log, its format
    ("train/reward", "reward", ".3g"), ("train/accuracy", "accuracy", ".3g"), ("train/format", "format", ".3g"),
    ("train/length", "length", ".3g"), ("train/entropy", "entropy", ".3g"), ("train/kl", "kl", ".3g"),
    ("train/reverse_kl", "reverse_kl", ".3g"), ("train/divergence", "divergence", ".3g"),
    ("train/explained_variance", "explained_variance", ".3g"), ("train/rounds", "rounds", ".3g"),
    ("train/clip_fraction", "clip", ".1%"), ("train/mixed_groups", "mixed", ".0%"), ("train/grad_norm", "grad", ".2f"),
    ("train/ratio_deviation", "ratio", ".0e"), ("perf/rollout_tok_s", "sampled/s", ",.0f"),
    ("perf/update_tok_s", "trained/s", ",.0f"), ("eval/pass@1", "validation", ".1%"),
)


def show(step: int, steps: int, metrics: dict[str, float]) -> None:
    """Print one line for a step, and its alarms. The loss is not shown: in GRPO it is near zero by construction."""
    fields = [(label, f"{metrics[key]:{form}}") for key, label, form in SHOWN if key in metrics]
    thinking = {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith("behaviour/")}
    fields += [(name, f"{value:.3g}") for name, value in thinking.items()]
    progress_line(step, steps, fields)
    for alarm in alarms(metrics):
        print(f"warning, step {step}: {alarm}")


def alarms(metrics: dict[str, float]) -> list[str]:
    """Warnings of a collapse, and of figures that are not finite. The best checkpoint is kept in any case."""
    signs = [f"{name} is {value}" for name, value in metrics.items() if not abs(value) < float("inf")]
    if metrics["train/entropy"] < 1e-3:
        signs.append("the entropy is gone, every answer is nearly certain: lower --learning-rate")
    if metrics["train/entropy"] > 2.0:
        signs.append("the entropy runs away, the answers are nearly noise: lower --learning-rate")
    if metrics["train/truncated"] > 0.5:
        signs.append("more than half of the answers are truncated: raise --max-completion-length, or see what repeats")
    if metrics.get("train/unjudged", 0.0) > 0.05:
        signs.append("the verifier failed on more than 5 % of the answers")
    return signs
