"""Figure: the tiles of attention, which of them are computed, which need a mask, and the path of one program.

    python -m experiments.benchmarks.attention_tiles --out docs/results/attention_tiles.png

The masks are those of minir1.ops, at a size that can be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minir1 import cli
from minir1.ops.reference import visible
from minir1.settings import at_least, new_file

EMPTY, MASKED, WHOLE = "white", "#f2c98a", "#7fa8d1"


@dataclass(frozen=True)
class Config:
    """Sizes in tokens."""

    queries: int = 48  # n
    keys: int = 64  # m
    block: int = 8  # side of a tile
    window: int = 24  # w
    out: Path = Path("docs/results/attention_tiles.png")

    def __post_init__(self):
        at_least(self, 1, "block", "window")
        at_least(self, 2 * self.block, "queries")
        at_least(self, 4 * self.block, "keys")
        new_file(self, "out")


def tiles(n: int, m: int, block: int, causal: bool, window: int | None) -> list[list[str]]:
    """The kind of each tile, by blocks of queries and of keys: none of its pairs is visible, some, or all."""
    kinds = []
    for row in visible(n, m, causal, window).split(block):
        shares = [tile.float().mean().item() for tile in row.split(block, dim=1)]
        kinds.append([EMPTY if share == 0 else WHOLE if share == 1 else MASKED for share in shares])
    return kinds


def draw(ax, config: Config, window: int | None, title: str) -> None:
    """One grid; queries go down and keys to the right."""
    from matplotlib.patches import Rectangle

    kinds = tiles(config.queries, config.keys, config.block, True, window)
    for i, row in enumerate(kinds):
        for j, color in enumerate(row):
            ax.add_patch(Rectangle((j, i), 1, 1, facecolor=color, edgecolor="#888888", linewidth=0.5))
    row, column = len(kinds) - 2, 3
    along = [j for j, color in enumerate(kinds[row]) if color != EMPTY]
    down = [i for i, line in enumerate(kinds) if line[column] != EMPTY]
    if not down:
        raise ValueError(f"window = {window}: no query sees the keys of tile {column + 1}: choose a larger one")
    arrow = dict(arrowstyle="->", linewidth=2)
    ax.annotate("", (along[-1] + 0.9, row + 0.5), (along[0] + 0.1, row + 0.5), arrowprops=arrow | {"color": "#b03030"})
    ax.annotate("", (column + 0.5, down[-1] + 0.9), (column + 0.5, down[0] + 0.1),
                arrowprops=arrow | {"color": "#207020"})
    ax.set(xlim=(0, len(kinds[0])), ylim=(len(kinds), 0), aspect="equal", xticks=[], yticks=[], title=title,
           xlabel="keys", ylabel="queries")


def save(fig, handles: list, out: Path) -> None:
    """Write the figure with a legend below."""
    import matplotlib.pyplot as plt

    fig.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=120)
    plt.close(fig)


def main(config: Config) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    draw(left, config, None, f"causal, {config.queries} queries and {config.keys} keys")
    draw(right, config, config.window, f"with a window of {config.window}")
    handles = [Patch(facecolor=WHOLE, edgecolor="#888888", label="no mask needed"),
               Patch(facecolor=MASKED, edgecolor="#888888", label="masked"),
               Patch(facecolor=EMPTY, edgecolor="#888888", label="not computed"),
               Line2D([], [], color="#b03030", linewidth=2, label="path of a forward or dq program"),
               Line2D([], [], color="#207020", linewidth=2, label="path of a dk, dv program")]
    save(fig, handles, config.out)


if __name__ == "__main__":
    cli.run(main, Config)
