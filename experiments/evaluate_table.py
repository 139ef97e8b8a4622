"""The table of experiments/evaluate.py: what was measured, row by row, with one checkpoint or more side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minir1 import rewards
from minir1.judge import Answer
from minir1.log import table
from minir1.metrics import with_interval

COMMON = ("greedy", "forced", "format", "length", "truncated", "unjudged", "entropy", "tokens_per_s")
READABLE = {  # a key of `readability` -> its label and format in the table
    "words": ("words, numbers and signs of the thinking", ".1f"),
    "language_consistency": ("words of the thinking in the problem's language", ".1%"),
    "repetition": ("16-grams of the thinking that occurred before", ".1%"),
    "tidiness": ("thinking that closes with the answer", ".1%"),
    "reflections": ("reflective words of the thinking", ".2f"),
}


def rows(values: Mapping[str, float], rates: Mapping[str, str]) -> list[tuple[str, str, str, str]]:
    """(label, key, group or "", format) of each row of the table, by the keys that `figures` returned.

    A value's key is key + group, its interval key + "_low" + group; `rates` are the task's. What no answer has, such as
    reflective words where the model knows none, has no row.
    """
    groups = [key.removeprefix("length") for key in values if key.startswith("length_")]  # such as "_hard"
    whole = [key for key in values if not key.endswith(("_low", "_high", *groups))]
    methods = [key for key in whole if f"over_{key}" in values]
    at_k = [key for key in whole if key.startswith(("pass@", "maj@")) and key not in ("pass@1", "pass@1_formed")]
    others = {*COMMON, "preference", *READABLE, *methods, *at_k, "pass@1", "pass@1_formed"}
    counts = [key for key in whole if key not in others and not key.startswith("over_")]

    lines = [("pass@1, sampled", "pass@1", "", ".1%"), ("  among well-formed answers", "pass@1_formed", "", ".1%")]
    lines += [(f"  {group_name(group)}", "pass@1", group, ".1%") for group in groups]
    lines += [(key, key, "", ".1%") for key in at_k]
    lines += [("pass@1, greedy", "greedy", "", ".1%")]
    lines += [("pass@1, forced to answer at once", "forced", "", ".1%")] if "forced" in values else []
    for name in methods:
        lines += [(f"baseline: {words(name)}", name, "", ".1%"), ("  policy above it", f"over_{name}", "", ".1%")]
    lines += [("preference, 0 to 1", "preference", "", ".2f")] if "preference" in values else []
    lines += [("well-formed", "format", "", ".1%"), ("truncated by the budget", "truncated", "", ".1%")]
    lines += [("not judged", "unjudged", "", ".1%")] if values.get("unjudged") else []
    lines += [("tokens", "length", "", ".1f")]
    lines += [(f"  {group_name(group)}", "length", group, ".1f") for group in groups]
    found = [key for key in READABLE if values.get(key) or (key in values and key not in ("tidiness", "reflections"))]
    lines += [(READABLE[key][0], key, "", READABLE[key][1]) for key in found]
    for name in counts:
        rate = (f"{words(name)}, share of {words(rates[name])}", name, "", ".1%") if name in rates else None
        lines.append(rate or (f"{words(name)} per answer", name, "", ".2f"))
    return lines


def words(name: str) -> str:
    """A key in plain words."""
    return name.replace("_", " ")


def group_name(group: str) -> str:
    """`_hard` -> hard problems; a subject or a level stays as it is."""
    name = words(group[1:])
    return f"{name} problems" if name.islower() and not name.startswith("level ") else name


def applicable(values: dict[str, float], grid: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """The values for the table: without the language of the thinking if no thinking has a word, which counts as 0."""
    worded = any(rewards.words(rewards.thinking(a.text)) for row in grid for a in row)
    return values if worded else {key: value for key, value in values.items() if key != "language_consistency"}


def show(title: str, columns: Mapping[str, Mapping[str, float]], rates: Mapping[str, str]) -> None:
    """Print measurements side by side, with intervals where there are any."""

    def cell(values: Mapping[str, float], key: str, group: str, form: str) -> str:
        if key + group not in values:
            return "-"
        if f"{key}_low{group}" in values:
            return with_interval(*(values[f"{key}{end}{group}"] for end in ("", "_low", "_high")), form)
        return f"{values[key + group]:{form}}"

    keys = dict.fromkeys(key for values in columns.values() for key in values)
    every = {key: max(values[key] for values in columns.values() if key in values) for key in keys}
    lines = [[label, *(cell(values, *rest) for values in columns.values())] for label, *rest in rows(every, rates)]
    table(title, ["", *columns], lines)
