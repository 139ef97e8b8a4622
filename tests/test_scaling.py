"""tools/scaling.py and docs/scaling.md: every command has the plan that the page prints; published runs."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

from experiments import plan as command
from experiments.tools import scaling
from minir1.gpus import GIB
from minir1.memory import peak
from minir1.plan import USABLE, fits, host_bytes, memory_parts, seconds

PAGE = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
every_scale = pytest.mark.parametrize("scale", scaling.SCALES, ids=lambda scale: f"{scale.gpus} {scale.model}")


@every_scale
def test_the_row_on_the_page_is_what_the_planner_gives(scale):
    job = scaling.job_of(scale)
    assert fits(job) and job.gpus == scale.gpus
    assert f"| {' | '.join(scaling.scale_row(scale))} |" in PAGE.splitlines()
    assert scale.command in PAGE.splitlines() and "\n" not in scale.command
    assert float(scaling.scale_row(scale)[3]) == pytest.approx(peak(memory_parts(job)) / GIB, abs=0.06)
    assert scaling.scale_row(scale)[5] == (f"{host_bytes(job) / GIB:.0f}" if scale.gpus > 1 else "")


@every_scale
def test_the_command_starts_as_many_processes_as_are_planned(scale):
    words = shlex.split(scale.command)
    if scale.gpus == 1:
        assert words[0] == "python"
    else:
        each = int(words[words.index("--nproc-per-node") + 1])
        assert scale.gpus % each == 0 and ("srun" in words) == (scale.gpus > each)


@every_scale
def test_the_script_understands_the_command(scale):
    words = shlex.split(scale.command)
    module, *words = words[words.index("-m") + 1 :]
    config = importlib.import_module(module).Config
    chosen = vars(tyro.cli(config, args=words))
    planned = scaling.options(scale)
    paths = [name for name, value in chosen.items() if isinstance(value, (Path, tuple))]
    assert {**planned, **{name: chosen[name] for name in paths}} == {**planned, **chosen}
    assert planned["microbatch"] == scaling.job_of(scale).microbatch


def test_the_options_of_the_command_are_those_of_the_plan():
    scale = scaling.SCALES[0]._replace(command="python -m experiments.r1_zero --prompts 6 --num-generations 5 --beta 0")
    job = scaling.job_of(scale)
    assert (job.rows, job.answers, job.reference, job.dtype) == (30, 5, False, "float32")
    tuned = scale._replace(command="torchrun -m experiments.sft --batch 24 --max-length 99 --lora-rank 2", gpu="h100")
    job = scaling.job_of(tuned)
    assert (job.kind, job.rows, job.completion, job.lora_rank, job.prompt) == ("sft", 24, 99, 2, 0)


def test_a_scale_that_cannot_fit_is_refused(monkeypatch):
    large = scaling.SCALES[0]._replace(model="qwen2.5-7b", gpu="rtx3090")
    monkeypatch.setattr(scaling, "SCALES", [large])
    with pytest.raises(ValueError, match="qwen2.5-7b needs"):
        scaling.page_scales()


def test_the_refusals_on_the_page_are_what_the_planner_says():
    lines = re.findall(r"^python -m experiments.plan .*$", PAGE, re.M)
    configs = [tyro.cli(command.Config, args=shlex.split(line)[3:]) for line in lines]
    refused = [config for config in configs if not fits(command.job_of(config))]
    assert {config.model for config in refused} == {"qwen2.5-7b", "deepseek-v3"}
    for config in refused:
        assert scaling.refused(config) in PAGE
    with pytest.raises(ValueError, match="minir1 fits"):
        scaling.refused(command.Config("minir1"))


# ---- published runs ------------------------------------------------------------------------------


def test_the_utilisation_of_v3_is_the_one_that_deepseek_measured():
    assert scaling.v3_utilisation() == pytest.approx(scaling.V3_MFU, abs=0.002)
    a_day = scaling.V3_TOKENS / scaling.V3_HOURS * 24 * scaling.V3_GPUS
    assert a_day == pytest.approx(scaling.V3_TOKENS_A_DAY, rel=0.002)
    assert scaling.ZERO_GPUS * scaling.ZERO_HOURS == pytest.approx(101_000, rel=0.005)  # table 7 of the R1 paper


@pytest.mark.parametrize("run", scaling.RUNS, ids=lambda run: run.name)
def test_no_published_run_is_faster_than_the_bound(run):
    job = scaling.run_job(run)
    least, likely = (sum(seconds(job, realistic).values()) for realistic in (False, True))
    assert 0.02 * run.seconds < least < likely < 1.1 * run.seconds
    assert memory_parts(job)["weights"] < USABLE * job.gpu.memory
