"""Figures of learning from comparisons: the calibration of a reward model, and what DPO changes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from minir1.figures import (
    BLUE,
    DPI,
    GREY,
    HALO,
    MUTED,
    ORANGE,
    RED,
    STYLE,
    VIOLET,
    WIDTH,
    caption,
    headline,
    line,
    percent_axis,
    series,
    write,
)


def reliability(result: dict[str, float], path: Path) -> Figure:
    """How often the answer with the higher reward was preferred, against the confidence of the reward model.

    Reads eval/accuracy with _low and _high, eval/calibration_error, longer/accuracy, and calibration/B/count,
    /confidence and /accuracy for B = 0, 1, …, the bins between ½ and 1. The area of a dot is its number of pairs.
    """
    bins = sum(key.startswith("calibration/") and key.endswith("/count") for key in result)
    columns = [[result[f"calibration/{b}/{name}"] for b in range(bins)] for name in ("count", "confidence", "accuracy")]
    count, confidence, right = np.array(columns, dtype=float)
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "both"}):
        figure = Figure(figsize=(WIDTH, 7.4), dpi=DPI)
        panel = figure.subplots()
        figure.subplots_adjust(left=0.09, right=0.96, top=0.84, bottom=0.1)
        panel.plot([0.5, 1], [0.5, 1], color=GREY, lw=1.3, ls=(0, (4, 3)), zorder=1)
        panel.text(0.705, 0.69, "perfectly calibrated", ha="left", va="top", color=MUTED, size=11)
        used = count > 0
        panel.plot(confidence[used], right[used], color=BLUE, lw=1.4, alpha=0.5, zorder=2)
        area = 60 + 1500 * count[used] / count.sum()
        panel.scatter(confidence[used], right[used], s=area, color=BLUE, ec="white", lw=1.2, zorder=3, clip_on=False)
        for x, y, n in zip(confidence[used], right[used], count[used]):
            below = {"xytext": (0, -26), "textcoords": "offset points", "ha": "center", "va": "top"}
            panel.annotate(f"{n:.0f}", (x, y), color=MUTED, size=11, path_effects=HALO, **below)
        panel.set(xlim=(0.49, 1.01), ylim=(min(0.5, right[used].min()) - 0.06, 1.03))
        panel.set(xlabel="claimed: mean σ(|r_c - r_r|) of a bin", ylabel="measured: share of the bin that is right")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        middle, low, high = (100 * result[f"eval/accuracy{end}"] for end in ("", "_low", "_high"))
        title = f"Agreement of the reward model with held-out preferences: {middle:.0f}% [{low:.0f}, {high:.0f}]"
        note = f"expected calibration error {result['eval/calibration_error']:.1%}; numbers are pairs; "
        headline(figure, title, note + f"preferring the longer answer agrees with {result['longer/accuracy']:.0%}")
        return write(figure, path)


def dpo(metrics: list[dict], path: Path) -> Figure:
    """What DPO does over its steps: implicit rewards and log-probs of both answers, and what the policy solves.

    Reads from the rows of metrics.jsonl: train/ and eval/ of reward_chosen, reward_rejected, logp_chosen and
    logp_rejected, eval/accuracy, eval/pass@1. The dots are held-out pairs and validation problems.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5), dpi=DPI)
        panels = figure.subplots(1, 3)
        figure.subplots_adjust(left=0.065, right=0.975, top=0.7, bottom=0.12, wspace=0.3)
        two = (("chosen", BLUE), ("rejected", RED))
        for panel, name, title in zip(panels, ("reward", "logp"), ("Implicit reward", "log π of an answer")):
            for which, colour in two:
                steps, values = series(metrics, f"train/{name}_{which}")
                if len(steps):
                    line(panel, steps, values, colour)
                _dots(panel, metrics, f"eval/{name}_{which}", colour)
            panel.set_ylabel("β log π/π_ref" if name == "reward" else "nats")
            caption(panel, title, list(two))
        words = {"accuracy": ("held-out pairs", VIOLET), "pass@1": ("validation problems", ORANGE)}
        shown = [word for key, word in words.items() if _dots(panels[2], metrics, f"eval/{key}", word[1])]
        percent_axis(panels[2])
        caption(panels[2], "Right", shown)
        for panel in panels:
            panel.set_xlabel("step")
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        headline(figure, *_finding(metrics))
        return write(figure, path)


def _dots(panel: Axes, metrics: list[dict], key: str, colour: str) -> bool:
    """The values under `key`; False if there are none."""
    steps, values = series(metrics, key)
    panel.plot(steps, values, "o-", color=colour, lw=1.2, ms=6, mec="white", mew=1.2, zorder=4, clip_on=False)
    return len(steps) > 0


def _finding(metrics: list[dict]) -> tuple[str, str]:
    """The headline, and the line below it, that the rows support."""
    found = {key: series(metrics, f"eval/{key}")[1] for key in ("logp_chosen", "logp_rejected", "pass@1")}
    if any(len(found[key]) < 2 for key in ("logp_chosen", "logp_rejected")):
        return "Log-probs and implicit rewards over the steps of DPO", ""
    change = {key: values[-1] - values[0] for key, values in found.items() if len(values) > 1}
    words = {key: f"{'falls' if change[key] < 0 else 'rises'} by {abs(change[key]):.1f}" for key in list(found)[:2]}
    note = f"held-out pairs: log π of the chosen answer {words['logp_chosen']}, of the rejected one "
    note += f"{words['logp_rejected']} nats"
    if "pass@1" not in change:
        return "Log-probs and implicit rewards over the steps of DPO", note
    return f"Validation pass@1: {found['pass@1'][0]:.0%} → {found['pass@1'][-1]:.0%} by DPO", note
