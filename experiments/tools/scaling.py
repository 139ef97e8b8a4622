"""The generated parts of docs/scaling.md: a command for each scale with its plan, and published runs against the plan.

The plan of a scale is read from its command, by the options of the script that it starts, so that the two agree.
"""

from __future__ import annotations

import importlib
import shlex
from dataclasses import fields
from functools import partial
from typing import NamedTuple

from experiments import plan as command
from minir1.gpus import GIB, gpu
from minir1.log import markdown_table
from minir1.memory import peak
from minir1.model.count import train_flops
from minir1.model.presets import PRESETS
from minir1.plan import USABLE, Job, fits, host_bytes, memory_parts, seconds, utilisation

RL = "-m experiments.r1_zero --task gsm8k --data gsm8k --template r1_zero --learning-rate 1e-6"
BASE = "--checkpoint Qwen2.5"
EIGHT = "torchrun --nproc-per-node 8"
NODES = "srun torchrun --nnodes $SLURM_NNODES --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint $HEAD:29500"
LONG = "--beta 0 --max-completion-length 8192 --num-generations 16 --microbatch 16384 --recompute"


class Scale(NamedTuple):
    """A machine, a model, and a command for them."""

    machine: str
    gpu: str
    gpus: int
    model: str  # a preset with the shape of the checkpoint
    command: str
    prompt: int = 256  # tokens of a prompt


SCALES = [
    Scale("laptop", "laptop", 1, "minir1",
          "python -m experiments.r1_zero --checkpoint runs/base/checkpoint --out runs/r1-zero", prompt=20),
    Scale("one 24 GB GPU", "rtx4090", 1, "qwen2.5-0.5b",
          f"python {RL} {BASE}-0.5B --prompts 16 --max-completion-length 512 --microbatch 4096 --out runs/rl-0.5b"),
    Scale("one 24 GB GPU", "rtx4090", 1, "qwen2.5-1.5b",
          f"python {RL} {BASE}-1.5B --prompts 16 --lora-rank 16 --recompute --out runs/rl-1.5b-lora"),
    Scale("one 24 GB GPU", "rtx4090", 1, "qwen2.5-7b",
          f"python {RL} {BASE}-7B --prompts 4 --lora-rank 16 --recompute --microbatch 2048 --out runs/rl-7b-lora"),
    Scale("one 80 GB GPU", "h100", 1, "qwen2.5-1.5b",
          f"python {RL} {BASE}-1.5B --max-completion-length 2048 --recompute --out runs/rl-1.5b"),
    Scale("one 80 GB GPU", "h100", 1, "qwen2.5-7b",
          f"python {RL} {BASE}-7B --max-completion-length 2048 --lora-rank 64 --recompute --out runs/rl-7b-lora"),
    Scale("8 × 24 GB", "rtx4090", 8, "qwen2.5-1.5b",
          f"{EIGHT} {RL} {BASE}-1.5B --max-completion-length 2048 --recompute --out runs/rl-1.5b-8"),
    Scale("8 × 80 GB", "h100", 8, "qwen2.5-7b",
          f"{EIGHT} {RL} {BASE}-7B --max-completion-length 4096 --prompts 64 --recompute --out runs/rl-7b"),
    Scale("8 × 80 GB", "h100", 8, "qwen2.5-7b",
          f"{EIGHT} -m experiments.sft {BASE}-7B --data chat.jsonl --learning-rate 1e-5 --max-length 4096 --batch 128 "
          "--recompute --out runs/sft-7b"),
    Scale("2 nodes of 8 × 141 GB", "h200", 16, "qwen3-30b-a3b",
          f"{NODES} {RL} --checkpoint Qwen3-30B-A3B-Base --prompts 32 {LONG} --out runs/rl-30b"),
    Scale("4 nodes of 8 × 141 GB", "h200", 32, "r1-distill-qwen-32b",
          f"{NODES} {RL} {BASE}-32B --prompts 32 {LONG} --out runs/rl-32b"),
]  # fmt: skip


def options(scale: Scale) -> dict:
    """The options of the script that the command starts, by name, with the script's defaults."""
    words = shlex.split(scale.command)
    script, *words = words[words.index("-m") + 1 :]
    chosen = dict(vars(importlib.import_module(script).Config()))
    for word, value in zip(words, [*words[1:], ""]):
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            kind = type(chosen[name])
            chosen[name] = True if kind is bool else kind(value) if kind in (int, float) else value
    return {"kind": "sft" if script.endswith(".sft") else "rl"} | chosen


def job_of(scale: Scale) -> Job:
    """The step that the command runs on each GPU."""
    chosen = options(scale)
    names = {field.name for field in fields(command.Config)} - {"out", "dtype"}
    settings = {name: value for name, value in chosen.items() if name in names}
    if chosen["kind"] == "sft":
        settings |= {"prompts": chosen["batch"], "max_completion_length": chosen["max_length"]}
    machine = {"model": scale.model, "gpu": scale.gpu, "gpus": scale.gpus, "prompt_length": scale.prompt}
    dtype = "float32" if scale.gpu == "laptop" else "bfloat16"
    return command.job_of(command.Config(**settings | machine, dtype=dtype))


HEAD = ["machine", "model", "trains", "GiB of a GPU", "usable", "host GiB", "seconds, bound", "seconds, realistic"]


def scale_row(scale: Scale) -> list[str]:
    """Memory and time of one scale, as the planner gives them."""
    job = job_of(scale)
    trains = f"adapters, r = {job.lora_rank}" if job.lora_rank else "all weights"
    trains += ", experts divided" if job.divided > 1 else ""
    need, usable = peak(memory_parts(job)) / GIB, USABLE * job.gpu.memory / GIB
    times = [sum(seconds(job, realistic).values()) for realistic in (False, True)]
    kind = "SFT" if job.kind == "sft" else "RL"
    row = [scale.machine, scale.model, f"{kind}: {trains}", f"{need:.1f}" if need >= 1 else f"{need:.2f}"]
    host = f"{host_bytes(job) / GIB:.0f}" if job.gpus > 1 else ""
    return [*row, f"{usable:.1f}", host, *(f"{time:.3g}" for time in times)]


def page_scales() -> str:
    """The table, and below it the commands in its order. ValueError if one of them cannot fit."""
    for scale in SCALES:
        if not fits(job_of(scale)):
            raise ValueError(command.refusal(scale.model, job_of(scale)))
    lines = [markdown_table(HEAD, [scale_row(scale) for scale in SCALES], words=3)]
    for machine in dict.fromkeys(scale.machine for scale in SCALES):
        lines += ["", f"{machine[0].upper()}{machine[1:]}:", "", "```"]
        lines += [scale.command for scale in SCALES if scale.machine == machine] + ["```"]
    return "\n".join(lines)


def refused(config: command.Config) -> str:
    """What `python -m experiments.plan` says at the end, as it stands on the page. ValueError for what fits."""
    job = command.job_of(config)
    if fits(job):
        raise ValueError(f"{config.model} fits")
    return f"```\nerror: {command.refusal(config.model, job)}\n```"


page_refused = partial(refused, command.Config("qwen2.5-7b", gpu="h100"))
page_too_large = partial(refused, command.Config("deepseek-v3", gpus=512, gpu="h200", prompts=512, recompute=True))


# ---- published runs ------------------------------------------------------------------------------

V3_TOKENS, V3_HOURS, V3_GPUS = 14.8e12, 2.664e6, 2048  # arXiv:2412.19437, table 1 and section 3.1
V3_MFU, V3_TOKENS_A_DAY = 0.3894, 272.80e9  # causal, of the peak in bf16: arXiv:2505.09343, table 4
ZERO_STEPS, ZERO_HOURS, ZERO_GPUS = 10_400, 198.0, 512  # 64·8 GPUs: arXiv:2501.12948v2, appendix B.4.4
ZERO_ROLLOUT, ZERO_STEPS_EACH = 8192, 16  # answers sampled at once, and the optimizer steps made with them


class Published(NamedTuple):
    """A published RL run, of which only some settings are known."""

    name: str
    model: str
    gpu: str
    gpus: int
    rows: int
    answers: int
    mean: float  # tokens of a row, or of an answer where the prompt's are not known, on average
    budget: int
    experts: int
    seconds: float  # of a rollout and its updates, as published
    source: str


RUNS = [
    Published("Llama 3.1 8B, GRPO", "llama-3.1-8b", "h100", 16, 2048, 32, 1060, 4096, 1, 97.7, "NeMo RL 0.4"),
    Published("Qwen3-30B-A3B, GRPO", "qwen3-30b-a3b", "h100", 32, 2048, 32, 3154, 4096, 8, 225.0, "NeMo RL 0.4"),
    Published("DeepSeek-R1-Zero", "deepseek-v3", "h800", ZERO_GPUS, ZERO_ROLLOUT, 16, 8000, 32_768, 64,
              ZERO_HOURS * 3600 * ZERO_STEPS_EACH / ZERO_STEPS, "arXiv:2501.12948v2, B.4.4"),
]  # fmt: skip


def run_job(run: Published) -> Job:
    """The step of a published run; a prompt of 1 token, as the lengths of prompts are not known."""
    shape = {"rows": run.rows, "answers": run.answers, "prompt": 1, "completion": run.budget, "mean": run.mean}
    return Job(PRESETS[run.model], gpu(run.gpu), run.gpus, **shape, recompute=True, experts=run.experts)


def v3_utilisation() -> float:
    """MFU of DeepSeek-V3's pre-training, from its tokens and GPU hours and the FLOPs of a token in rows of 4,096."""
    model = Job(PRESETS["deepseek-v3"], gpu("h800")).model
    return utilisation(V3_TOKENS * train_flops(model, 4096), gpu("h800"), V3_HOURS)


def page_v3() -> str:
    """What follows for V3's pre-training, beside what DeepSeek measured."""
    day = V3_TOKENS / V3_HOURS * 24 * V3_GPUS
    rows = [
        ["tokens per day", f"{day / 1e9:.1f}B", f"{V3_TOKENS_A_DAY / 1e9:.1f}B"],
        ["utilisation (MFU) of the peak in bf16", f"{v3_utilisation():.2%}", f"{V3_MFU:.2%}"],
    ]
    return markdown_table(["", "follows from 14.8T tokens in 2.664M GPU hours", "measured by DeepSeek"], rows)


def page_runs() -> str:
    """Seconds of a rollout and its updates: published, the lower bound, and what is called realistic, with shares."""
    rows = []
    for run in RUNS:
        least, likely = (sum(seconds(run_job(run), realistic).values()) for realistic in (False, True))
        cells = [run.name, f"{run.gpus} × {run.gpu.upper()}", run.source, f"{run.seconds:.1f}"]
        rows.append([*cells, *(text for t in (least, likely) for text in (f"{t:.1f}", f"{t / run.seconds:.0%}"))])
    head = ["", "GPUs", "source", "published, s", "bound, s", "share", "realistic, s", "share"]
    return markdown_table(head, rows, words=3)
