"""Plan a training run before it is started: memory, communication, arithmetic and seconds on each GPU.

    python -m experiments.plan qwen2.5-7b --gpus 8 --gpu h100 --recompute
    python -m experiments.plan Qwen2.5-0.5B --gpu rtx4090 --lora-rank 16 --prompts 16
    python -m experiments.plan qwen3-30b-a3b --gpus 16 --gpu h200 --recompute --out runs/plan.png

The model is a preset (minir1/model/presets.py), a config.json, or a folder with one. The figures of the GPUs are those
of minir1/gpus.py, the equations those of minir1/plan.py and memory.py. A run that cannot fit is refused, and each
setting that would make it fit is named with the memory that it then needs: every one of them is tried. Memory of the
host is printed, but not compared with that of a machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import plan_figure
from experiments.count import find, human
from minir1 import cli, plan
from minir1.gpus import GIB, GPUS, gpu
from minir1.log import table
from minir1.memory import peak
from minir1.plan import Job, copy_bytes, fits, host_bytes, memory_parts
from minir1.settings import above, at_least, new_file

SIZES = (1, 2, 4, *(8 << n for n in range(12)))  # numbers of GPUs that are tried


@dataclass(frozen=True)
class Config:
    """Plan one training step. The names are those of the training scripts."""

    model: Annotated[str, tyro.conf.Positional]  # name of a preset, config.json, or folder with one
    gpus: int = 1  # n, all processes together
    gpu: Literal[tuple(GPUS)] = "h100"
    kind: Literal[plan.KINDS] = "rl"
    prompts: int = 32  # P, problems per step; of sft and pretrain: rows of a batch
    num_generations: int = 8  # G, answers per problem
    prompt_length: int = 256  # tokens
    max_completion_length: int = 1024  # token budget of an answer; of sft and pretrain: tokens of a row
    mean_length: float | None = None  # tokens of an answer on average; None: every answer takes the whole budget
    microbatch: int = 8192  # most tokens of a forward pass
    lora_rank: int = 0  # r: train adapters only; 0: train all weights
    beta: float = 0.001  # β: above 0, RL keeps a reference policy, unless adapters are trained
    recompute: bool = False  # compute activations again in the backward pass
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    out: Path | None = None  # a PNG: the memory of a GPU by part

    def __post_init__(self):
        at_least(self, 1, "gpus", "prompts", "num_generations", "prompt_length", "max_completion_length", "microbatch")
        at_least(self, 0, "lora_rank", "beta")
        above(self, 0, "mean_length")
        if self.mean_length and self.mean_length > self.max_completion_length:
            allowed = f"at most max_completion_length = {self.max_completion_length}"
            raise ValueError(f"mean_length = {self.mean_length}: {allowed}")
        new_file(self, "out")


def job_of(config: Config) -> Job:
    """The step that is planned."""
    sampled = config.kind == "rl"
    return Job(
        find(config.model), gpu(config.gpu), config.gpus, config.kind,
        rows=config.prompts * (config.num_generations if sampled else 1),
        answers=config.num_generations if sampled else 1,
        prompt=config.prompt_length if sampled else 0,
        completion=config.max_completion_length,
        mean=config.mean_length,
        microbatch=config.microbatch,
        dtype=config.dtype,
        lora_rank=config.lora_rank,
        recompute=config.recompute,
        reference=config.beta > 0,
    )  # fmt: skip


def changes(job: Job) -> Iterator[tuple[str, Job]]:
    """(option, the job with it) of every setting that lowers the memory, by itself or, at the end, all together."""
    shortest = job.prompt + job.completion
    saving = {"recompute": True, "microbatch": min(job.microbatch, shortest)}
    if not job.recompute:
        yield "--recompute", replace(job, recompute=True)
    if job.microbatch > shortest:
        yield f"--microbatch {shortest}", replace(job, microbatch=shortest)
    if job.kind == "rl" and job.reference and not job.lora_rank:
        yield "--beta 0", replace(job, reference=False)
    if not job.lora_rank:
        yield "--lora-rank 16", replace(job, lora_rank=16)
        yield "--lora-rank 16 --recompute", replace(job, lora_rank=16, recompute=True)
    fewer = [(job.rows // job.answers >> n) * job.answers for n in range(1, 12) if job.kind == "rl"]
    if found := next(filter(fits, (replace(job, rows=n) for n in fewer if n >= job.gpus * job.answers)), None):
        yield f"--prompts {found.rows // found.answers}", found
    for options, more in (("", {}), (f" --recompute --microbatch {saving['microbatch']}", saving)):
        if larger := next(filter(fits, on_more(job, **more)), None):
            rows = f" --prompts {larger.rows // larger.answers}" if larger.rows != job.rows else ""
            yield f"--gpus {larger.gpus}{rows}{options}", larger


def on_more(job: Job, **more) -> Iterator[Job]:
    """The job on more and more GPUs, with a prompt for each at least."""
    for gpus in (n for n in SIZES if n > job.gpus):
        yield replace(job, gpus=gpus, rows=max(job.rows, gpus * job.answers), **more)


def ways_to_fit(job: Job) -> list[tuple[str, float]]:
    """(options, GiB at the peak) of each of the `changes` with which the job fits."""
    tried = ((options, changed) for options, changed in changes(job))
    return [(options, peak(memory_parts(changed)) / GIB) for options, changed in tried if fits(changed)]


# ---- what is printed -----------------------------------------------------------------------------


def show(name: str, job: Job) -> None:
    """Three tables: memory of a GPU, seconds of the step with their causes, and the bytes exchanged."""
    parts, usable = memory_parts(job), plan.USABLE * job.gpu.memory
    bar = lambda n: "█" * (length := min(40, round(40 * n / max(usable, peak(parts))))) + "·" * (40 - length)
    when = {part: phase for phase, names in plan_figure.phases(job).items() for part in names}
    rows = [
        [part, f"{n / GIB:.2f}", when.get(part, "always"), bar(n)]
        for part, n in sorted(parts.items(), key=lambda item: -item[1])
        if n
    ]
    rows.append(["peak", f"{peak(parts) / GIB:.2f}", f"of {usable / GIB:.1f}", bar(peak(parts))])
    other = peak(memory_parts(replace(job, recompute=not job.recompute)))
    rows.append([f"peak {'without' if job.recompute else 'with'} --recompute", f"{other / GIB:.2f}", "", bar(other)])
    table(f"memory of one GPU: {name}, {job.gpus} GPUs", ["", "GiB", "in memory while", ""], rows)
    least, likely = plan.seconds(job), plan.seconds(job, realistic=True)
    if host := host_bytes(job):
        ranks = min(job.gpus, job.gpu.node)
        print(f"memory of a node: {host / GIB:.0f} GiB, as each of {ranks} ranks reads the whole model in fp32 first")
    rows = [[part, f"{least[part]:.3g}", f"{likely[part]:.3g}"] for part in least]
    rows.append(["step", f"{sum(least.values()):.3g}", f"{sum(likely.values()):.3g}"])
    table("seconds", ["", "lower bound", "realistic"], rows)
    rows = [[f"{part}, all GPUs", human(n, "FLOP")] for part, n in plan.flops(job).items() if n]
    rows += [[f"{part}, received by a GPU", human(n, "B")] for part, n in plan.traffic(job).items() if n]
    table("work of a step", ["", ""], rows)


def refusal(name: str, job: Job) -> str:
    """Why the job cannot run, and with which settings it could."""
    need, usable = peak(memory_parts(job)) / GIB, plan.USABLE * job.gpu.memory / GIB
    copy = copy_bytes(replace(job, gpus=2, rows=2 * job.answers)) / GIB
    if copy > usable:
        larger = [name for name, one in GPUS.items() if plan.USABLE * one.memory / GIB > copy]
        text = f"{name} fits on no number of these GPUs: to sample, to validate and to save, each needs a copy of all "
        text += f"weights, {copy:,.0f} GiB, and inference over several GPUs is not in minir1; "
        return text + (f"larger GPUs are {', '.join(larger)}" if larger else "no GPU has as much memory")
    ways = [f"{options} ({gib:.1f} GiB)" for options, gib in ways_to_fit(job)]
    text = f"{name} needs {need:.1f} GiB on each of {job.gpus} GPUs, of which {usable:.1f} GiB are usable"
    return f"{text}; it fits with {', or '.join(ways)}" if ways else f"{text}; none of the settings tried makes it fit"


def main(config: Config) -> dict[str, float]:
    """Print the plan; returns GiB at the peak, and the seconds of a step. ValueError for what cannot fit."""
    job = job_of(config)
    show(config.model, job)
    if config.out:
        plan_figure.draw(config.model, job, config.out)
    if not fits(job):
        raise ValueError(refusal(config.model, job))
    least, likely = (sum(plan.seconds(job, realistic).values()) for realistic in (False, True))
    sizes = {"memory/peak_gib": peak(memory_parts(job)) / GIB, "memory/host_gib": host_bytes(job) / GIB}
    return sizes | {"seconds/least": least, "seconds/realistic": likely}


if __name__ == "__main__":
    cli.run(main, Config)
