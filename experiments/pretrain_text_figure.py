"""The figure of pre-training on text: bits per byte of held-out documents over the steps, and those of gzip."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minir1.figures import BLUE, DPI, GREY, STYLE, WIDTH, caption, from_zero, headline, series, write


def draw(metrics: list[dict], result: dict, path: Path) -> Figure:
    """metrics: the rows of metrics.jsonl; result: gzip/bits_per_byte, if there is one. Writes a PNG."""
    steps, bits = series(metrics, "eval/bits_per_byte")
    yardstick = result.get("gzip/bits_per_byte")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.6), dpi=DPI)
        panel = figure.subplots()
        figure.subplots_adjust(left=0.075, right=0.975, top=0.74, bottom=0.11)
        names = [("the model", BLUE), (f"gzip -9: {yardstick:.2f}", GREY)] if len(bits) else []
        caption(panel, "Held-out documents", names)
        if len(bits):
            panel.plot(steps, bits, "o-", color=BLUE, lw=2, ms=6, mec="white", mew=1.2, zorder=4, clip_on=False)
            panel.axhline(yardstick, color=GREY, lw=1.6, ls=(0, (4, 3)), zorder=2)
            from_zero(panel, [*bits, yardstick])
        panel.set(xlabel="step", ylabel="bits per byte")
        panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        title = "Pre-training on one's own text"
        if len(bits):
            title += f": {bits[0]:.2f} → {bits[-1]:.2f} bits per byte"
        headline(figure, title, "over all tokens of the documents that were held out; fewer bits, better predictions")
        return write(figure, path)
