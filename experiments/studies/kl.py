"""What does the KL term do to accuracy and drift: none, in the loss, in the reward, with a reference that is reset?

    python -m experiments.studies.kl --checkpoint runs/base/checkpoint --jobs 2

    none      GRPO with β = 0
    weak      β = 0.001, k3 in the loss, as R1-Zero has it
    loss      β = 0.05, k3 in the loss: the gradient of each step's KL(π_ref‖π), and nothing of later steps
    reset     as loss, and every fourth step the policy becomes the reference
    plain     REINFORCE with β = 0
    reward    β = 0.05, k1 in the reward, r_t - β·(log π - log π_ref): the gradient of the whole answer's KL(π‖π_ref)

GRPO has the term in the loss, REINFORCE in the reward, so each is compared with its own algorithm without the term.
experiments/studies/estimators.py enumerates the gradient of each estimator.
"""

from __future__ import annotations

from pathlib import Path

from experiments.studies import comparison_tables as tables
from experiments.studies.comparison import Config, Method
from experiments.studies.comparison_figures import draw_settings
from minir1 import cli

METHODS = {
    "none": Method("no KL (GRPO)", "r1_zero", {"beta": 0.0}),
    "weak": Method("k3 in loss 0.001", "r1_zero", {"beta": 0.001}),
    "loss": Method("k3 in loss 0.05", "r1_zero", {"beta": 0.05}),
    "reset": Method("k3 0.05 with reset", "r1_zero", {"beta": 0.05, "reference-reset": 4}),
    "plain": Method("no KL (REINFORCE)", "reinforce", {"beta": 0.0}),
    "reward": Method("k1 in reward 0.05", "reinforce", {"beta": 0.05}),
}
PANELS = {"accuracy": ("Training problems", "share")}
DEFAULT = Config(out=Path("runs/kl"), results=Path("docs/results/kl.json"), figure=Path("docs/results/kl.png"))


def page(results: tables.Results) -> str:
    """The block of docs/algorithms.md."""
    own = {name: METHODS[name] for name in ("plain", "reward")}
    drift = [f" {label} {mean} {ends}" for label, mean, ends, _ in tables.paired(results, own, "plain", "drift")]
    note = tables.verdict(results, own, "plain") + "".join(f" Difference of drift, in nats:{text}." for text in drift)
    return tables.page(results, METHODS, "none", DEFAULT, "studies.kl", note=note, also="drift")


def main(config: Config) -> None:
    """Run what is missing, draw, print. SystemExit if a cell fails."""
    draw = lambda config: draw_settings(config, METHODS, PANELS, dots=("Drift from the base", "nats", "drift"))
    tables.compare(config, METHODS, "none", "KL", draw)


if __name__ == "__main__":
    cli.run(main, Config, default=DEFAULT)
