"""The tables of a comparison, made from the JSON that experiments/studies/comparison.py writes.

results: cell -> result, where a cell is named "METHOD/SEED". Intervals over seeds are Student's t at 95 %, from three
seeds on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from experiments.studies.comparison import START, Config, Method, cells_of, complete, end, load
from minir1 import log
from minir1.log import markdown_table
from minir1.metrics import over_seeds, paired_bootstrap, seed_interval, with_interval

Results = dict[str, dict]
Interval = tuple[float, float, float]  # mean, low, high

REACHED = ("", "pass@1", "gain, points", "above the start", "tokens per answer", "truncated")
REACHED += ("entropy, nats", "false yes", "drift, nats")
COSTS = ("", "sampled, M tokens", "trained, M tokens", "rollout, s", "update, s", "all, s")
PAIRED = ("", "difference", "over seeds", "significant")
QUANTITIES = {"drift": ("drift, in nats", "+.1f"), "length": ("length, in tokens per answer", "+.0f")}
AGAINST = ("", "difference", "over seeds", "over problems", "significant")


def of(results: Results, name: str) -> dict[int, dict]:
    """seed -> result of a method's finished cells, in the order of the seeds."""
    cells = {int(m[1]): result for key, result in results.items() if (m := re.fullmatch(f"{name}/(\\d+)", key))}
    return dict(sorted(cells.items()))


def mean(results: list[dict], key: str) -> float:
    """The mean over results."""
    return sum(result[key] for result in results) / len(results)


def listed(words: list[str], none: str = "none") -> str:
    """a, b and c"""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else none


def plural(count: int) -> str:
    """1 seed, 2 seeds"""
    return f"{count} seed" + "s" * (count > 1)


# ---- accuracy and cost -------------------------------------------------------------------------


def above(base: dict, results: list[dict]) -> bool | None:
    """Whether the interval over seeds lies above the base's interval over problems; None for fewer than three seeds."""
    if len(results) < 3:
        return None
    return seed_interval([result["pass@1"] for result in results])[1] > base["pass@1_high"]


def reached(results: Results, methods: dict[str, Method]) -> list[list[str]]:
    """A row per method, columns as in REACHED, the base first; no rows before the base is measured."""
    if START not in results:
        return []
    base = results[START]
    forms = {"length": ".0f", "truncated": ".1%", "entropy": ".3f", "false_yes": ".1%", "drift": ".2f"}

    def rest(runs: list[dict]) -> list[str]:
        return [f"{mean(runs, key):{form}}" if all(key in run for run in runs) else "-" for key, form in forms.items()]

    lines = [["start", with_interval(*start(results)), "", "", *rest([base])]]
    for name, method in methods.items():
        runs = list(of(results, name).values())
        if not runs:
            lines.append([method.label, "pending", *[""] * (len(REACHED) - 2)])
            continue
        solved = [run["pass@1"] for run in runs]
        gain = f"{100 * (sum(solved) / len(solved) - base['pass@1']):+.1f}"
        word = {True: "yes", False: "no", None: plural(len(runs))}[above(base, runs)]
        lines.append([method.label, over_seeds(solved), gain, word, *rest(runs)])
    return lines


def costs(results: Results, methods: dict[str, Method]) -> list[list[str]]:
    """A row per method that has a cell, columns as in COSTS: over seeds the mean of tokens and the median of seconds,
    which a training that was suspended for a while does not change.
    """
    lines = []
    for name, method in methods.items():
        if runs := list(of(results, name).values()):
            tokens = [f"{mean(runs, f'tokens/{kind}') / 1e6:.3f}" for kind in ("sampled", "trained")]
            seconds = [median(run[f"seconds/{kind}"] for run in runs) for kind in ("rollout", "update", "total")]
            lines.append([method.label, *tokens, *(f"{value:.0f}" for value in seconds)])
    return lines


# ---- differences -------------------------------------------------------------------------------


def difference(one: dict[int, dict], other: dict[int, dict]) -> dict[str, Interval] | None:
    """pass@1 of `one` minus that of `other`: "seeds", Student's t over pairs with the same seed, and "problems", the
    bootstrap over problems of the means over seeds. None if fewer than three seeds are common to both."""
    both = sorted(one.keys() & other.keys())
    if len(both) < 3:
        return None

    def right(runs: dict[int, dict]) -> np.ndarray:
        return np.mean([np.array(runs[seed]["right"]) / runs[seed]["answers"] for seed in both], axis=0)

    pairs = [one[seed]["pass@1"] - other[seed]["pass@1"] for seed in both]
    return {"seeds": seed_interval(pairs), "problems": paired_bootstrap(right(one), right(other))}


def differences(results: Results, methods: dict[str, Method], other: str) -> dict[str, dict[str, Interval]]:
    """Label -> `difference` from the method `other`, for methods with three seeds in common with it."""
    pairs = {m.label: difference(of(results, name), of(results, other)) for name, m in methods.items() if name != other}
    return {label: ends for label, ends in pairs.items() if ends is not None}


def paired(results: Results, methods: dict[str, Method], other: str, key: str) -> list[list[str]]:
    """A row per method with three seeds in common with `other`, columns as in PAIRED: the difference of `key` with the
    same seed, its interval over seeds."""
    lines, base, form = [], of(results, other), QUANTITIES[key][1]
    for name, method in methods.items():
        runs = of(results, name)
        both = sorted(runs.keys() & base.keys())
        if name != other and len(both) >= 3:
            mean, low, high = seed_interval([runs[seed][key] - base[seed][key] for seed in both])
            ends = f"[{low:{form}}, {high:{form}}]"
            lines.append([method.label, f"{mean:{form}}", ends, "yes" if low > 0 or high < 0 else "no"])
    return lines


def significant(ends: dict[str, Interval]) -> bool:
    """Whether both intervals exclude 0: neither other problems nor other seeds are likely to reverse the sign."""
    return all(low > 0 or high < 0 for _, low, high in ends.values())


def against(results: Results, methods: dict[str, Method], other: str) -> list[list[str]]:
    """A row per method with three seeds in common with `other`, columns as in AGAINST, in points."""
    lines = []
    for label, ends in differences(results, methods, other).items():
        spans = [f"[{100 * low:+.1f}, {100 * high:+.1f}]" for _, low, high in ends.values()]
        lines.append([label, f"{100 * ends['seeds'][0]:+.1f}", *spans, "yes" if significant(ends) else "no"])
    return lines


def verdict(results: Results, methods: dict[str, Method], other: str) -> str:
    """A sentence: which methods differ significantly from `other`; "" if none can be compared yet."""
    groups: dict[bool, list[str]] = {True: [], False: []}
    for label, ends in differences(results, methods, other).items():
        groups[significant(ends)].append(f"{label} ({100 * ends['seeds'][0]:+.1f} points)")
    if not any(groups.values()):
        return ""
    text = f"Significantly different from {methods[other].label} by both intervals: {listed(groups[True])}. "
    return text + f"Not significantly different, so that no order is claimed: {listed(groups[False])}."


def against_start(results: Results, methods: dict[str, Method]) -> str:
    """A sentence: which methods ended significantly above the base; "" before three seeds are done."""
    groups: dict[bool, list[str]] = {True: [], False: []}
    for name, method in methods.items():
        if START in results and (yes := above(results[START], list(of(results, name).values()))) is not None:
            groups[yes].append(method.label)
    if not any(groups.values()):
        return ""
    return f"Significantly above the start: {listed(groups[True])}. Not: {listed(groups[False])}."


# ---- for the figures ---------------------------------------------------------------------------


def parts(results: Results, methods: dict[str, Method]) -> dict[str, dict]:
    """For methods that have a cell, by label: pass@1 of each seed ("ends"), its interval over seeds, the curves."""
    done = {method.label: list(of(results, name).values()) for name, method in methods.items()}
    done = {label: runs for label, runs in done.items() if runs}
    ends = {label: [run["pass@1"] for run in runs] for label, runs in done.items()}
    intervals = {label: seed_interval(values) for label, values in ends.items() if len(values) >= 3}
    return {"ends": ends, "intervals": intervals, "curves": {k: [r["curve"] for r in v] for k, v in done.items()}}


def start(results: Results) -> Interval:
    """pass@1 of the base, its interval over problems."""
    return tuple(results[START][f"pass@1{end}"] for end in ("", "_low", "_high"))


# ---- the terminal and the page -----------------------------------------------------------------


def show(title: str, results: Results, methods: dict[str, Method], other: str) -> None:
    """Print the tables of the results so far."""
    log.table(title, list(REACHED), reached(results, methods))
    log.table("cost of a training, median of seconds over seeds", list(COSTS), costs(results, methods))
    log.table(f"against {methods[other].label}, points", list(AGAINST), against(results, methods, other))
    print("\n".join(filter(None, (against_start(results, methods), verdict(results, methods, other)))))


def compare(config: Config, methods: dict[str, Method], other: str, title: str, draw: Callable) -> None:
    """Run the missing cells, calling draw(config) when one ends; print the tables. SystemExit if a cell fails."""
    failed = complete(cells_of(methods, config), config, after=draw)
    show(f"{title}, {config.steps} steps, test split", load(config.results), methods, other)
    end(failed, config)


def pending(results: Results, names: list[str], script: str, start: Path) -> str:
    """A sentence that names the cells that are not yet run, and the command that runs or prints them from `start`."""
    missing = [name for name in names if name not in results]
    text = f"Pending, {len(missing)} of {len(names)} cells: {', '.join(f'`{name}`' for name in missing)}. To continue:"
    if not missing:
        base = next(iter(results.values())).get("base", "unknown")
        text = f"All {len(names)} cells are done, from the base whose weights have the fingerprint `{base}`:"
    return f"{text}\n\n```\npython -m experiments.{script} --checkpoint {start}\n```"


def page(
    results: Results,
    methods: dict[str, Method],
    other: str,
    config: Config,
    script: str,
    names: list[str] | None = None,
    note: str = "",
    labelled: dict[str, Method] | None = None,
    also: str = "",
) -> str:
    """The whole result of a study: accuracy, the figure, cost, differences, pending cells.

    other: the method that all are compared with; names: of all cells, where these are not only methods and seeds;
    note: a sentence below the costs; labelled: methods with the labels of the first table; also: another quantity to
    compare, one of QUANTITIES.
    """
    blocks = []
    if lines := costs(results, methods):
        batch = f"{config.prompts * config.num_generations} answers of at most {config.max_completion_length} tokens"
        table = markdown_table(REACHED, reached(results, labelled or methods))
        blocks += [f"After {config.steps} steps of {batch}:", table, against_start(results, methods)]
        blocks += [f"![Pass@1 and learning curve of every setting](results/{config.figure.name})"]
        blocks += ["Cost of a training, mean of tokens and median of seconds over seeds:", markdown_table(COSTS, lines)]
        blocks += [note]
    if lines := against(results, methods, other):
        blocks += [f"Against {methods[other].label}, in points of pass@1:", markdown_table(AGAINST, lines)]
        blocks += [verdict(results, methods, other)]
    if also and (lines := paired(results, methods, other, also)):
        blocks += [f"The same for {QUANTITIES[also][0]}:", markdown_table(PAIRED, lines)]
    names = names or [cell.name for cell in cells_of(methods, config)]
    return "\n\n".join(filter(None, [*blocks, pending(results, names, script, config.checkpoint)]))
