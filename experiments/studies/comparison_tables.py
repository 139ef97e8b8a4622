"""What the tables of a comparison say, made from the JSON that experiments/studies/comparison.py writes.

found: cell -> result, where a cell is called "METHOD/SEED"; intervals over seeds are Student's t at 95 %, and are given
from three seeds on.
"""

from __future__ import annotations

import re
from statistics import median

import numpy as np

from experiments.studies.comparison import START, Config, Method, cells_of
from minir1 import log
from minir1.metrics import paired_bootstrap, seed_interval

Found = dict[str, dict]

REACHED = ("", "pass@1", "gain, points", "clear of the start", "tokens an answer", "cut")
REACHED += ("entropy, nats", "false yes", "drift, nats")
COSTS = ("", "sampled, M tokens", "trained, M tokens", "rollout, s", "update, s", "all, s")
PAIRED = ("", "difference", "over seeds", "separated")
QUANTITIES = {"drift": ("drift, in nats", "{:+.1f}"), "length": ("length, in tokens an answer", "{:+.0f}")}
AGAINST = ("", "difference", "over seeds", "over problems", "separated")


def of(found: Found, name: str) -> dict[int, dict]:
    """seed -> result of a method's cells that are done, by rising seed."""
    cells = {int(match[1]): result for key, result in found.items() if (match := re.fullmatch(f"{name}/(\\d+)", key))}
    return dict(sorted(cells.items()))


# ---- numbers in words --------------------------------------------------------------------------


def shares(values: list[float]) -> str:
    """84.2% [80.1, 88.3], within the limits of a share; without the interval for fewer than three values."""
    text = f"{sum(values) / len(values):.1%}"
    if len(values) < 3:
        return text
    _, low, high = seed_interval(values)
    return f"{text} [{100 * max(low, 0.0):.1f}, {100 * min(high, 1.0):.1f}]"


def mean(results: list[dict], key: str) -> float:
    """Over seeds."""
    return sum(result[key] for result in results) / len(results)


def listed(words: list[str], none: str = "none") -> str:
    """a, b and c"""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else none


def table(head: tuple[str, ...], lines: list[list[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] + ["---:"] * (len(head) - 1), *lines])


# ---- what was reached, and at what cost --------------------------------------------------------


def clear(base: dict, results: list[dict]) -> bool | None:
    """Whether the interval over seeds lies above the base's interval over problems; None for fewer than three seeds."""
    if len(results) < 3:
        return None
    return seed_interval([result["pass@1"] for result in results])[1] > base["pass@1_high"]


def reached(found: Found, methods: dict[str, Method]) -> list[list[str]]:
    """A row a method, columns as in REACHED, the base first. Nothing before the base is measured."""
    if START not in found:
        return []
    base, lines = found[START], []
    keys = (("length", "{:.0f}"), ("truncated", "{:.1%}"), ("entropy", "{:.3f}"), ("false_yes", "{:.1%}"))
    keys += (("drift", "{:.2f}"),)

    def rest(results: list[dict]) -> list[str]:
        return [form.format(mean(results, key)) for key, form in keys]

    low, high = (100 * base[f"pass@1_{end}"] for end in ("low", "high"))
    lines.append(["start", f"{base['pass@1']:.1%} [{low:.1f}, {high:.1f}]", "", "", *rest([base])])
    for name, method in methods.items():
        results = list(of(found, name).values())
        if not results:
            lines.append([method.label, "pending", *[""] * (len(REACHED) - 2)])
            continue
        solved = [result["pass@1"] for result in results]
        gain = f"{100 * (sum(solved) / len(solved) - base['pass@1']):+.1f}"
        word = {True: "yes", False: "no", None: f"{len(results)} seed" + "s" * (len(results) > 1)}[clear(base, results)]
        lines.append([method.label, shares(solved), gain, word, *rest(results)])
    return lines


def costs(found: Found, methods: dict[str, Method]) -> list[list[str]]:
    """A row a method that has a cell, columns as in COSTS: tokens in the mean over seeds, seconds in the median, which
    a training that was suspended for a while does not spoil.
    """
    lines = []
    for name, method in methods.items():
        if results := list(of(found, name).values()):
            tokens = [f"{mean(results, f'tokens/{kind}') / 1e6:.3f}" for kind in ("sampled", "trained")]
            kinds = [f"seconds/{kind}" for kind in ("rollout", "update", "total")]
            seconds = [f"{median(result[kind] for result in results):.0f}" for kind in kinds]
            lines.append([method.label, *tokens, *seconds])
    return lines


# ---- differences -------------------------------------------------------------------------------


def difference(one: dict[int, dict], other: dict[int, dict]) -> dict[str, tuple[float, float, float]] | None:
    """(mean, low, high) of pass@1 of one above other: "seeds", Student's t over pairs of equal seeds, and "problems",
    the bootstrap over problems of the means over seeds. None for fewer than three seeds that both have."""
    both = sorted(one.keys() & other.keys())
    if len(both) < 3:
        return None

    def right(results: dict[int, dict]) -> np.ndarray:
        return np.mean([np.array(results[seed]["right"]) / results[seed]["answers"] for seed in both], axis=0)

    pairs = [one[seed]["pass@1"] - other[seed]["pass@1"] for seed in both]
    return {"seeds": seed_interval(pairs), "problems": paired_bootstrap(right(one), right(other))}


def paired(found: Found, methods: dict[str, Method], other: str, key: str) -> list[list[str]]:
    """A row a method, columns as in PAIRED: a result's `key` less that of the other method with the same seed, its
    interval over seeds; of methods with three seeds that both have."""
    lines, base, form = [], of(found, other), QUANTITIES[key][1]
    for name, method in methods.items():
        both = sorted(of(found, name).keys() & base.keys())
        if name == other or len(both) < 3:
            continue
        mean, low, high = seed_interval([of(found, name)[seed][key] - base[seed][key] for seed in both])
        ends = f"[{form.format(low)}, {form.format(high)}]"
        lines.append([method.label, form.format(mean), ends, "yes" if low > 0 or high < 0 else "no"])
    return lines


def separated(ends: dict[str, tuple[float, float, float]]) -> bool:
    """Whether both intervals leave out 0: neither other problems nor other seeds would be likely to turn it round."""
    return all(low > 0 or high < 0 for _, low, high in ends.values())


def against(found: Found, methods: dict[str, Method], other: str) -> list[list[str]]:
    """A row a method that can be compared with `other`, columns as in AGAINST, in points."""
    lines = []
    for name, method in methods.items():
        ends = difference(of(found, name), of(found, other))
        if name == other or ends is None:
            continue
        spans = [f"[{100 * low:+.1f}, {100 * high:+.1f}]" for _, low, high in ends.values()]
        lines.append([method.label, f"{100 * ends['seeds'][0]:+.1f}", *spans, "yes" if separated(ends) else "no"])
    return lines


def verdict(found: Found, methods: dict[str, Method], other: str) -> str:
    """In words: what separated from `other`, and what did not; "" where nothing can be compared yet."""
    apart, level = [], []
    for name, method in methods.items():
        ends = difference(of(found, name), of(found, other))
        if name != other and ends is not None:
            points = f"{method.label} ({100 * ends['seeds'][0]:+.1f} points)"
            (apart if separated(ends) else level).append(points)
    if not apart and not level:
        return ""
    return (
        f"Separated from {methods[other].label} by both intervals: {listed(apart)}. "
        f"Not separated, so that no order is claimed: {listed(level)}."
    )


def against_start(found: Found, methods: dict[str, Method]) -> str:
    """In words: which methods ended clear of the base, and which did not; "" before three seeds are done."""
    words: dict[bool, list[str]] = {True: [], False: []}
    for name, method in methods.items():
        if START in found and (told := clear(found[START], list(of(found, name).values()))) is not None:
            words[told].append(method.label)
    if not words[True] and not words[False]:
        return ""
    return f"Clear of the start: {listed(words[True])}. Not clear of it: {listed(words[False])}."


# ---- for the figures ---------------------------------------------------------------------------


def parts(found: Found, methods: dict[str, Method]) -> dict[str, dict]:
    """Of the methods that have a cell, by label: "ends" pass@1 of each seed, "intervals" over seeds, "curves"."""
    done = {method.label: list(of(found, name).values()) for name, method in methods.items()}
    done = {label: results for label, results in done.items() if results}
    ends = {label: [result["pass@1"] for result in results] for label, results in done.items()}
    intervals = {label: seed_interval(values) for label, values in ends.items() if len(values) >= 3}
    return {"ends": ends, "intervals": intervals, "curves": {k: [r["curve"] for r in v] for k, v in done.items()}}


def start(found: Found) -> tuple[float, float, float]:
    """(mean, low, high) of the base over problems."""
    return tuple(found[START][f"pass@1{end}"] for end in ("", "_low", "_high"))


def show(title: str, found: Found, methods: dict[str, Method], other: str) -> None:
    """Print what is known so far."""
    log.table(title, list(REACHED), reached(found, methods))
    log.table("cost of a training, seconds in the median over seeds", list(COSTS), costs(found, methods))
    log.table(f"against {methods[other].label}, points", list(AGAINST), against(found, methods, other))
    print("\n".join(filter(None, (against_start(found, methods), verdict(found, methods, other)))))


# ---- what is pending ---------------------------------------------------------------------------


def pending(found: Found, names: list[str], script: str) -> str:
    """The cells that are still to be run, or that there are none; and the command that runs or prints them."""
    missing = [name for name in names if name not in found]
    told = f"Pending, {len(missing)} of {len(names)} cells: {', '.join(f'`{name}`' for name in missing)}. To go on:"
    if not missing:
        base = next(iter(found.values())).get("base", "unknown")
        told = f"All {len(names)} cells are done, from the base whose weights have the fingerprint `{base}`:"
    return f"{told}\n\n```\npython -m experiments.{script} --checkpoint runs/base/checkpoint\n```"


def page(
    found: Found,
    methods: dict[str, Method],
    other: str,
    config: Config,
    script: str,
    names: list[str] | None = None,
    note: str = "",
    labelled: dict[str, Method] | None = None,
    also: str = "",
) -> str:
    """The whole result of an ablation: what was reached, at what cost, what separated, the figure, what is pending.

    other: the method that all are compared with; names: of all cells, where they are more than methods and seeds; note:
    a sentence on the costs; labelled: the methods as the first table calls them; also: what else the question is about,
    one of QUANTITIES.
    """
    told = []
    if lines := costs(found, methods):
        batch = f"{config.prompts * config.answers} answers of at most {config.max_tokens} tokens"
        told += [f"After {config.steps} steps of {batch}:", table(REACHED, reached(found, labelled or methods))]
        told += [against_start(found, methods)]
        told += [f"![Pass@1 of every setting, and the way there](results/{config.figure.name})"]
        told += ["A training, tokens in the mean over seeds, seconds in the median:", table(COSTS, lines), note]
    if lines := against(found, methods, other):
        told += [f"Against {methods[other].label}, in points of pass@1:", table(AGAINST, lines)]
        told += [verdict(found, methods, other)]
    if also and (lines := paired(found, methods, other, also)):
        told += [f"The same for {QUANTITIES[also][0]}:", table(PAIRED, lines)]
    names = names or [cell.name for cell in cells_of(methods, config)]
    return "\n\n".join(filter(None, [*told, pending(found, names, script)]))
