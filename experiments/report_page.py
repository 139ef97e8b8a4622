"""What the page of experiments/report.py says: its sections, tables, figures and samples, in no markup."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.report_claims import LEVEL, Claim, points, share
from experiments.report_run import Pipeline, Shown
from minir1.judge import Answer

CONTROLS = re.compile(  # control characters and line separators, and those that turn the direction of what follows
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
COUNTED = "Tokens trained on: RL counts those of the answers alone, the other stages those of the prompts too."
MEANS = (  # of the table of stages: key, label, format
    ("language_consistency", "language consistency", ".3f"), ("repetition", "repetition", ".3f"),
    ("tidiness", "tidiness", ".3f"), ("format", "well-formed", ".1%"), ("truncated", "truncated", ".1%"),
    ("length", "tokens per answer", ".1f"), ("words", "words per thinking", ".1f"),
)  # fmt: skip


class Table(NamedTuple):
    """Rows of text; the first `text_columns` are aligned to the left."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


class Picture(NamedTuple):
    """A PNG, and what it shows in words."""

    file: Path
    alt: str


class Sample(NamedTuple):
    """A question and the answers of the stages to it: (label, verdict, tokens, thinking, what follows it)."""

    question: str
    answers: list[tuple[str, str, int, str, str]]


class Section(NamedTuple):
    """A heading, and paragraphs (str), tables, pictures and samples below it."""

    title: str
    parts: list[str | Table | Picture | Sample]


class Page(NamedTuple):
    """The whole report."""

    title: str
    finding: str
    sections: list[Section]


# ---- what the page says ------------------------------------------------------------------------


def page(
    run: Pipeline,
    groups: tuple[list[str], list[str]],
    claims: list[Claim],
    gains: dict[str, tuple[float, float, float]],
    openness: list[tuple[str, str, bool]],
    shown: list[Shown],
    student: list[Table],
    drawn: dict[str, Path],
) -> Page:
    """The report. groups: difficulties and kinds; gains: the paired differences; shown: questions;
    student: of its ways to learn, if there is one."""
    picture = {name: [Picture(path, ALT[name])] for name, path in drawn.items()}
    pictures = lambda *names: [part for name in names for part in picture.get(name, [])]
    reproduced = sum(claim.holds for claim in claims)
    sections = [
        Section(
            f"Claims of the paper: {reproduced} of {len(claims)} reproduced", [claim_table(claims)] if claims else []
        ),
        Section(f"Quality of each stage{_arrow(run)}", [*quality(run, groups), *pictures("scores")]),
        Section("Flaws and behaviour by stage", pictures("flaws", "behaviour")),
        Section("Accuracy against the token budget", pictures("budget")),
        Section("A small student: taught, or by RL", [*student, *pictures("distillation")]),
        Section("Training: loss, reward and time", pictures("sft_loss", "rl_reward", "loss_and_reward", "timeline")),
        Section("Cost of each stage", [cost(run), COUNTED]),
        Section("Rejection sampling: what each filter removed", filters(run)),
        Section("The model: size, window and cost of a context", pictures("parameters", "window", "context")),
        Section(f"Openness: {sum(there for *_, there in openness)} of {len(openness)} found", [checklist(openness)]),
        Section("Answers of each stage to the same questions", samples(shown)),
    ]
    title = f"The R1 pipeline, one run: {run.path.resolve().name}"
    return Page(title, finding(run, gains), [section for section in sections if section.parts])


ALT = {  # what a figure shows, for those who do not see it
    "scores": "Bars: accuracy of the base, R1-Zero and the final stage by difficulty and kind.",
    "flaws": "Lines over the stages: lost language consistency, repetition, untidy, malformed, truncated answers.",
    "behaviour": "Lines over the stages by difficulty: checks, corrections, wrong yes, reflective words.",
    "budget": "Lines: accuracy against the token budget of an answer.",
    "distillation": "Lines: accuracy of RL on a small student by tokens. Dots: test accuracy of each way to teach it.",
    "sft_loss": "Lines: loss of each fine-tuning over its steps, on batches and on held-out documents.",
    "rl_reward": "Lines: reward of each RL over its steps, and accuracy on validation problems.",
    "loss_and_reward": "Lines on two axes: SFT loss and RL reward over the seconds of the pipeline.",
    "timeline": "Bars: when each stage ran and how long.",
    "parameters": "Dots: active against total parameters of this model and of published ones.",
    "window": "Bars: context window of this model and of published ones.",
    "context": "Lines: bytes of the cache and time of a decoding step against the context length.",
}


def finding(run: Pipeline, gains: dict[str, tuple[float, float, float]]) -> str:
    """One paragraph, from the numbers."""
    known = {name: values["pass@1"] for name, values in run.tests.items() if "pass@1" in values}
    if not known:
        return "No stage of this run has been tested yet."
    said = []
    if {"base", "r1-zero"} <= known.keys():
        words = "changed" if not (gain := gains.get("gain/r1-zero")) else "raised" if gain[1] > 0 else "did not raise"
        change = f" ({points(gain)}, paired)" if gain else ""
        tail = f"from {known['base']:.1%} to {known['r1-zero']:.1%}{change}"
        said.append(f"RL with rule rewards alone {words} accuracy on problems never trained on {tail}.")
    else:
        said += [f"{run.label(name)} solves {value:.1%} of the test problems." for name, value in known.items()]
    zero, final = run.tests.get("r1-zero", {}), run.tests[run.final]
    if "language_consistency" in zero:
        said.append(f"The mean language consistency of R1-Zero's thinking is {zero['language_consistency']:.3f}.")
    if run.final in known and run.final not in ("base", "r1-zero"):
        said.append(f"The final model, {run.label(run.final)}, solves {known[run.final]:.1%}")
        if gain := gains.get("gain/final"):
            level = "level with" if gain[1] >= LEVEL else "not shown to be level with"
            better = "better than" if gain[1] > 0 else level
            said[-1] += f" and is {better} R1-Zero: {points(gain)}, paired, with 95 % intervals over problems"
        said[-1] += "."
        changes = [
            f"{words} {zero[key]:.3f} → {final[key]:.3f}"
            for key, words in (("language_consistency", "language consistency"), ("repetition", "repetition"))
            if key in zero and key in final
        ]
        said += [f"From R1-Zero to the final model: {', '.join(changes)}."] if changes else []
    seconds = sum(stage.seconds or 0 for stage in run.stages.values())
    return " ".join(said) + (f" The stages took {seconds:,.0f} s together." if seconds else "")


def _arrow(run: Pipeline) -> str:
    values = [one["pass@1"] for one in run.tests.values() if "pass@1" in one]
    return f": accuracy {' → '.join(f'{value:.1%}' for value in values)}" if values else ""


def claim_table(claims: list[Claim]) -> Table:
    """One row per claim."""
    rows = [[c.text, c.shown, c.threshold, "yes" if c.holds else "no"] for c in claims]
    return Table(["claim", "this run", "reproduced if", "reproduced"], rows, text_columns=4)


def quality(run: Pipeline, groups: tuple[list[str], list[str]]) -> list[str | Table]:
    """One column per tested stage, with 95 % intervals over problems."""
    if not run.tests:
        return []
    wanted = [("pass@1", "right answers")]
    wanted += [(f"pass@1_{name}", f"– {name}") for name in [*groups[0], *groups[1]]]
    ks = [key for key in dict.fromkeys(k for values in run.tests.values() for k in values) if _at_k(key)]
    rows = [_row(run.tests, label, key) for key, label in wanted]
    rows += [_row(run.tests, key, key) for key in ks]
    rows += [_row(run.tests, "forced to answer at once", "forced")]
    rows += [_row(run.tests, label, key, form) for key, label, form in MEANS]
    general = {name: run.general.get(name, {}) for name in run.tests}
    rows += [_row(general, "general prompts: acceptable", "pass@1")]
    rows += [_row(general, "general prompts: preference", "preference", ".2f")]
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    text = "In brackets: 95 % intervals over problems, each stage by itself; differences are paired (see the claims)."
    return [Table(["", *(run.label(name) for name in run.tests)], rows), text]


def _at_k(key: str) -> bool:
    name, _, k = key.partition("@")
    return name in ("maj", "pass") and k.isdigit() and k != "1"


def _row(columns: dict[str, dict[str, float]], label: str, key: str, form: str = ".1%") -> list[str]:
    """One value of each stage, with its interval where there is one."""
    return [label, *(_cell(values, key, form) if key in values else "-" for values in columns.values())]


def _cell(values: dict[str, float], key: str, form: str) -> str:
    """`share`, where the ends of a group's interval are pass@1_low_GROUP."""
    whole, _, group = key.partition("_")
    suffix = f"_{group}" if group else ""
    return share({f"{whole}{end}": values.get(f"{whole}{end}{suffix}") for end in ("", "_low", "_high")}, whole, form)


def cost(run: Pipeline) -> Table:
    """One row per stage."""
    number = lambda value: "-" if value is None else f"{value:,.0f}"
    rows = []
    for stage in run.stages.values():
        steps = stage.metrics[-1].get("step") if stage.metrics else None
        cells = [number(value) for value in (steps, stage.sampled, stage.trained, stage.seconds)]
        rows.append([stage.label, stage.kind, *cells])
    total = [sum(getattr(s, name) or 0 for s in run.stages.values()) for name in ("sampled", "trained", "seconds")]
    rows.append(["all", "", "", *map(number, total)])
    return Table(["stage", "kind", "steps", "tokens sampled", "tokens trained on", "seconds"], rows, text_columns=2)


def filters(run: Pipeline) -> list[Table]:
    """What was removed from the sampled answers, one column per stage that sampled."""
    stages = {n: s for n, s in run.stages.items() if any(k.startswith("removed/") for k in s.result)}
    names = dict.fromkeys(k for stage in stages.values() for k in stage.result if k.startswith("removed/"))
    wanted = [("sampled", "sampled answers"), *((name, f"– {_words(name)}") for name in names), ("kept", "kept")]
    wanted += [("general", "general data added")]
    cell = lambda stage, key: f"{stage.result[key]:,.0f}" if key in stage.result else "-"
    rows = [[label, *(cell(stage, key) for stage in stages.values())] for key, label in wanted]
    return [Table(["", *(stage.label for stage in stages.values())], rows)] if stages else []


def _words(key: str) -> str:
    return key.partition("/")[2].replace("_", " ")


def checklist(openness: list[tuple[str, str, bool]]) -> Table:
    """One row per item; each was looked up when the report was made."""
    rows = [["yes" if there else "no", item, files] for item, files, there in openness]
    return Table(["there", "item", "file"], rows, text_columns=3)


def samples(shown: list[Shown]) -> list[str | Sample]:
    """The answers, split after the thinking."""
    if not shown:
        return []
    parts: list[str | Sample] = [
        "Chosen by position alone: the first problem, in English and Chinese in turn, of the first, the middle and the "
        "last kind of puzzle in the test, and each stage's first sampled answer to it."
    ]
    for one in shown:
        answers = [(label, _verdict(a), a.tokens, *_split(a.text)) for label, a in one.answers.items()]
        parts.append(Sample(f"{one.subject}: {one.prompt} (a right answer: {one.reference})", answers))
    return parts


def _verdict(answer: Answer) -> str:
    return "not judged" if answer.unjudged else "right" if answer.right else "wrong"


def _split(text: str) -> tuple[str, str]:
    """The thinking without its tags, all of the text if it never ends, and what follows it."""
    thinking, _, rest = CONTROLS.sub("\ufffd", text).partition("</think>")
    return thinking.strip().removeprefix("<think>").strip("\n"), rest.strip()
