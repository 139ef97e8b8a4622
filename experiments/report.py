"""A page about one run of the R1 pipeline: what each stage gave, what it cost, and which claims of the paper hold.

    python -m experiments.report runs/r1
    python -m experiments.report runs/r1 --distilled runs/distill-vs-rl/seed-0

Reads the run's folders (experiments/r1.py makes them) and writes report.html, one file with its figures inside,
report.md with figures/*.png, and report.json with the differences. A stage counts once its result.json is there; one
that is absent is left out of every table, figure and claim. Differences between two stages are paired over the same
test problems; checks and majority votes are counted by the task. --distilled adds what a small student learned from
the last model, and what by RL alone: a folder that studies/distill_vs_rl.py leaves for a seed. --no-measure leaves out
the time of a decoding step, which is measured here with the last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from experiments import report_figures, report_page, report_write
from experiments.report_claims import claims, distillation, paired
from experiments.report_run import STAGES, Pipeline, Shown, groups, read
from experiments.studies import distill_figures, distill_vs_rl
from minir1 import checkpoint, cli
from minir1.files import read_json, replace_text, write_json
from minir1.model import hf
from minir1.model.config import ModelConfig
from minir1.model.hf_config import from_hf_config
from minir1.model.transformer import Transformer
from minir1.settings import new_folder

ROOT = Path(__file__).parent.parent
ASKED = 3  # questions whose answers are shown


@dataclass(frozen=True)
class Config:
    """The run to report on."""

    run: Annotated[Path, tyro.conf.Positional]  # the folder of experiments/r1.py
    distilled: Path | None = None  # the folder of a seed of studies/distill_vs_rl.py
    out: Path | None = None  # a folder for report.html, report.md and figures/; None: the run's
    measure: bool = True  # time decoding steps with the last checkpoint, on the CPU

    def __post_init__(self):
        new_folder(self, "out")


# ---- what else is shown ------------------------------------------------------------------------


def shown(run: Pipeline) -> list[Shown]:
    """Questions of different kinds in both languages, chosen by position alone, with each stage's first answer.

    The kinds are the first, the middle and the last of the file; of each the first problem in the language whose turn
    it is, or else the first one.
    """
    if not any(saved.asked for saved in run.answers.values()):
        return []
    first, subjects = next(iter(run.answers.values())), {}
    for index, (subject, _) in sorted(first.about.items()):
        subjects.setdefault(subject, []).append(index)
    names = list(subjects)
    chosen = dict.fromkeys(names[i * (len(names) - 1) // (ASKED - 1)] for i in range(ASKED))
    result = []
    for turn, name in enumerate(chosen):
        wanted = [i for i in subjects[name] if first.about[i][1] == ("en", "zh")[turn % 2]]
        index = (wanted or subjects[name])[0]
        grids = {run.label(stage): saved.answers.get("sampled", {}) for stage, saved in run.answers.items()}
        answers = {label: grid[index][0] for label, grid in grids.items() if grid.get(index)}
        result.append(Shown(*first.asked[index], name, answers))
    return result


def last_checkpoint(run: Pipeline) -> Path | None:
    """The newest checkpoint of the last stage that has one, a policy's."""
    folders = [run.path / name / "checkpoint" for name in STAGES if name != "reward-model"]
    return next(filter(None, map(checkpoint.latest, reversed(folders))), None)


def openness(run: Pipeline) -> list[tuple[str, str, bool]]:
    """(item, files, whether they are there), looked up and not asserted."""
    at = last_checkpoint(run)
    trained = [run.path / name / "config.json" for name, stage in run.stages.items() if stage.kind != "sampling"]
    tested = [run.path / "test" / name / "answers.jsonl" for name in run.tests]
    tuning = [run.path / name / "kept.jsonl" for name in ("cold-start", "rejection") if name in run.stages]
    named = next((str(s.config["task"]) for s in run.stages.values() if s.config.get("task")), "").partition(":")[0]
    task = Path(named) if named.endswith(".py") else ROOT / "minir1" / "tasks" / f"{named}.py"
    items = [("weights", [*at.glob("*.safetensors")] if at else []), ("code", [ROOT / "experiments" / "r1.py"])]
    items += [("problems and corpus, generated", [task])] + ([("fine-tuning data", tuning)] if tuning else [])
    items += [("recipe: settings of every training", trained), ("evaluation: every answer", tested)]
    items += [("licence", [ROOT / "LICENSE"])]
    return [(item, _listed(files, run.path), bool(files) and all(map(Path.is_file, files))) for item, files in items]


def _listed(files: Sequence[Path], run: Path) -> str:
    """The first file, relative to the run or the repository, and how many more there are."""
    if not files:
        return "none"
    home = next((folder for folder in (run, ROOT) if files[0].is_relative_to(folder)), None)
    first = files[0].relative_to(home) if home else files[0].name
    return f"{first}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")


@torch.no_grad()
def decode_seconds(model: Transformer, lengths: Sequence[int], repeats: int = 15) -> dict[int, float]:
    """The shortest time of decoding one token, of several, after each number of tokens in the cache; one row."""
    seconds, token = {}, torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    for length in lengths:
        cache, laps = model.cache(1, length + repeats), []
        cache.advance(length, length)  # empty slots cost as much as those of a text
        for _ in range(repeats):
            began = time.perf_counter()
            model.logits(model.hidden(token, cache=cache)[:, 0])
            laps.append(time.perf_counter() - began)
        seconds[length] = min(laps)
    return seconds


def context_lengths(config: ModelConfig) -> list[int]:
    """Powers of four up to the window."""
    return [4**n for n in range(2, 9) if 4**n <= config.max_positions]


# ---- writing -----------------------------------------------------------------------------------


def write(path: Path, *, distilled: Path | None = None, out: Path | None = None, measure: bool = True) -> Path:
    """Write report.html, whose path is returned, report.md, report.json and figures/ about the run in `path`.

    report.json has the paired differences, flat: R1-Zero against the base and the final stage against R1-Zero as
    gain/r1-zero and gain/final, each with _low and _high; and claims/N, 1 or 0, in the order of the table. ValueError
    for a folder that holds no pipeline.
    """
    run, out = read(path), out or path
    at, counted, seconds = last_checkpoint(run), None, {}
    if at:
        counted = from_hf_config(read_json(at / "config.json"))
        if measure:
            seconds = decode_seconds(hf.load(at)[0], context_lengths(counted))
    stated, names, student = claims(run), groups(run.tests), []
    drawn = report_figures.draw(run, names, counted, seconds, out / "figures")
    if distilled:
        values = distill_vs_rl.figures(distilled)
        student = [report_page.Table(distill_vs_rl.HEAD, distill_vs_rl.rows([values]))]
        drawn["distillation"] = out / "figures" / "distillation.png"
        distill_figures.draw_against_rl([values], distill_vs_rl.WAYS, drawn["distillation"])
        stated.append(distillation(values))
    pairs = {"gain/r1-zero": ("r1-zero", "base")}
    pairs |= {"gain/final": (run.final, "r1-zero")} if run.final not in ("", "base", "r1-zero") else {}
    gains = {key: paired(run.answers, *pair) for key, pair in pairs.items()}
    gains = {key: gain for key, gain in gains.items() if gain}
    page = report_page.page(run, names, stated, gains, openness(run), shown(run), student, drawn)
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "report.md", report_write.markdown(page, out))
    replace_text(out / "report.html", report_write.html(page))
    values = {f"{key}{end}": x for key, gain in gains.items() for end, x in zip(("", "_low", "_high"), gain)}
    values |= {f"claims/{n}": float(claim.holds) for n, claim in enumerate(stated, start=1)}
    write_json(out / "report.json", values)
    return out / "report.html"


def main(config: Config) -> Path:
    """Read, compute, write."""
    page = write(config.run, distilled=config.distilled, out=config.out, measure=config.measure)
    print(f"{page} and report.md beside it")
    return page


if __name__ == "__main__":
    cli.run(main, Config)
