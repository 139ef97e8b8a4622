"""The whole of R1 in miniature: a base, R1-Zero, and four more stages to R1 (DeepSeek-R1, sections 2.2 and 2.3).

    python -m experiments.r1 --out runs/r1

    base          pretrain.py        next tokens of the world's corpus
    r1-zero       r1_zero.py         RL from the base with rules alone: accuracy and format
    cold-start    reject_sample.py   right answers of R1-Zero, reformatted by rules: one language, tidy
    sft-1         sft.py             the base learns from these
    rl-1          r1_zero.py         RL with accuracy, format and language consistency, clip 10
    general-data  reject_sample.py   acceptable answers of the base to general prompts, rewritten by rules too
    rejection     reject_sample.py   answers of rl-1, kept by filters and mixed with the general ones
    sft-2         sft.py             the base learns from these
    pairs         preference_pairs.py  answers of sft-2 to general prompts, ranked by a rule that stands in for people
    reward-model  reward_model.py    learns the ranking
    rl-2          all_scenarios.py   RL by rules; in the last steps also general prompts, by the reward model
    test          evaluate.py        each checkpoint on problems that no stage has seen
    report        report.py          what each stage gave: report.html, report.md, figures/

Every stage is a script of its own that reads files and writes files; this one only says which follows which, and with
which settings. A killed run continues with --resume; stages that are done are not repeated. The test problems are used
at the end only.

Departures from R1, beside the size: cold-start answers are rewritten by rules where R1 had people and V3, and general
data come from the base, not from V3; people's preferences are a rule too (minir1/tasks/world_talk.py), so that the
learned reward can be compared with what it should have learned; there is no reward for harmlessness; the weights of
the format and of language consistency are 0.1 and 0.2, where R1 adds each to accuracy with weight 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments import (
    all_scenarios,
    evaluate,
    preference_pairs,
    pretrain,
    r1_zero,
    reject_sample,
    report,
    reward_model,
    sft,
)  # fmt: skip
from minir1 import cli, tasks
from minir1.device import peak_memory_gib, pick
from minir1.files import read_json
from minir1.log import Run, open_run, table
from minir1.metrics import with_interval
from minir1.rewards import language_consistency
from minir1.settings import at_least
from minir1.templates import encode
from minir1.tokenizer import Tokenizer, word_level

TESTED = ("base", "r1-zero", "sft-1", "rl-1", "sft-2", "rl-2")  # stages that make a policy
PLAIN = "rl-1-plain"  # RL 1 without its language reward
USUAL = {  # seconds on two cores, for the estimate of the time that is left
    "base": 500, "r1-zero": 400, "cold-start": 30, "sft-1": 25, "rl-1": 300, "general-data": 10, "rejection": 150,
    "sft-2": 120, PLAIN: 250, "pairs": 10, "reward-model": 20, "rl-2": 200, "test": 20, "general": 5,
}  # fmt: skip


def defaults(make: Callable, **values) -> Any:
    """A field with the settings of one stage."""
    return field(default_factory=lambda: make(**values))


@dataclass(frozen=True)
class Config:
    """The pipeline. --zero.steps and so on are settings of one stage; task, paths and seed are set here for all."""

    task: str = "world"  # one with a corpus to pre-train on
    general_task: str = "world:talk"  # whose verdicts have scores["preference"]
    base: pretrain.Config = defaults(pretrain.Config, steps=3000)
    zero: r1_zero.Config = defaults(r1_zero.Config, steps=60, learning_rate=2e-4)
    cold_start: reject_sample.Config = defaults(
        reject_sample.Config, problems=800, num_generations=4, per_problem=2,
        rewrite=True, min_language=0.99, max_repetition=0.02, tidy=True,
    )  # fmt: skip
    sft_1: sft.Config = defaults(sft.Config, epochs=3, learning_rate=2e-3)
    rl_1: r1_zero.Config = defaults(r1_zero.Config, steps=40, language_weight=0.2, epsilon_low=10.0, epsilon_high=10.0)
    general_data: reject_sample.Config = defaults(
        reject_sample.Config, num_generations=64, per_problem=8, rewrite=True, min_language=0.99, max_repetition=0.1
    )
    rejection: reject_sample.Config = defaults(
        reject_sample.Config, problems=4800, num_generations=4, per_problem=3,
        min_language=0.99, max_repetition=0.0, tidy=True,
    )  # fmt: skip
    sft_2: sft.Config = defaults(sft.Config, epochs=3, learning_rate=2e-3)
    pairs: preference_pairs.Config = defaults(preference_pairs.Config, num_generations=32, pairs=60, min_gap=0.1)
    reward_model: reward_model.Config = defaults(reward_model.Config, steps=90)
    rl_2: all_scenarios.Config = defaults(
        all_scenarios.Config, steps=40, preference_steps=10, learning_rate=1e-4, language_weight=0.2
    )
    ablation: bool = False  # also RL 1 without its language reward, for comparison; no stage continues from it
    max_completion_length: int = 320  # token budget of an answer, in all stages and in the test
    problems: int = 400  # of the test, at most
    num_generations: int = 4  # sampled answers per test problem
    seed: int = 0  # of all stages
    out: Path = Path("runs/r1")
    resume: bool = False
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    wandb: str = "off"

    def __post_init__(self):
        at_least(self, 1, "problems", "num_generations", "max_completion_length")
        at_least(self, 0, "seed")


class Stage(NamedTuple):
    """A script with its settings."""

    main: Callable
    settings: Any


def stages(config: Config) -> dict[str, Stage]:
    """What runs, in this order, by the name of its folder. ValueError for a setting that only the pipeline may make."""
    made_by = lambda name: config.out / name / "checkpoint"
    kept_by = lambda name: config.out / name / "kept.jsonl"
    reasoning, general = {"task": config.task}, {"task": config.general_task}
    pairs = {"pairs": config.out / "pairs" / "train.jsonl", "held_out": config.out / "pairs" / "held_out.jsonl"}
    make = lambda main, name, stage, **values: {name: Stage(main, made(config, name, stage, **values))}

    every = make(pretrain.main, "base", "base", **reasoning)
    every |= make(r1_zero.main, "r1-zero", "zero", **reasoning, checkpoint=made_by("base"))
    every |= make(reject_sample.main, "cold-start", "cold_start", **reasoning, checkpoint=made_by("r1-zero"))
    every |= make(sft.main, "sft-1", "sft_1", checkpoint=made_by("base"), data=(kept_by("cold-start"),))
    every |= make(r1_zero.main, "rl-1", "rl_1", **reasoning, checkpoint=made_by("sft-1"))
    every |= make(reject_sample.main, "general-data", "general_data", **general, checkpoint=made_by("base"))
    mixed_in = {"general": (kept_by("general-data"),)}
    every |= make(reject_sample.main, "rejection", "rejection", **reasoning, checkpoint=made_by("rl-1"), **mixed_in)
    every |= make(sft.main, "sft-2", "sft_2", checkpoint=made_by("base"), data=(kept_by("rejection"),))
    every |= make(preference_pairs.main, "pairs", "pairs", **general, checkpoint=made_by("sft-2"))
    every |= make(reward_model.main, "reward-model", "reward_model", checkpoint=made_by("sft-2"), **pairs)
    learned = {"general_task": config.general_task, "reward_model": made_by("reward-model")}
    every |= make(all_scenarios.main, "rl-2", "rl_2", **reasoning, checkpoint=made_by("sft-2"), **learned)
    if config.ablation:
        plain = replace(every["rl-1"].settings, language_weight=0.0, out=config.out / PLAIN)
        every[PLAIN] = Stage(r1_zero.main, plain)

    test = {name: getattr(config, name) for name in ("max_completion_length", "seed", "device", "dtype")}
    for name in tested(config):
        own = {"problems": config.problems, "num_generations": config.num_generations}
        own |= {"out": config.out / "test" / name}
        settings = evaluate.Config(**test, **own, **reasoning, checkpoint=made_by(name), resume=True)
        every[f"test/{name}"] = Stage(evaluate.main, settings)
    for name in TESTED:
        own = {"forced": False, "num_generations": 32, "out": config.out / "general" / name}
        settings = evaluate.Config(**test, **own, **general, checkpoint=made_by(name), resume=True)
        every[f"general/{name}"] = Stage(evaluate.main, settings)
    return every


def made(config: Config, name: str, stage: str, **values) -> Any:
    """The settings of one stage, with those that the pipeline makes: what it reads, where it writes, what all share.

    name: of its folder; stage: of its field in `config`. ValueError if the command line changed one of these.
    """
    own, default = getattr(config, stage), getattr(Config(), stage)
    shared = {"out": config.out / name, "resume": True}
    shared |= {key: getattr(config, key) for key in ("seed", "device", "dtype", "wandb", "max_completion_length")}
    values |= {key: value for key, value in shared.items() if hasattr(own, key)}
    for key in values:
        if getattr(own, key) != getattr(default, key):
            flag = f"--{stage}.{key}".replace("_", "-")
            raise ValueError(f"{flag}: r1.py sets it for every stage (or run the script by itself)")
    return replace(own, **values)


def tested(config: Config) -> list[str]:
    """The stages whose policies are tested."""
    return [*TESTED, PLAIN] if config.ablation else [*TESTED]


def done(stage: Stage) -> bool:
    """Whether its result.json is there, which each script writes last."""
    return (stage.settings.out / "result.json").exists()


def refuse_stale(every: dict[str, Stage]) -> None:
    """ValueError for a finished stage that would not be what these settings make.

    It reads the files of a stage that has to run again, or it was made with another number of steps (`open_run` refuses
    all other changes of settings).
    """
    again: dict[str, Path] = {}
    for name, stage in every.items():
        own = stage.settings
        if not done(stage):
            again[name] = own.out
            continue
        read = [path for value in vars(own).values() for path in (value if isinstance(value, tuple) else (value,))]
        read = [path for path in read if isinstance(path, Path) and path != own.out]
        if earlier := [made for made, folder in again.items() if any(path.is_relative_to(folder) for path in read)]:
            raise ValueError(
                f"stage {name} was made from {' and '.join(earlier)}, which is not there or not finished and would run "
                f"again: put it back, or delete {own.out} too"
            )
        if hasattr(own, "steps") and (own.out / "config.json").exists():
            steps = read_json(own.out / "config.json").get("steps")
            if steps != own.steps:
                raise ValueError(f"stage {name} is done with steps = {steps}, not {own.steps}: choose another --out")


def refuse_tasks(every: dict[str, Stage]) -> None:
    """ValueError for what a stage, perhaps the last, would refuse of its tasks."""
    tokenizer = word_level(*pretrain.task_of(every["base"].settings).vocabulary())
    for name, (_, own) in every.items():
        if hasattr(own, "task") and name != "base":
            refuse_task(name, own, own.task, getattr(own, "prompts", 0), tokenizer)
        if hasattr(own, "general_task"):
            refuse_task(name, own, own.general_task, own.general_prompts, tokenizer)


def refuse_task(name: str, own: Any, spec: str, prompts: int, tokenizer: Tokenizer) -> None:
    """As `refuse_tasks`, of one task of a stage. own: the stage's settings; prompts: how many a step trains on."""
    task, splits = tasks.load(spec), [getattr(own, key) for key in ("split", "eval_split") if hasattr(own, key)]
    asked = tasks.problems_of(task, splits if hasattr(own, "split") else ["train", *splits])
    if prompts > (count := len(task.problems("train"))):
        raise ValueError(f"stage {name}: {prompts} prompts of task {task.name}, which has {count} training problems")
    if getattr(own, "rewrite", False) and task.rewrite is None:
        raise ValueError(f"stage {name}: task {task.name} has no rewrite(problem, text): add --{name}.no-rewrite")
    encode(tokenizer, asked, own.template)
    if getattr(own, "min_language", 0) or getattr(own, "language_weight", 0):
        for language in {problem.language for problem in asked}:
            language_consistency("", language)  # refuses one without a known script


def run_stages(every: dict[str, Stage], run: Run) -> None:
    """Run what is not done, in order; the seconds of each stage go into the run's result.json.

    One that was killed continues.
    """
    for number, (name, stage) in enumerate(every.items(), start=1):
        settings = stage.settings
        if done(stage):
            print(f"stage {number} of {len(every)}, {name}: done before")
            continue
        left = time_left(list(every), name, seconds_of(run.out))
        print(f"\nstage {number} of {len(every)}, {name}" + (f"; about {left / 60:.0f} min left" if left else ""))
        began = time.perf_counter()
        stage.main(settings)
        own = read_json(settings.out / "result.json")
        own = [value for key, value in own.items() if key.partition("/")[0] == "seconds"]  # of a training that resumed
        run.result({f"seconds/{name}": max([time.perf_counter() - began, *own])})


def seconds_of(out: Path) -> dict[str, float]:
    """The seconds of each stage that ran so far."""
    stored = read_json(out / "result.json") if (out / "result.json").exists() else {}
    seconds = {key.removeprefix("seconds/"): x for key, x in stored.items() if key.startswith("seconds/")}
    return {name: x for name, x in seconds.items() if name != "total"}


def time_left(names: list[str], now: str, seconds: dict[str, float]) -> float:
    """Seconds from the stage `now` to the end, from those of the stages that ran before it; 0 where none did."""
    usual = sum(USUAL[name.partition("/")[0]] for name in seconds)
    left = sum(USUAL[name.partition("/")[0]] for name in names[names.index(now) :])
    return left * sum(seconds.values()) / usual if usual else 0.0


def main(config: Config) -> dict[str, float]:
    """Run all stages, write result.json and the report, print the table of stages."""
    every = stages(config)
    run = open_run(config.out, config, resume=config.resume, wandb="off")
    refuse_stale(every)
    refuse_tasks(every)  # before anything is trained
    run.start()
    run_stages(every, run)
    result = read_json(config.out / "result.json")
    for name in tested(config):
        for kind, folder in (("", "test"), ("general/", "general")):
            file = config.out / folder / name / "result.json"
            result |= {f"{name}/{kind}{key}": x for key, x in read_json(file).items()} if file.exists() else {}
    peak = max(peak_memory_gib(pick(config.device)), result.get("memory/peak_gib", 0.0))
    result |= {"seconds/total": sum(seconds_of(config.out).values()), "seed": config.seed, "memory/peak_gib": peak}
    run.result(result)
    show(result, tested(config))
    page = report.write(config.out)
    result |= read_json(config.out / "report.json")
    run.result(result)
    print(f"{result['seconds/total']:.0f} s, {result['memory/peak_gib']:.1f} GiB; see {page}")
    run.close()
    return result


COLUMNS = (("pass@1", "right"), ("format", "well-formed"), ("language_consistency", "in one language"),
           ("repetition", "repeated"), ("tidiness", "tidy"))  # fmt: skip


def show(result: dict[str, float], names: Sequence[str]) -> None:
    """Print what each of these stages gave, on problems that no stage has seen."""
    rows = []
    for name in names:
        interval = with_interval(*(result[f"{name}/pass@1{end}"] for end in ("", "_low", "_high")), ".1%")
        others = [f"{result[f'{name}/{key}']:.1%}" for key, _ in COLUMNS[1:]]
        general = result.get(f"{name}/general/preference")
        cells = [f"{result[f'{name}/length']:.0f}", "-" if general is None else f"{general:.2f}"]
        rows.append([name, interval, *others, *cells])
    table("test problems", ["", *(title for _, title in COLUMNS), "tokens", "general prompts"], rows)


if __name__ == "__main__":
    cli.run(main, Config)
