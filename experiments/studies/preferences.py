"""Preference pairs, a reward model of them and a policy trained on them by DPO: the numbers of docs/preferences.md.

    python -m experiments.studies.preferences --checkpoint runs/base/checkpoint --seeds 0

Each seed has a folder of pairs, one of a reward model and one of a policy. Finished steps are skipped and killed ones
resume, so seeds can be added later. Prints the table; writes it and the first seed's figures under docs/results/.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from experiments import dpo, preference_pairs, reward_model
from minir1 import checkpoint, cli
from minir1.device import pick, pick_dtype
from minir1.files import write_json
from minir1.log import table
from minir1.metrics import over_seeds, with_interval
from minir1.model import heads
from minir1.preference_data import accuracy, in_parts, read_pairs, tokenise
from minir1.settings import at_least, new_file, new_folder
from minir1.templates import TEMPLATES

NO, YES = " no\n</think>", " yes\n</think>"  # the last verdict before the answer


@dataclass(frozen=True)
class Config:
    """Settings of the three steps, whose checkpoints, pairs, seeds and folders follow from the first fields."""

    checkpoint: Path = Path("runs/base/checkpoint")  # the base: samples the answers, and starts both trainings
    task: str = "countdown"
    data: str | None = None  # what the task reads
    template: Literal[TEMPLATES] = "chat"
    seeds: tuple[int, ...] = (0,)
    device: str = "auto"
    out: Path = Path("runs/preferences")
    results: Path = Path("docs/results/preference.json")
    pairs: preference_pairs.Config = field(default_factory=preference_pairs.Config)
    reward: reward_model.Config = field(default_factory=reward_model.Config)
    dpo: dpo.Config = field(default_factory=dpo.Config)

    def __post_init__(self):
        at_least(self, 0, "seeds")
        new_file(self, "results")
        new_folder(self, "out")


def run(config: Config, seed: int) -> dict[str, float]:
    """Run the unfinished steps of one seed; returns their results under pairs/, reward/ and dpo/, and the probe."""
    shared = {"checkpoint": config.checkpoint, "seed": seed, "template": config.template, "device": config.device}
    task = {"task": config.task, "data": config.data}
    folders = {name: config.out / f"{name}-{seed}" for name in ("pairs", "reward", "dpo")}
    if not (folders["pairs"] / "result.json").exists():
        preference_pairs.main(replace(config.pairs, out=folders["pairs"], **shared, **task))
    files = {"pairs": folders["pairs"] / "train.jsonl", "held_out": folders["pairs"] / "held_out.jsonl", "resume": True}
    if not (folders["reward"] / "result.json").exists():
        reward_model.main(replace(config.reward, out=folders["reward"], **files, **shared))
    if not (folders["dpo"] / "result.json").exists():
        dpo.main(replace(config.dpo, out=folders["dpo"], **files, **shared, **task))
    results = {}
    for name, folder in folders.items():
        result = json.loads((folder / "result.json").read_text())
        # Seconds and memory depend mostly on what else the machine was doing.
        results |= {f"{name}/{key}": v for key, v in result.items() if not key.startswith(("seconds/", "memory/"))}
    return results | probe(folders["reward"] / "checkpoint", files["held_out"], config)


@torch.no_grad()
def probe(folder: Path, held_out: Path, config: Config) -> dict[str, float]:
    """Whether the reward model checks the last verdict or believes it: how often it agrees with held-out pairs whose
    wrong answer ends its thinking with a no, as they are and with only that no replaced by a yes."""
    device = pick(config.device)
    model, tokenizer = heads.load(checkpoint.resolve(folder), device, pick_dtype(None, device))
    pairs = [pair for pair in read_pairs(held_out) if NO in pair.rejected]
    swapped = [replace(pair, rejected=pair.rejected.replace(NO, YES)) for pair in pairs]
    result = {"probe/pairs": len(pairs)}
    for name, group in (("as_it_is", pairs), ("swapped", swapped)) if pairs else ():
        rows = [tokenise(pair, tokenizer, config.template) for pair in group]
        score = lambda part, share: reward_model.score(model, part, config.reward)
        scores = in_parts(rows, config.reward.microbatch, score)
        values = accuracy(scores["chosen"], scores["rejected"], rows)
        result |= {f"probe/{name}/{key}": value for key, value in values.items()}
    return result


KEYS = (  # label, key in the result, format
    ("pairs from training problems", "pairs/train/pairs", ",.0f"),
    ("pairs from validation problems, held out", "pairs/held_out/pairs", ",.0f"),
    ("tokens of a preferred answer", "pairs/held_out/tokens_chosen", ".1f"),
    ("tokens of the other", "pairs/held_out/tokens_rejected", ".1f"),
    ("reward model: agrees with held-out pairs", "reward/eval/accuracy", ".1%"),
    ("the longer answer: agrees with held-out pairs", "reward/longer/accuracy", ".1%"),
    ("reward model: expected calibration error", "reward/eval/calibration_error", ".1%"),
    ("reward model: agrees where the other answer's thinking ends with a no", "probe/as_it_is/accuracy", ".1%"),
    ("reward model: agrees when that no is replaced by a yes", "probe/swapped/accuracy", ".1%"),
    ("DPO: implicit reward agrees with held-out pairs", "dpo/after/accuracy", ".1%"),
    ("before DPO: validation pass@1", "dpo/before/pass@1", ".1%"),
    ("after DPO: validation pass@1", "dpo/after/pass@1", ".1%"),
    ("implicit reward of a preferred answer, after", "dpo/after/reward_chosen", ".3f"),
    ("implicit reward of the other, after", "dpo/after/reward_rejected", ".3f"),
    ("log π of a preferred answer, before", "dpo/before/logp_chosen", ".2f"),
    ("log π of a preferred answer, after", "dpo/after/logp_chosen", ".2f"),
    ("log π of the other, before", "dpo/before/logp_rejected", ".2f"),
    ("log π of the other, after", "dpo/after/logp_rejected", ".2f"),
    ("tokens of a sampled answer, before", "dpo/before/length", ".1f"),
    ("tokens of a sampled answer, after", "dpo/after/length", ".1f"),
)


def rows(results: dict[str, dict[str, float]]) -> list[list[str]]:
    """A row per key that every seed has: its label, a cell per seed, and from three seeds on the mean.

    A seed's intervals are over problems. results: seed -> the result of `run`.
    """
    lines = []
    for label, key, form in KEYS:
        if any(key not in result for result in results.values()):
            continue
        cells = [
            with_interval(*(result[f"{key}{end}"] for end in ("", "_low", "_high")), form)
            if f"{key}_low" in result
            else f"{result[key]:{form}}"
            for result in results.values()
        ]
        if len(results) >= 3:
            cells.append(over_seeds([result[key] for result in results.values()], form))
        lines.append([label, *cells])
    return lines


def head(results: dict[str, dict[str, float]]) -> list[str]:
    """The first line of the table."""
    return ["", *(f"seed {seed}" for seed in results), *(["mean, 95 %"] if len(results) >= 3 else [])]


def main(config: Config) -> dict[str, dict[str, float]]:
    """Run what is missing, print and write the table and the figures; returns the result of each seed."""
    results = {str(seed): run(config, seed) for seed in config.seeds}
    table(f"comparisons on {config.task}", head(results), rows(results))
    write_json(config.results, results)
    first = config.seeds[0]
    for name, figure in (("reward", "reliability"), ("dpo", "dpo")):
        drawn = config.out / f"{name}-{first}" / "figures" / f"{figure}.png"
        shutil.copy(drawn, config.results.with_name(f"{config.results.stem}_{figure}.png"))
    return results


if __name__ == "__main__":
    cli.run(main, Config)
