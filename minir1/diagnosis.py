"""What is wrong with a run: named findings from its metrics, each by one rule that says why it holds.

    for finding in diagnose(read_metrics(folder), read_json(folder / "config.json")):
        print(finding.name, finding.evidence, finding.advice)

A rule takes the rows of metrics.jsonl and the config of the run. It returns the values that speak for it, or None, also
where the run did not log what it needs. Identities come first: they hold in every healthy run. Rules about the course
of a run compare its quarters, and a difference counts only above three standard errors, or above luck where the best of
many steps is one side of it. docs/gallery.md shows a broken set-up for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Rows, Config = Sequence[Mapping[str, float]], Mapping[str, object]
FALL = 0.1  # of the accuracy, from its best to the last quarter, that counts as a collapse
SURPLUS = 16  # times what right answers need; at a usual learning rate hardly a run gets there (docs/gallery.md)


class Finding(NamedTuple):
    """One thing that is wrong with a run."""

    name: str
    evidence: str  # the metrics and their values
    advice: str


class Quarters(NamedTuple):
    """A metric in the four quarters of a run."""

    mean: np.ndarray  # [4]
    error: np.ndarray  # [4], standard error of the mean, from the scatter of the steps
    step: float  # deviation of one step, in the median quarter


def values(rows: Rows, key: str) -> np.ndarray:
    """What the training steps logged under a key, float64."""
    return np.array([row[key] for row in rows if row["step"] > 0 and row.get(key) is not None], dtype=np.float64)


def quarters(rows: Rows, key: str) -> Quarters | None:
    """None for fewer than eight values: a quarter needs two to have a scatter.

    Few steps may agree by chance: no quarter's error is below that which the scatter of the median quarter gives it,
    and with f = 4 (n - 1) degrees of freedom of the four it is f / (f - 2) times as large, about Student's t.
    """
    parts = np.array_split(values(rows, key), 4)
    if len(parts[-1]) < 2:
        return None
    deviation = np.array([p.std(ddof=1) for p in parts])
    step, freedom = float(np.median(deviation)), 4 * (len(parts[-1]) - 1)
    error = np.maximum(deviation, step) / [len(p) ** 0.5 for p in parts] * freedom / (freedom - 2)
    return Quarters(np.array([p.mean() for p in parts]), error, step)


def start(rows: Rows, key: str) -> float | None:
    """What was measured before training, in the row of step 0."""
    return next((row[key] for row in rows if row["step"] == 0 and row.get(key) is not None), None)


def fall(quarter: Quarters, before: float | None = None) -> float:
    """How far the last quarter is below the best one, or below the value `before` training; 0 within three standard
    errors of the difference. What was measured before has the error of one step: it is of about as many answers."""
    best = int(quarter.mean.argmax())
    falls = [(quarter.mean[best] - quarter.mean[-1], math.hypot(quarter.error[best], quarter.error[-1]))]
    if before is not None:
        falls.append((before - quarter.mean[-1], math.hypot(quarter.step, quarter.error[-1])))
    return max(float(gap) if gap > 3 * error else 0.0 for gap, error in falls)


def accuracy_key(config: Config) -> str:
    """The accuracy whose course says something: with a difficulty window problems get harder as the policy gets better,
    and only those of the validation stay the same."""
    return "eval/pass@1" if config.get("difficulty_window") else "train/accuracy"


def lost(rows: Rows, accuracy: Quarters, config: Config) -> float:
    """`fall` of the accuracy, also from pass@1 before training."""
    return fall(accuracy, start(rows, "eval/pass@1" if config.get("difficulty_window") else "preflight/pass@1"))


def fall_from_best_steps(accuracy: np.ndarray, prompts: int | None) -> float:
    """How far the last quarter is below the best steps in a row: three, or a twelfth of a long run. 0 within luck.

    Of m means of w steps the best is about √(2 ln m) standard errors up by luck. A step's variance is that of P draws,
    p(1-p)/P, if a problem's answers are all right or all wrong, and p(1-p)/(PG) if problems are alike; half of the
    first is assumed. The scatter of the steps would not do: a policy that collapses and comes back has a large one.
    """
    steps = len(accuracy)
    width, last = max(3, steps // 12), np.array_split(accuracy, 4)[-1]
    best = np.convolve(accuracy, np.full(width, 1 / width), "valid").max()
    p = float(np.clip((best + last.mean()) / 2, 0, 1))
    error = math.sqrt(p * (1 - p) / (2 * prompts) * (1 / width + 1 / len(last))) if prompts else 0.0
    gap = float(best - last.mean())
    return gap if gap > math.sqrt(2 * math.log(steps / width)) * error else 0.0


def rise(reward: Quarters, accuracy: Quarters) -> float:
    """How far the reward rose from the quarter of the best accuracy to the last; 0 within three standard errors."""
    best = int(accuracy.mean.argmax())
    gap = reward.mean[-1] - reward.mean[best]
    return float(gap) if gap > 3 * math.hypot(reward.error[best], reward.error[-1]) else 0.0


def drift(rows: Rows) -> tuple[float, float] | None:
    """KL(π‖π_ref) per answer in the last quarter, in nats, and what right answers need, -log pass@1 of the start.

    The policy closest to the base among those that are always right is the base given a right answer, and its KL is
    -log p for a problem that the base solves with probability p. Medians: k3 has rare, huge values.
    """
    kl, length, before = values(rows, "train/kl"), values(rows, "train/length"), start(rows, "preflight/pass@1")
    if len(kl) < 8 or len(kl) != len(length) or not before:
        return None
    last = len(kl) // 4
    return float(np.median(kl[-last:] * length[-last:])), -math.log(before)


def surplus(moved: tuple[float, float]) -> float:
    """The drift over what right answers need, or over one nat if they need less."""
    return moved[0] / max(1.0, moved[1])


def far(moved: tuple[float, float] | None) -> bool:
    """Whether the drift is SURPLUS times what right answers need."""
    return moved is not None and surplus(moved) > SURPLUS


# ---- identities --------------------------------------------------------------------------------


def group_of_one(rows: Rows, config: Config) -> str | None:
    """One answer per problem, some right and others wrong, and no gradient but that of the KL term, which has the
    factor β (a norm above 0.01 is never accused): no answer is compared with another.

    Never with returns discounted by γ or with a teacher: these have another baseline, and a small gradient may be
    theirs (of an answer in a long budget; of PPO while the critic alone learns)."""
    accuracy, norms = values(rows, "train/accuracy"), values(rows, "train/grad_norm")
    if config.get("num_generations") != 1 or "gamma" in config or "teacher" in config:
        return None
    if not len(accuracy) or not len(norms) or not 0.05 < accuracy.mean() < 0.95:
        return None
    norm, bound = float(np.median(norms)), min(config.get("beta") or 0.0, 0.01) + 1e-6
    if not norm <= bound:
        return None
    return f"num_generations = 1; train/grad_norm is {norm:.0e} at an accuracy of {accuracy.mean():.0%}"


def truncated_sampling(rows: Rows, config: Config) -> str | None:
    """No ratio is above 1. Of samples x ~ q, E[π(x) / q(x)] is the mass of π where q > 0: 1 for any q that reaches all
    tokens, at whatever temperature, less if top-p or top-k removed some. Rounding errs in both directions."""
    deviation, mean = values(rows, "train/ratio_deviation"), values(rows, "train/ratio")
    if not len(deviation) or len(deviation) != len(mean) or deviation.mean() < 1e-3:
        return None
    if 1 - mean.mean() < 0.9 * deviation.mean():
        return None
    below = f"train/ratio is {mean.mean():.3f} before the first update, below 1 by as much as train/ratio_deviation"
    return f"{below}, {deviation.mean():.3f}"


def verifier_errs(rows: Rows, config: Config) -> str | None:
    """The same text was judged right and wrong. A verifier is a pure function: once is proof.

    Before a run: of the references, right by definition, some are refused. Where all are, they have another form.
    """
    groups, accepted = values(rows, "train/contradictions"), start(rows, "preflight/references")
    if len(groups) and groups.max() > 0:
        return f"in {groups.mean():.0%} of the groups one text was judged both right and wrong (train/contradictions)"
    if start(rows, "preflight/contradictions"):
        return "preflight/contradictions: one text was judged both right and wrong"
    if accepted is not None and 0 < accepted < 0.9:
        return f"the verifier accepts {accepted:.0%} of the references (preflight/references)"
    return None


def wrong_template(rows: Rows, config: Config) -> str | None:
    """With another template the share of well-formed answers is higher by more than a half; or, where this was not
    measured, hardly an answer was well formed or right from beginning to end, though most ended within the budget."""
    prefix = "preflight/format_"
    formats = {key: value for key, value in next(iter(rows), {}).items() if key.startswith(prefix)}
    own = start(rows, "preflight/format")
    if formats and own is not None:
        best = max(formats, key=formats.get)
        if formats[best] > own + 0.5:
            other = f"with --template {best.removeprefix(prefix)} {formats[best]:.0%}"
            return f"well formed are {own:.0%} of the answers, {other}"
        return None
    seen = [quarters(rows, f"train/{name}") for name in ("format", "accuracy", "truncated")]
    if None in seen or max(seen[0].mean) > 0.05 or max(seen[1].mean) > 0.05 or max(seen[2].mean) > 0.5:
        return None
    return f"train/format is at most {max(seen[0].mean):.0%} in every quarter of the run"


def end_token_not_trained(rows: Rows, config: Config) -> str | None:
    """A quarter of all answers, and half of the truncated ones, continue with further text after their `</answer>`
    until the budget ends: it is not the budget that is short, which ends an answer before the tag or directly after it.
    In the last quarter of the run too: an end that is trained is soon learned."""
    truncated, endless = values(rows, "train/truncated"), values(rows, "train/endless")
    if not len(truncated) or not len(endless) or endless.mean() < max(0.25, 0.5 * truncated.mean()):
        return None
    if endless[-max(1, len(endless) // 4) :].mean() < 0.25:
        return None
    share = f"{truncated.mean():.0%} of the answers are truncated"
    return f"{share}, {endless.mean():.0%} after their answer (train/endless)"


def router_collapse(rows: Rows, config: Config) -> str | None:
    """Half of the experts of a layer, or more, get less than a tenth of an even share: the layer is a smaller one."""
    idle = values(rows, "train/idle_experts")
    last = idle[-max(1, len(idle) // 4) :]
    if not len(idle) or last.mean() < 0.5:
        return None
    return f"{last.mean():.0%} of the experts of a layer are idle in the last quarter (train/idle_experts)"


# ---- the course of the run ---------------------------------------------------------------------


def learning_rate_too_high(rows: Rows, config: Config) -> str | None:
    """The accuracy fell by a tenth, from its best steps in a row or pass@1 before training, to the last quarter; the
    reward did not rise, and the steps were long: one update took a fifth of the tokens out of the clip's interval, or
    the policy is far further from the reference than right answers need. Steps in a row, since a collapse within a
    quarter leaves no trace in the mean of that quarter."""
    key, reward, moved = accuracy_key(config), quarters(rows, "train/reward"), drift(rows)
    accuracy = quarters(rows, key)
    if accuracy is None or reward is None:
        return None
    fallen = max(fall_from_best_steps(values(rows, key), config.get("prompts")), lost(rows, accuracy, config))
    if fallen < FALL or (lost(rows, accuracy, config) and rise(reward, accuracy)):
        return None
    share = values(rows, "train/clip_fraction").max(initial=0.0)
    if share < 0.2 and not far(moved):
        return None
    text = f"{key} fell by {fallen:.0%}; train/clip_fraction reached {share:.0%}"
    return text + (f"; {moved[0]:.0f} nats per answer from the reference" if far(moved) else "")


def no_kl(rows: Rows, config: Config) -> str | None:
    """β = 0, and the policy is far further from the base than right answers need."""
    moved = drift(rows)
    if config.get("beta") != 0 or not far(moved):
        return None
    return f"beta = 0; {moved[0]:.0f} nats per answer from the base, and right answers need {moved[1]:.1f} (train/kl)"


def reward_hacked(rows: Rows, config: Config) -> str | None:
    """The reward rose while the accuracy of the same answers fell. A learned reward is train/proxy, and train/gold the
    accuracy beside it."""
    proxy = quarters(rows, "train/proxy") or quarters(rows, "train/reward")
    accuracy = quarters(rows, "train/gold") or quarters(rows, accuracy_key(config))
    if proxy is None or accuracy is None:
        return None
    fallen, risen = lost(rows, accuracy, config), rise(proxy, accuracy)
    if fallen < FALL or not risen:
        return None
    return f"the reward rose by {risen:.2g} while the accuracy fell by {fallen:.0%}"


def collapse_to_short(rows: Rows, config: Config) -> str | None:
    """Answers lost a quarter of their length, and the accuracy fell with it: they became short at its expense."""
    length, accuracy = quarters(rows, "train/length"), quarters(rows, accuracy_key(config))
    if length is None or accuracy is None:
        return None
    fallen = lost(rows, accuracy, config)
    if fallen < FALL or fall(length) < 0.25 * length.mean.max():
        return None
    spent = f"train/length fell from {length.mean.max():.0f} to {length.mean[-1]:.0f}"
    return f"{spent}, the accuracy by {fallen:.0%}"


def stale_reference(rows: Rows, config: Config) -> str | None:
    """The accuracy has stood still below 0.9 for three quarters of the run, though a third of the groups hold a signal.
    The policy is closer to the reference, which never moved, than right answers need, and it is the KL term that holds
    it there: β·KL of an answer is above a twentieth of its advantage's deviation, which is 1."""
    accuracy, mixed = quarters(rows, accuracy_key(config)), quarters(rows, "train/mixed_groups")
    beta, moved = config.get("beta") or 0.0, drift(rows)
    moves = config.get("reference_reset") or config.get("tau")
    if accuracy is None or mixed is None or moved is None or moves or not beta:
        return None
    later = accuracy.mean[1:]
    if np.ptp(later) > 0.05 or later.max() > 0.9 or mixed.mean[-1] < 1 / 3:
        return None
    if moved[0] > moved[1] or beta * moved[0] < 0.05:
        return None
    text = f"the accuracy stands still at {later.mean():.0%}, {moved[0]:.2f} nats per answer from the reference; right "
    return text + f"answers need {moved[1]:.2f}, and β·KL is {beta * moved[0]:.2f}"


def no_signal(outlook: Mapping[str, float], min_mixed: float) -> Finding | None:
    """Before a run: too few groups hold both right and wrong answers, from which alone a policy learns. It is none of
    RULES, since the scripts refuse such a run. outlook: as `monitor.outlook` returns it."""
    mixed, right = outlook["mixed_groups"], outlook["pass@1"]
    if mixed >= min_mixed:
        return None
    evidence = f"only {mixed:.1%} of the groups hold both right and wrong answers, so there is no signal"
    if right > 0.5:
        advice = f"choose a harder --task (pass@1 is {right:.1%})"
    else:
        advice = f"start from a better base or an easier --task (pass@1 is {right:.1%}), ask with the --template that "
        advice += f"the base knows, raise --max-completion-length ({outlook['truncated']:.1%} are truncated)"
    return Finding("no signal", evidence, f"{advice}, or raise --num-generations or --temperature")


RULES: dict[str, tuple[Callable[[Rows, Config], str | None], str]] = {  # name -> rule, advice
    "group of one": (group_of_one, "--num-generations 8, or a baseline over the batch (reinforce.py)"),
    "truncated sampling": (truncated_sampling, "sample without top-p and top-k in training"),
    "verifier errs": (verifier_errs, "judge one text many times; a verifier that fails must say unjudged, not wrong"),
    "wrong template": (wrong_template, "ask as the checkpoint was trained: compare --template chat, r1_zero and plain"),
    "end token not trained": (end_token_not_trained, "masks come from lengths, not from token ids"),
    "router collapse": (router_collapse, "balance the experts: balance_step after every step, with the right sign"),
    "learning rate too high": (learning_rate_too_high, "a third of the --learning-rate, from the best checkpoint"),
    "no KL": (no_kl, "--beta 0.001 or more, or stop at the best checkpoint"),
    "reward hacked": (reward_hacked, "read the answers with the highest reward; repair the reward, or raise --beta"),
    "collapse to short answers": (collapse_to_short, "a baseline within the group, or --reduction fixed"),
    "stale reference": (stale_reference, "--reference-reset 400 (R1's), or a lower --beta"),
}  # fmt: skip


def diagnose(rows: Rows, config: Config) -> list[Finding]:
    """All findings about a run. rows: of metrics.jsonl, as `log.read_metrics` returns them; config: its config.json."""
    return [
        Finding(name, evidence, advice)
        for name, (rule, advice) in RULES.items()
        if (evidence := rule(rows, config)) is not None
    ]
