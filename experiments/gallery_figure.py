"""The figures of experiments/gallery.py: the metric that tells a broken set-up from a healthy one, and the accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from minir1.diagnosis import SURPLUS
from minir1.figures import BLUE, GREY, MUTED, RED, STYLE, caption, percent, tall_headline, wide_figure, write
from minir1.files import plain, replace_text


class Telltale(NamedTuple):
    """What a figure shows beside the accuracy."""

    curve: str  # a key of `curves`
    label: str
    beyond: float | None  # the value beyond which a rule accuses; that of drift depends on the base
    healthy: str = "as in the scripts"  # the healthy set-up it is compared with


TELLTALES = {
    "learning rate too high": Telltale("drift", "nats per answer from the reference", None),
    "verifier errs": Telltale("contradictions", "groups with a text judged both ways", 0.0),
    "no KL": Telltale("drift", "nats per answer from the base", None, "imperfect reward with KL"),
    "truncated sampling": Telltale("ratio", "mean ratio before the update", None),
    "end token not trained": Telltale("endless", "truncated after </answer>", 0.25),
    "group of one": Telltale("grad_norm", "norm of the gradient", None),
    "reward hacked": Telltale("reward", "reward", None),
    "collapse to short answers": Telltale("length", "tokens per answer", None),
    "router collapse": Telltale("idle_experts", "idle experts of a layer", 0.5, "with experts"),
    "wrong template": Telltale("format", "well-formed answers", None),
    "stale reference": Telltale("pull", "β·KL per answer", 0.05, "KL of 2 with resets"),
}
SHARES = ("contradictions", "endless", "idle_experts", "format")


def curves(rows: list[dict[str, float]], beta: float) -> dict[str, list[float]]:
    """The curves of a run that some figure shows, and its pass@1 before training; rounded, to be stored."""
    steps = [row for row in rows if row["step"] > 0]
    kept = {one.curve for one in TELLTALES.values()} - {"drift", "pull"}
    result = {key: [row[f"train/{key}"] for row in steps] for key in sorted(kept) if f"train/{key}" in steps[0]}
    result["accuracy"] = [row["true/accuracy"] for row in steps]
    result["drift"] = [row["train/kl"] * row["train/length"] for row in steps]
    result["pull"] = [beta * value for value in result["drift"]]
    result["before"] = [rows[0]["preflight/pass@1"]]
    return {key: [float(f"{value:.4g}") for value in column] for key, column in result.items()}


def file(name: str) -> str:
    """The file name of a set-up's figure."""
    return f"gallery_{name.replace(' ', '_').lower()}.png"


def store(results: dict, path: Path) -> None:
    """Write the results, a line per set-up."""
    line = lambda value: json.dumps(plain(value), ensure_ascii=False)
    parts = []
    for kind in ("broken", "healthy"):
        setups = [f"  {line(name)}: {line(runs)}" for name, runs in results[kind].items()]
        parts.append(f'"{kind}": {{\n' + ",\n".join(setups) + "\n}")
    parts += [f'"{kind}": {line(results[kind])}' for kind in ("stored", "surplus")]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def draw(name: str, results: dict, path: Path) -> Figure:
    """Left the telling metric, right the accuracy by the unchanged verifier; a line per seed, broken and healthy."""
    telltale = TELLTALES[name]
    broken = [run["curves"] for run in results["broken"][name].values()]
    healthy = [run["curves"] for run in results["healthy"].get(telltale.healthy, {}).values()]
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = wide_figure(5.0, 0.66, 2)
        for panel, key in ((left, telltale.curve), (right, "accuracy")):
            _lines(panel, healthy, key, BLUE)
            _lines(panel, broken, key, RED)
            if key in SHARES or key == "accuracy":
                panel.set_ylim(-0.02, 1.02)
                panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            panel.set_xlabel("step")
        beyond = telltale.beyond
        if telltale.curve == "drift":
            left.set_yscale("log")
            left.set_ylim(bottom=0.1)
            left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            left.yaxis.set_minor_formatter(NullFormatter())
            beyond = SURPLUS * max(1.0, -np.log(broken[0]["before"][0]))
        if beyond is not None:
            left.axhline(beyond, color=GREY, lw=1.2, ls=(0, (4, 3)))
        names = [(name, RED)] + ([(telltale.healthy, BLUE)] if healthy else [])
        caption(left, telltale.label, names)
        caption(right, "right answers in training", names)
        pairs = (results["broken"][name], results["healthy"].get(telltale.healthy, {}))
        ends = [np.mean([run["after"] for run in runs.values()]) for runs in pairs if runs]
        seen = sum(name in run["findings"] for run in results["broken"][name].values())
        title = f"{name[0].upper()}{name[1:]}: pass@1 {' against '.join(map(percent, ends))}"
        note = f"recognised in {seen} of {len(broken)} seeds"
        note += "" if beyond is None else "; dashed: the bound of the rule"
        tall_headline(figure, title, note, left=0.075)
        return write(figure, path)


def _lines(panel: Axes, runs: list[dict[str, list[float]]], key: str, colour: str) -> None:
    for run in runs:
        values = run.get(key, [])
        panel.plot(range(1, len(values) + 1), values, color=colour, lw=1.6, alpha=0.75)
    if not any(run.get(key) for run in runs):
        panel.plot([], [], color=MUTED)
