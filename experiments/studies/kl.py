"""What does the KL term do to accuracy and drift: none, in the loss, in the reward, against a reference that moves?

    python -m experiments.studies.kl --checkpoint runs/base/checkpoint --jobs 2

    none      GRPO with β = 0
    weak      β = 0.001, k3 in the loss, as R1-Zero has it
    loss      β = 0.05, k3 in the loss: the gradient of each step's KL(π_ref‖π), and nothing of later steps
    refresh   as loss, the policy becoming the reference every fourth step
    plain     REINFORCE with β = 0
    reward    β = 0.05, k1 in the reward, r_t - β·(log π - log π_ref): the gradient of the whole answer's KL(π‖π_ref)

What the estimators claim is enumerated by experiments/studies/estimators.py. The term stands in the loss of GRPO and
in the reward of REINFORCE, so each is held against its own algorithm without it.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from experiments.studies import algorithms_figures as figures_algorithms
from experiments.studies import comparison_tables as tables
from experiments.studies.comparison import START, Config, Method, cells_of, complete, end, load

METHODS = {
    "none": Method("no KL (GRPO)", "r1_zero", {"kl": 0.0}),
    "weak": Method("k3 in loss 0.001", "r1_zero", {"kl": 0.001}),
    "loss": Method("k3 in loss 0.05", "r1_zero", {"kl": 0.05}),
    "refresh": Method("k3 0.05 refreshed", "r1_zero", {"kl": 0.05, "refresh": 4}),
    "plain": Method("no KL (REINFORCE)", "reinforce", {"kl": 0.0}),
    "reward": Method("k1 in reward 0.05", "reinforce", {"kl": 0.05}),
}
PANELS = {"accuracy": ("Training problems", "share")}
DEFAULT = Config(out=Path("runs/kl"), results=Path("docs/results/kl.json"), figure=Path("docs/results/kl.png"))


def page(found: tables.Found) -> str:
    """What docs/algorithms.md says of it."""
    own = {name: METHODS[name] for name in ("plain", "reward")}
    drift = [f" {label} {mean} {ends}" for label, mean, ends, _ in tables.paired(found, own, "plain", "drift")]
    note = tables.verdict(found, own, "plain") + "".join(f" Of its drift, in nats:{text}." for text in drift)
    return tables.page(found, METHODS, "none", DEFAULT, "studies.kl", note=note, also="drift")


def draw(config: Config) -> None:
    """The figure of what is done so far."""
    found = load(config.results)
    drawn = tables.parts(found, METHODS)
    if drawn["ends"] and START in found:
        drift = {METHODS[name].label: [r["drift"] for r in tables.of(found, name).values()] for name in METHODS}
        dots = ("Drift from the base", "nats", drift)
        figures_algorithms.settings(tables.start(found), **drawn, path=config.figure, panels=PANELS, dots=dots)


def main(config: Config) -> None:
    """Run what is missing, draw, print. SystemExit if a cell fails."""
    failed = []
    for cell, failure in complete(cells_of(METHODS, config), config):
        failed += [cell.name] if failure else []
        draw(config)
    tables.show(f"KL, {config.steps} steps, test split", load(config.results), METHODS, "none")
    end(failed, config)


if __name__ == "__main__":
    main(tyro.cli(Config, default=DEFAULT))
