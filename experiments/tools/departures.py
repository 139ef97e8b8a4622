"""What the departures of docs/departures.md change in accuracy, as far as a study has compared them.

A part of experiments/tools/render_docs.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from experiments.studies.comparison_tables import difference, of, significant
from minir1.log import markdown_table

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"


class Pair(NamedTuple):
    """Two methods of a comparison: what the row is called, the file of its results, and the names of the two in it."""

    label: str
    file: str
    one: str
    other: str


PAIRS = (
    Pair("one ratio per answer, as R1 writes it, against one per token", "algorithms", "sequence_grpo", "grpo"),
    Pair("PPO, λ = 1, against GRPO", "algorithms", "ppo", "grpo"),
    Pair("PPO, λ = 0.95, against GRPO", "algorithms", "ppo_gae", "grpo"),
    Pair("no KL term against R1's β = 0.001", "kl", "none", "weak"),
    Pair("reference reset every four steps against none, β = 0.05", "kl", "reset", "loss"),
    Pair("mean over all tokens against each answer's mean", "reduction", "token", "per_answer"),
    Pair("more answers to fewer questions, 8 × 16 against 16 × 8", "group_size", "G16", "G8"),
    Pair("no division by deviation and length (Dr. GRPO) against GRPO", "algorithms", "dr_grpo", "grpo"),
)


def row(pair: Pair, folder: Path) -> list[str]:
    """Label, mean difference in points, its interval over seeds and over problems, and whether it is significant."""
    results = json.loads((folder / f"{pair.file}.json").read_text(encoding="utf-8"))
    ends = difference(of(results, pair.one), of(results, pair.other))
    spans = [f"[{100 * low:+.1f}, {100 * high:+.1f}]" for _, low, high in ends.values()]
    return [pair.label, f"{100 * ends['seeds'][0]:+.1f}", *spans, "yes" if significant(ends) else "no"]


def page(folder: Path = RESULTS) -> str:
    """The table as Markdown."""
    head = ["", "difference", "over seeds", "over problems", "significant"]
    return markdown_table(head, [row(pair, folder) for pair in PAIRS])
