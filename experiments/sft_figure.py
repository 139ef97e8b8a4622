"""The loss of supervised fine-tuning on its batches and on held-out documents, over its steps."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minir1.figures import BLUE, DPI, ORANGE, STYLE, WIDTH, caption, from_zero, headline, line, series, write


def draw_loss(metrics: list[dict], path: Path, what: str = "supervised fine-tuning") -> Figure:
    """Reads train/loss and, if there is one, eval/loss from the rows of metrics.jsonl. Writes a PNG.

    what: the training, for the title.
    """
    (steps, train), (due, held_out) = (series(metrics, key) for key in ("train/loss", "eval/loss"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.6), dpi=DPI)
        panel = figure.subplots()
        figure.subplots_adjust(left=0.075, right=0.975, top=0.74, bottom=0.11)
        names = [("batches", BLUE)] if len(steps) else []
        if len(steps):
            line(panel, steps, train, BLUE)
        if len(due):
            panel.plot(due, held_out, "o-", color=ORANGE, lw=1.6, ms=6, mec="white", mew=1.2, zorder=4, clip_on=False)
            names.append(("held-out documents", ORANGE))
        from_zero(panel, [*train, *held_out])
        panel.set(xlabel="step", ylabel="nats per answer token")
        panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        caption(panel, "-log π of answer tokens", names)
        title = f"Loss of {what}"
        note = "mean over the answer tokens of a batch, and over those of all held-out documents"
        if len(due) > 1:
            title += f": held-out {held_out[0]:.3g} → {held_out[-1]:.3g} nats"
        headline(figure, title, note)
        return write(figure, path)
