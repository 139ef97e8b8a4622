"""What will a run take, and what is wrong with it? Before it starts by one measured step, afterwards from its metrics.

    python -m experiments.doctor --checkpoint runs/base/checkpoint --task countdown --prompts 32
    python -m experiments.doctor runs/demo/rl/config.json
    python -m experiments.doctor runs/demo/rl

The first takes the options of r1_zero.py, and the second reads them from a file: answers of the checkpoint are sampled,
then one step is run without moving a weight. So it knows memory and time, how many answers are truncated and how many
groups are mixed, whether another template suits the checkpoint better, and whether the verifier accepts the references.
The third reads the metrics of a run, also of one that has not ended. In each case minir1/diagnosis.py names what is
wrong; docs/gallery.md shows an example of every finding. The first two also say "no signal" where the preflight of the
run would refuse to start.

Answers grow longer in training, so the time is also given for answers that all use the whole token budget. Of another
script's config.json the fields are read that r1_zero.py has: the time is that of GRPO.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, get_type_hints

import tyro
from typeguard import TypeCheckError, check_type

from experiments import r1_zero
from minir1 import cli, memory, policy, tasks
from minir1.advantages import group_advantages
from minir1.device import free_memory_gib, peak_memory_gib, pick, pick_dtype
from minir1.diagnosis import Finding, accuracy_key, diagnose, no_signal, values
from minir1.files import plain, read_json
from minir1.judge import judge, judge_rollout
from minir1.log import read_metrics, run_holding, table
from minir1.model.transformer import Transformer
from minir1.monitor import Clock, outlook, report
from minir1.optim import adamw
from minir1.policy import load_policy, on_policy_check, reference_logprobs, reference_of
from minir1.seed import python_random
from minir1.templates import TEMPLATES, encode
from minir1.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """What is examined: a run, a config.json, or the options of a run that was not started."""

    run: Annotated[Path | None, tyro.conf.Positional] = None  # the folder of a run, or a config.json
    rl: tyro.conf.OmitArgPrefixes[r1_zero.Config] = field(default_factory=r1_zero.Config)  # its options, without --rl


def options_of(path: Path) -> r1_zero.Config:
    """The options of r1_zero.py in a config.json. ValueError if it has no checkpoint, or an option is refused."""
    stored, options = read_json(path), {}
    if "checkpoint" not in stored:
        raise ValueError(f"{path} is not the config.json of a training with a --checkpoint")
    for name, kind in get_type_hints(r1_zero.Config).items():
        if name in stored:
            value = tuple(stored[name]) if isinstance(stored[name], list) else stored[name]
            options[name] = Path(value) if kind is Path and isinstance(value, str) else value
            try:
                check_type(options[name], kind)
            except TypeCheckError as error:
                raise ValueError(f"{path}: {name} = {stored[name]!r}: {error}") from error
    try:
        return r1_zero.Config(**options)
    except ValueError as error:
        raise ValueError(f"{path}, with the limits of r1_zero.py: {error}") from error


# ---- before a run ------------------------------------------------------------------------------


def probed(
    model: Transformer, tokenizer: Tokenizer, task: tasks.Task, problems: list[tasks.Problem], config: r1_zero.Config
) -> dict[str, float]:
    """preflight/…: `outlook` of G sampled answers per problem, as the preflight of a run measures it; the format with
    every other template, of the first 16 problems; accepted references."""
    result = {}
    for template in TEMPLATES:
        try:
            encode(tokenizer, problems[:1], template)
        except ValueError:
            if template == config.template:
                raise
            continue  # the tokenizer cannot render this one
        asked, some = replace(config, template=template), problems if template == config.template else problems[:16]
        found = outlook(r1_zero.sample(model, tokenizer, task, some, asked, config.num_generations, template))
        result |= {f"format_{template}": found["format"]} | (found if template == config.template else {})
    result |= accepted(task, problems)
    return {f"preflight/{name}": value for name, value in result.items()}


def accepted(task: tasks.Task, problems: list[tasks.Problem]) -> dict[str, float]:
    """The share of the problems' references that the verifier accepts as an answer; nothing if it judged none.

    Of a mixture those tasks count of which it accepts any: the references of the others have another form.
    """
    asked = [(p, f"<think>.</think><answer>{p.reference}</answer>") for p in problems if p.reference]
    of_task: dict[str, list[bool]] = {}
    for (problem, _), verdict in zip(asked, judge(task, asked)):
        if verdict.status != "unjudged":
            of_task.setdefault(problem.task, []).append(verdict.status == "right")
    counted = [right for found in of_task.values() if any(found) for right in found]
    return {"references": sum(counted) / max(1, len(counted))} if of_task else {}


def predict(config: r1_zero.Config) -> list[dict[str, float]]:
    """Rows as a run would log them: what is measured before it, with memory/ and seconds/ of the run, and one step."""
    device = pick(config.device)
    task = tasks.load(config.task, config.data, allow_code=config.allow_code)
    train, held_out = task.problems("train"), tasks.spread(task.problems(config.eval_split), config.eval_problems)
    if config.prompts > len(train):
        raise ValueError(f"prompts = {config.prompts}: the task has {len(train)} training problems")
    opening = {"lora_rank": config.lora_rank, "lora_alpha": config.lora_alpha, "recompute": config.recompute}
    start, dtype = policy.origin(config.checkpoint, None), pick_dtype(config.dtype, device)
    model, tokenizer, _ = load_policy(start, device, dtype, **opening)
    reference = reference_of(model) if config.beta else model
    longest = config.max_completion_length + max(map(len, encode(tokenizer, [*held_out, *train], config.template)))
    shape = {"microbatch": config.microbatch, "rows": config.prompts * config.num_generations, "length": longest}
    shape |= {"reference": reference is not model, "recompute": config.recompute}
    first = {"memory/predicted_gib": memory.peak(memory.step_memory(model, **shape)) / 2**30}
    if (free := free_memory_gib(device)) is not None:
        first["memory/free_gib"] = free
    asked = python_random(config.seed, 0).sample(train, min(64, 4 * config.prompts, len(train)))  # as r1_zero.py asks
    first |= probed(model, tokenizer, task, asked, config)

    clock, problems = Clock(device), python_random(config.seed, 1).sample(train, config.prompts)
    rollout = r1_zero.act(model, tokenizer, problems, config, 1)
    clock.lap("rollout")
    metrics = on_policy_check(model, rollout, config.microbatch, most=math.inf)
    ref_logp = reference_logprobs(reference, rollout, config.microbatch) if config.beta else None
    clock.lap("reference")
    answers = judge_rollout(rollout, tokenizer, task, problems, config.template, config.forced)
    rewards = r1_zero.reward(answers, config)
    clock.lap("judge")
    advantage, frozen = group_advantages(rewards).flatten().to(device), adamw(model.parameters(), 0.0)
    metrics |= r1_zero.learn(model, frozen, rollout, advantage, ref_logp, config, 1)
    clock.lap("update")
    metrics |= report(task, problems, rollout, answers, rewards) | clock.speeds(rollout, config.epochs)
    first |= seconds(config, metrics, len(train), len(held_out)) | {"memory/peak_gib": peak_memory_gib(device)}
    return [{"step": 0} | first, {"step": 1} | metrics]


def seconds(config: r1_zero.Config, step: dict[str, float], train: int, held_out: int) -> dict[str, float]:
    """seconds/step; seconds/run, with the preflight, the validations and what a difficulty window measures, if answers
    keep their length; and seconds/run_at_budget, if all use the whole budget. step: the metrics of a measured step."""
    each = sum(step[f"time/{name}_s"] for name in ("rollout", "reference", "judge", "update"))
    validations = 1 + math.ceil(config.steps / config.eval_every)
    before = (min(64, 4 * config.prompts, train) + train * bool(config.difficulty_window)) * config.num_generations
    sampled = before + validations * held_out * config.eval_answers
    whole = config.steps * each + sampled * step["train/length"] / step["perf/rollout_tok_s"]
    longer = config.max_completion_length / max(1.0, step["train/length"])
    return {"seconds/step": each, "seconds/run": whole, "seconds/run_at_budget": whole * longer}


def duration(value: float) -> str:
    """7.5 s, 12 min, 3.4 h"""
    return f"{value:.3g} s" if value < 100 else f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"


def show_prediction(first: dict[str, float], config: r1_zero.Config) -> None:
    """The table of what a run will take."""
    formats = {name: first[f"preflight/format_{name}"] for name in TEMPLATES if f"preflight/format_{name}" in first}
    G, process = config.num_generations, pick(config.device).type != "cuda"
    rows = [
        ["memory of tensors, predicted at the peak", f"{first['memory/predicted_gib']:.3g} GiB"],
        [f"memory, peak so far{', Python and torch included' * process}", f"{first['memory/peak_gib']:.3g} GiB"],
        ["time of a step", duration(first["seconds/step"])],
        [f"time of {config.steps} steps, answers as long as now", duration(first["seconds/run"])],
        ["the same, every answer uses the whole budget", duration(first["seconds/run_at_budget"])],
        ["pass@1", f"{first['preflight/pass@1']:.1%}"],
        [f"pass@{G}", f"{first[f'preflight/pass@{G}']:.1%}"],
        ["mixed groups", f"{first['preflight/mixed_groups']:.1%}"],
        ["truncated answers", f"{first['preflight/truncated']:.1%}"],
        *([f"well formed with --template {name}", f"{share:.1%}"] for name, share in formats.items()),
    ]
    if "preflight/references" in first:
        rows.append(["references accepted in <answer> tags", f"{first['preflight/references']:.1%}"])
    if "memory/free_gib" in first:
        rows.insert(1, ["memory, free", f"{first['memory/free_gib']:.3g} GiB"])
    table(f"a run of {config.task}, before it starts", ["", ""], rows)


# ---- findings ----------------------------------------------------------------------------------


def show_findings(findings: list[Finding], what: str) -> None:
    """A line per finding, or that there is none."""
    for finding in findings:
        print(f"{finding.name}: {finding.evidence}\n    {finding.advice}")
    if not findings:
        print(f"{what}: none of the known failures")


def main(config: Config) -> list[Finding]:
    """Examine, print and return the findings."""
    if config.run is not None and not config.run.exists():
        raise ValueError(f"run = {config.run} does not exist: the folder of a run, or a config.json")
    if config.run is not None and config.rl != r1_zero.Config():
        raise ValueError(f"run = {config.run}: its options are those of its config.json, and no others can be given")
    if config.run is not None and config.run.is_dir():
        run = run_holding(config.run, "metrics.jsonl")
        rows, settings = read_metrics(run), read_json(run / "config.json")
        try:
            findings = diagnose(rows, settings)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{run}: a metric or an option has a value of the wrong type: {error}") from error
        show_findings(findings, str(run))
        key = accuracy_key(settings)
        if (steps := len(values(rows, key))) < 8:
            print(f"{key} is there for {steps} steps: what goes wrong in the course of a run shows from 8 on")
        return findings
    rl = config.rl if config.run is None else options_of(config.run)
    rows = predict(rl)
    show_prediction(rows[0], rl)
    measured = {key.partition("/")[2]: value for key, value in rows[0].items() if key.startswith("preflight/")}
    findings = diagnose(rows, plain(vars(rl)))
    if refused := no_signal(measured, rl.min_mixed):
        findings = [refused, *findings]
    show_findings(findings, "before the run")
    return findings


if __name__ == "__main__":
    cli.run(main, Config)
