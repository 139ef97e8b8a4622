"""Are two checkpoints different? A paired comparison of two evaluations of the same problems.

    python -m experiments.compare runs/eval-base runs/eval-r1-zero

The two are folders that evaluate.py wrote with --out. Both must have been sampled with the same settings and problems;
otherwise the differences are named and nothing is compared. The difference of pass@1 gets a bootstrap interval over
problems, paired, which is much narrower than the intervals of two separate accuracies suggest. McNemar's exact test
counts the problems that one greedy answer solves and the other does not. Verdicts are those that the files hold: where
they are of different versions of a verifier, judge both anew, evaluate.py --rescore FILE --out FOLDER.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from experiments.evaluate import SAMPLING
from minir1 import answer_file, cli
from minir1.files import write_json
from minir1.judge import rights
from minir1.log import table
from minir1.metrics import mcnemar, paired_bootstrap, with_interval
from minir1.settings import new_file

FEWEST = 20  # with fewer problems the bootstrap calls equal policies different more often than in 5 % of cases


@dataclass(frozen=True)
class Config:
    """Two folders that evaluate.py wrote, or their answers.jsonl."""

    a: Annotated[Path, tyro.conf.Positional]
    b: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None  # a JSON file for the result

    def __post_init__(self):
        new_file(self, "out")


def load(path: Path) -> answer_file.Saved:
    """The answers of an evaluation. ValueError unless it is complete."""
    saved = answer_file.read(path)
    if any(len(saved.answers.get(kind, {})) < len(saved.asked) for kind in ("sampled", "greedy")):
        raise ValueError(f"{path} is not complete: continue that evaluation with --resume")
    return saved


def compare(a: answer_file.Answers, b: answer_file.Answers) -> dict[str, float]:
    """Flat figures: a, b and b - a on the problems of which both have judged answers, and McNemar's test.

    ValueError if there is no such problem.
    """
    shares = [rights([answers["sampled"][p] for p in sorted(answers["sampled"])]) for answers in (a, b)]
    judged = ~np.isnan(shares[0]) & ~np.isnan(shares[1])
    if not judged.any():
        raise ValueError("no problem has judged answers in both")
    first, second = (share[judged] for share in shares)
    values = {"problems": int(judged.sum()), "a": first.mean(), "b": second.mean()}
    values |= dict(zip(("difference", "difference_low", "difference_high"), paired_bootstrap(second, first)))
    one = [[answers["greedy"][p][0] for p in sorted(answers["greedy"])] for answers in (a, b)]
    both = [(x.right, y.right) for x, y in zip(*one) if not (x.unjudged or y.unjudged)]
    if both:
        only_a, only_b, p = mcnemar(*zip(*both))
        values |= {"greedy/only_a": only_a, "greedy/only_b": only_b, "greedy/p": p}
    return values


def main(config: Config) -> dict[str, float]:
    """Check that the two may be compared, compare, print."""
    a, b = load(config.a), load(config.b)
    same = [name for name in SAMPLING if name != "data"]  # a path; the problems are compared themselves
    changed = answer_file.differing(*({name: saved.settings.get(name) for name in same} for saved in (a, b)))
    if changed:
        raise ValueError(f"not sampled alike ({'; '.join(changed)}): evaluate both with the same settings")
    if a.asked != b.asked:
        raise ValueError(f"not the same problems in the same order: {len(a.asked)} and {len(b.asked)}")
    values = compare(a.answers, b.answers)
    names = [str(saved.settings["checkpoint"]) for saved in (a, b)]
    interval = with_interval(*(values[f"difference{end}"] for end in ("", "_low", "_high")))
    lines = [[f"A: {names[0]}", f"{values['a']:.1%}"], [f"B: {names[1]}", f"{values['b']:.1%}"]]
    lines += [["B - A, 95 % interval over problems", interval]]
    if "greedy/p" in values:
        lines += [[f"greedy: solved by {name.upper()} alone", values[f"greedy/only_{name}"]] for name in "ab"]
        lines += [["greedy: McNemar's exact test, p", f"{values['greedy/p']:.3g}"]]
    table(f"{a.settings['task']}, {a.settings['split']}: {values['problems']} problems, paired", ["", ""], lines)
    significant = values["difference_low"] > 0 or values["difference_high"] < 0
    if values["problems"] < FEWEST:
        print(f"fewer than {FEWEST} problems: too few for these intervals to be trusted")
    else:
        print("significantly different at 5 %" if significant else "not significantly different at 5 %")
    if config.out:
        write_json(config.out, values)
    return values


if __name__ == "__main__":
    cli.run(main, Config)
