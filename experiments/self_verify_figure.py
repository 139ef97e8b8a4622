"""The figure of experiments/self_verify.py: how early a head knows, how well calibrated, and what it is good for."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from minir1.figures import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    HALO,
    INK,
    ORANGE,
    STYLE,
    WIDTH,
    caption,
    tall_headline,
    write,
)

LINES = {"auc": ("head", BLUE), "within": ("within a problem", GREEN), "logp": ("mean log-prob", ORANGE)}
PICKS = {"head": ("by the head", BLUE), "maj": ("by majority", ORANGE), "pass": ("any right", GREY)}


def draw(values: dict[str, float], title: str, path: Path) -> Figure:
    """Four panels from the figures of the script. Writes a PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 10), dpi=DPI)
        panels = figure.subplots(2, 2)
        figure.subplots_adjust(left=0.07, right=0.975, top=0.82, bottom=0.07, hspace=0.5, wspace=0.18)
        _position(panels[0, 0], values)
        _calibration(panels[0, 1], values)
        _picks(panels[1, 0], values)
        _restarts(panels[1, 1], values)
        auc = f"the head's AUC is {values['end/auc']:.2f}" if "end/auc" in values else "no AUC: answers of one kind"
        heading = f"At the end {auc}"
        heading += f", within a problem {values['end/within']:.2f}" if "end/within" in values else ""
        tall_headline(figure, heading, f"{title}; {values['random']:.0%} of the answers are right", left=0.07)
        return write(figure, path)


def _position(panel, values) -> None:
    at = sorted(int(key.split("/")[1]) for key in values if key.startswith("after/") and key.endswith("/running"))
    if not at:
        caption(panel, "Will it be right?", [])
        return
    end = 2 * at[-1]  # where the ends are drawn
    for key, (_, colour) in LINES.items():
        known = [n for n in at if f"after/{n}/{key}" in values]
        panel.plot(known, [values[f"after/{n}/{key}"] for n in known], "o-", color=colour, ms=4, lw=1.8)
        if f"end/{key}" in values:
            panel.plot(end, values[f"end/{key}"], "D", color=colour, ms=7, mec="white")
    names = [*LINES.values()]
    if "end/short" in values:
        panel.plot(end, values["end/short"], "D", color=GREY, ms=7, mec="white")
        names.append(("few tokens", GREY))
    panel.axhline(0.5, color=GREY, lw=1, ls=(0, (4, 3)))
    panel.set_xscale("log", base=2)
    panel.set_xticks([*at, end], [*map(str, at), "end"])
    panel.minorticks_off()
    panel.set(xlabel="tokens written, of answers that are longer", ylabel="AUC", ylim=(0.3, 1.01))
    caption(panel, "Will it be right?", names)


def _calibration(panel, values) -> None:
    filled = [key.removesuffix("/count") for key in values if key.startswith("calibration/") and key.endswith("/count")]
    bins = [[values[f"{b}/{key}"] for key in ("confidence", "right", "count")] for b in filled]
    panel.plot([0, 1], [0, 1], color=GREY, lw=1, ls=(0, (4, 3)))
    confidence, right, size = np.array(bins).T
    panel.plot(confidence, right, color=BLUE, lw=1.4)
    panel.scatter(confidence, right, s=20 + 400 * size / size.sum(), color=BLUE, edgecolor="white", zorder=3)
    panel.set(xlabel="e at the end of the answer", ylabel="share right", xlim=(0, 1), ylim=(0, 1.02))
    error = f"calibration error {values['calibration_error']:.3f}; area: number of answers"
    caption(panel, "Is it calibrated?", [(error, INK)])


def _picks(panel, values) -> None:
    ks = sorted(int(key.removeprefix("pass@")) for key in values if key.startswith("pass@"))
    for name, (_, colour) in PICKS.items():
        if f"{name}@1_low" in values:
            ends = [[values[f"{name}@{k}{end}"] for k in ks] for end in ("_low", "_high")]
            panel.fill_between(ks, *ends, color=colour, alpha=0.12, lw=0)
        panel.plot(ks, [values[f"{name}@{k}"] for k in ks], "o-", color=colour, ms=5, lw=1.8)
    panel.set_xscale("log", base=2)
    panel.set_xticks(ks, [str(k) for k in ks])
    panel.set(xlabel="k answers", ylabel="accuracy")
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    caption(panel, "One of k answers", [*PICKS.values()])


def _restarts(panel, values) -> None:
    ks = sorted(int(key.removeprefix("pass@")) for key in values if key.startswith("pass@"))
    for name, colour in (("maj", ORANGE), ("head", BLUE)):
        panel.plot([values[f"tokens@{k}"] for k in ks], [values[f"{name}@{k}"] for k in ks], "o-", color=colour, ms=5)
    levels = [key.split("/")[1] for key in values if key.startswith("restart/") and key.endswith("/accuracy")]
    points = [[values[f"restart/{level}/{key}"] for key in ("tokens", "accuracy")] for level in levels]
    panel.plot(*np.array(points).T, "s-", color=GREEN, ms=5, lw=1.8)
    for level, (tokens, accuracy) in zip(levels, points):
        panel.annotate(level, (tokens, accuracy), (4, -12), textcoords="offset points", color=GREEN, size=10,
                       path_effects=HALO)  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set(xlabel="sampled tokens per problem", ylabel="accuracy")
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    caption(panel, "Stopped at low e, begun again", [("restarts, by threshold", GREEN), ("best of k", BLUE),
                                                    ("majority of k", ORANGE)])  # fmt: skip
