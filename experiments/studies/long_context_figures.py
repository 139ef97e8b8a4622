"""The figures of long texts: accuracy of retrieval by position and length, and the cost of a token."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from minir1.figures import BLUE, DPI, GREY, HALO, INK, ORANGE, STYLE, WIDTH, headline, percent, write

VARIANTS = {  # as experiments/studies/long_context.py names them
    "none": "as trained",
    "linear": "linear interpolation",
    "ntk": "NTK",
    "yarn": "YaRN",
    "none_tuned": "short tuning without extension",
    "yarn_tuned": "YaRN and short tuning",
}
KINDS = {"mha": ("MHA", GREY), "gqa": ("GQA", ORANGE), "mla": ("MLA", BLUE)}

# ---- retrieval -------------------------------------------------------------------------------


def retrieval(results: list[dict], path: Path) -> Figure:
    """Heat maps of accuracy, a panel per variant: length of the text across, position of the pair in it down.

    results: one result.json per seed with window and VARIANT/LENGTH/PART, whose means are drawn. Lengths right of the
    white line are longer than any text of the first training.
    """
    lengths = sorted({int(key.split("/")[1]) for key in results[0] if key.startswith("none/") and key[-1].isdigit()})
    parts = sum(key.startswith(f"none/{lengths[0]}/") for key in results[0])
    inside = sum(length <= results[0]["window"] for length in lengths)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(WIDTH, 8), dpi=DPI)
        panels = figure.subplots(2, 3, sharex=True, sharey=True)
        figure.subplots_adjust(left=0.075, right=0.985, top=0.81, bottom=0.09, wspace=0.08, hspace=0.28)
        for panel, (name, title) in zip(panels.flat, VARIANTS.items()):
            grid = [[_mean(results, f"{name}/{length}/{part}") for length in lengths] for part in range(parts)]
            _heat(panel, np.array(grid), inside)
            panel.set_title(title, loc="left", weight="bold", size=13)
            panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            panel.set_yticks([-0.5, parts - 0.5], ["start", "end"])
            panel.tick_params(length=0)
        for panel in panels[1]:
            panel.set_xlabel("tokens of the text")
        for panel in panels[:, 0]:
            panel.set_ylabel("position of the pair", labelpad=-12)
        headline(figure, *_retrieval_finding(results))
        return write(figure, path)


def _heat(panel: Axes, grid: np.ndarray, inside: int) -> None:
    """grid: [parts, lengths]; the first `inside` lengths are within the trained window."""
    panel.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="YlGnBu")
    for (part, length), share in np.ndenumerate(grid):
        colour = "white" if share > 0.55 else INK
        panel.text(length, part, f"{100 * share:.0f}", ha="center", va="center", size=9.5, color=colour)
    panel.axvline(inside - 0.5, color="white", lw=4)
    for side in ("left", "bottom"):
        panel.spines[side].set_visible(False)


def _mean(results: list[dict], key: str) -> float:
    return float(np.mean([result[key] for result in results]))


def _retrieval_finding(results: list[dict]) -> tuple[str, str]:
    keys = ("none/outside", "yarn/outside", "yarn_tuned/outside", "none_tuned/outside")
    plain, yarn, best, control = (percent(_mean(results, key)) for key in keys)
    title = f"Retrieval beyond the trained window: {plain}, with YaRN {yarn}, tuned {best}"
    seeds = "one seed" if len(results) == 1 else f"mean of {len(results)} seeds"
    return title, f"Right answers in %, {seeds}; trained lengths left of the white line. Tuned without YaRN: {control}"


# ---- costs -----------------------------------------------------------------------------------


def costs(result: dict, path: Path) -> Figure:
    """Time of one decode step, and memory of the cache, against the tokens in it, for MHA, GQA and MLA.

    result: decode/KIND/LENGTH/ms and cache/KIND/LENGTH/mib.
    """
    lengths = sorted({int(key.split("/")[2]) for key in result if key.startswith("decode/")})
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "both"}):
        figure = Figure(figsize=(WIDTH, 6), dpi=DPI)
        panels = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.075, right=0.93, top=0.76, bottom=0.12, wspace=0.32)
        time = ("decode", "ms", "Time of a decode step", "ms of processor time, one row")
        for panel, (name, unit, title, label) in zip(panels, (time, ("cache", "mib", "Cache", "MiB per row"))):
            lines = {kind: [result[f"{name}/{kind}/{length}/{unit}"] for length in lengths] for kind in KINDS}
            for kind, values in lines.items():
                panel.plot(lengths, values, "o-", color=KINDS[kind][1], lw=2.2, ms=6, mec="white", zorder=3)
            _ends(panel, lengths[-1], {kind: values[-1] for kind, values in lines.items()})
            panel.set(xscale="log", yscale="log", ylabel=label, xlabel="tokens in the cache")
            panel.set_xticks(lengths, [f"{length // 1024}K" if length >= 1024 else str(length) for length in lengths])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.yaxis.set_minor_locator(NullLocator())
            panel.set_title(title, loc="left", weight="bold", size=14, pad=12)
        headline(figure, *_costs_finding(result, lengths[-1]))
        return write(figure, path)


def _ends(panel: Axes, x: float, values: dict[str, float]) -> None:
    """Write the name of each line at its right end."""
    for kind, value in values.items():
        name, colour = KINDS[kind]
        style = {"va": "center", "weight": "bold", "color": colour, "path_effects": HALO, "annotation_clip": False}
        panel.annotate(name, (x, value), xytext=(9, 0), textcoords="offset points", **style)


def _costs_finding(result: dict, longest: int) -> tuple[str, str]:
    cache = {kind: result[f"cache/{kind}/{longest}/mib"] / result[f"cache/mha/{longest}/mib"] for kind in KINDS}
    time = {kind: result[f"decode/{kind}/{longest}/ms"] / result[f"decode/mha/{longest}/ms"] for kind in KINDS}
    title = f"Memory of the cache: {cache['mla']:.0%} of MHA's with MLA, {cache['gqa']:.0%} with GQA"
    note = f"At {longest:,} tokens a step takes {time['mla']:.2f} of MHA's time with MLA, {time['gqa']:.2f} with GQA"
    return title, f"{note}; width 128, 4 heads, 4 layers"
