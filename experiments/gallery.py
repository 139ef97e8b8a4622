"""A gallery of broken set-ups: each is run at toy size, and recognised by name from its metrics, or not.

    python -m experiments.gallery
    python -m experiments.gallery --only "reward hacked" "stale reference" --seeds 0

Eleven set-ups differ from a healthy one in a line of gallery_setups.py; healthy ones with other learning rates, groups,
objectives and models, and the runs stored in docs/results, must not be accused. Each run has its own seed, base and
metrics; minir1/diagnosis.py sees the metrics and the config alone. A figure per set-up shows the metric that tells.
docs/gallery.md is the page.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from experiments import gallery_figure, gallery_setups, r1_zero
from experiments.gallery_setups import BROKEN, HEALTHY, Setup
from minir1 import cli
from minir1.diagnosis import SURPLUS, diagnose, drift, surplus
from minir1.files import read_json
from minir1.log import markdown_table, progress
from minir1.settings import at_least, new_file

STORED = ("algorithms", "curriculum", "group_size", "hybrid", "kl", "overoptimization", "reduction", "self_check")


@dataclass(frozen=True)
class Config:
    """Which set-ups, how often."""

    only: tuple[str, ...] = ()  # names of findings and of healthy set-ups; none: all
    seeds: tuple[int, ...] = (0, 1, 2)
    base_steps: int = gallery_setups.BASE.steps  # of each base's pre-training
    results: Path = Path("docs/results/gallery.json")  # its folder takes the figures
    stored: Path = Path("docs/results")  # of studies, as far as they are there: their runs are diagnosed too

    def __post_init__(self):
        at_least(self, 0, "seeds")
        at_least(self, 1, "base_steps")
        if unknown := [name for name in self.only if name not in BROKEN and name not in HEALTHY]:
            raise ValueError(f"only = {unknown[0]!r}: one of {', '.join([*BROKEN, *HEALTHY])}")
        new_file(self, "results")


def examined(setup: Setup, seed: int, config: Config) -> dict:
    """One run: its findings and their evidence, pass@1 before and after, the curves of the figures, CPU seconds."""
    began = time.process_time()
    gallery_setups.base(setup.experts, setup.end, setup.balance, seed, config.base_steps)
    ready = time.process_time()
    rows = gallery_setups.train(setup, seed, config.base_steps)
    known = {name: getattr(setup, name) for name in ("beta", "num_generations", "prompts", "reference_reset")}
    findings = diagnose(rows, known)
    result = {"findings": [f.name for f in findings], "evidence": [f.evidence for f in findings]}
    curves = gallery_figure.curves(rows, setup.beta)
    result |= {"before": rows[0]["preflight/pass@1"], "after": rows[-1]["after/pass@1"], "curves": curves}
    seconds = {"seconds": time.process_time() - ready, "base_seconds": ready - began}  # a base is made once
    return result | {name: round(value, 2) for name, value in seconds.items()}


def of_studies(folder: Path) -> dict[str, dict]:
    """What the rules say of each run whose curves a study stored: by file and name its findings, and by learning rate
    how many times further the runs are from the reference than right answers need."""
    findings, times = {}, {}
    for name in STORED:
        path = folder / f"{name}.json"
        stored = read_json(path) if path.exists() else {}
        before = stored.get("start", {}).get("pass@1")
        for key, run in stored.items():
            if "curve" in run:
                steps = range(len(run["curve"]["accuracy"]))
                curve = [{f"train/{k}": column[t] for k, column in run["curve"].items()} for t in steps]
                rows = [{"step": 0, "preflight/pass@1": before}, *({"step": t + 1} | curve[t] for t in steps)]
                known = options(run["command"])
                findings[f"{name}/{key}"] = [f.name for f in diagnose(rows, known)]
                if (moved := drift(rows)) is not None:
                    times.setdefault(f"{known['learning_rate']:g}", []).append(round(surplus(moved), 1))
    return {"stored": findings, "surplus": dict(sorted(times.items()))}


def options(command: str) -> dict[str, float]:
    """β, resets, problems a step and learning rate from a command line; r1_zero.py's default where it says nothing."""
    usual = {key: getattr(r1_zero.Config, key) for key in ("beta", "reference_reset", "prompts", "learning_rate")}
    said = {key: re.search(rf"--{key.replace('_', '-')} (\S+)", command) for key in usual}
    return {key: type(usual[key])(found[1]) if found else usual[key] for key, found in said.items()}


# ---- the page ----------------------------------------------------------------------------------


def after(runs: dict[str, dict]) -> str:
    """The mean accuracy of the final policies."""
    return f"{sum(run['after'] for run in runs.values()) / len(runs):.0%}"


def page(results: dict) -> str:
    """A row per broken set-up: how often it was recognised, what else was found, the evidence of the first seed."""
    rows = []
    for name, runs in results["broken"].items():
        right = sum(name in run["findings"] for run in runs.values())
        also = {other for run in runs.values() for other in run["findings"] if other != name}
        first = next(iter(runs.values()))
        evidence = dict(zip(first["findings"], first["evidence"])).get(name, "-")
        rows.append([name, f"{right} of {len(runs)}", ", ".join(sorted(also)) or "-", evidence, after(runs)])
    return markdown_table(["set-up", "recognised", "also found", "evidence, first seed", "pass@1 after"], rows, words=4)


def page_healthy(results: dict) -> str:
    """A row per healthy set-up: how often it was accused, and of what."""
    rows = []
    for name, runs in results["healthy"].items():
        found = {finding for run in runs.values() for finding in run["findings"]}
        accused = sum(bool(run["findings"]) for run in runs.values())
        rows.append([name, f"{accused} of {len(runs)}", ", ".join(sorted(found)) or "-", after(runs)])
    return markdown_table(["healthy set-up", "accused", "of what", "pass@1 after"], rows, words=3)


def page_stored(results: dict) -> str:
    """A row per finding about the stored runs, with their names."""
    stored = results["stored"]
    names = sorted({name for found in stored.values() for name in found})
    rows = [[name, ", ".join(f"`{run}`" for run, found in stored.items() if name in found)] for name in names]
    silent = sum(not found for found in stored.values())
    return markdown_table(["finding", "runs"], [*rows, ["none", f"{silent} of {len(stored)}"]], words=2)


def page_surplus(results: dict) -> str:
    """A row per learning rate of the stored runs: how many times as far from the reference as right answers need."""
    rows = []
    for rate, times in results["surplus"].items():
        beyond = sum(value > SURPLUS for value in times)
        rows.append([rate, str(len(times)), *(f"{f(times):.1f}" for f in (min, median, max)), str(beyond)])
    head = ["learning rate", "runs", "least", "median", "most", f"above {SURPLUS}"]
    return markdown_table(head, rows)


def page_seconds(results: dict) -> str:
    """One sentence: how many runs, and what they took."""
    runs = [run for kind in ("broken", "healthy") for one in results[kind].values() for run in one.values()]
    seconds, bases = ([run[key] for run in runs] for key in ("seconds", "base_seconds"))
    text = f"{len(runs)} runs of {min(seconds):.1f} to {max(seconds):.1f} s of one core, together "
    return text + f"{sum(seconds) / 60:.0f} minutes, and {sum(bases) / 60:.0f} for the bases."


def main(config: Config) -> dict:
    """Run, diagnose, draw, print. Returns what is written to `results`, after every set-up."""
    chosen = {"broken": BROKEN, "healthy": HEALTHY}
    if config.only:
        chosen = {kind: {k: v for k, v in of.items() if k in config.only} for kind, of in chosen.items()}
    kept = read_json(config.results) if config.only and config.results.exists() else {}
    results: dict = {"broken": {}, "healthy": {}} | kept | of_studies(config.stored)
    with progress(len(config.seeds) * sum(map(len, chosen.values())), "set-ups") as advance:
        for kind, setups in chosen.items():
            for name, setup in setups.items():
                runs = {}
                for seed in config.seeds:
                    runs[str(seed)] = examined(setup, seed, config)
                    advance()
                results[kind][name] = runs
                gallery_figure.store(results, config.results)
                found = [", ".join(run["findings"]) or "-" for run in runs.values()]
                print(f"{kind}: {name}: {'; '.join(found)}", flush=True)
    for name in results["broken"]:
        gallery_figure.draw(name, results, config.results.parent / gallery_figure.file(name))
    print(f"written: {config.results}, and a figure of each broken set-up beside it")
    return results


if __name__ == "__main__":
    cli.run(main, Config)
