"""experiments/tools/kill_everywhere.py: a sample of its kills, and that it finds what is left over or differs."""

import json
from pathlib import Path

import pytest
import torch
from runs import command

from experiments.tools import kill_everywhere, kill_trainings
from minir1 import checkpoint

DAMAGE = {
    "left over": "checkpoint._clean = lambda folder: None",
    "differs": "real = log.replace_text; log.replace_text = lambda path, text: real(path, text.replace('5', '4'))",
    "fails": "checkpoint.resume = lambda folder: 1 / 0",
}


def tool(script: str, out, *words):
    """Run the tool as a user does, and return the process and the numbers of its table."""
    done = command("-m", "experiments.tools.kill_everywhere", "--script", script, "--out", out, *words)
    return done, [int(word) for word in done.stdout.splitlines()[-1].split()[1:]]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The folder of the tool, which has killed a run that only saves; its process and numbers."""
    out = tmp_path_factory.mktemp("bare") / "out"
    return out, *tool("bare", out, "--every", 5, "--double", 10)


@pytest.mark.parametrize("script, every, least", [("bare", 5, 35), ("pretrain", 60, 2), ("lora", 70, 2)])
def test_killed_runs_resume_to_the_same_bits(bare, tmp_path, script, every, least):
    _, done, numbers = bare if script == "bare" else (None, *tool(script, tmp_path / "out", "--every", every))
    events, killed, equal, *others = numbers
    assert done.returncode == 0, done.stdout + done.stderr
    assert events > 100 and killed == equal >= least and others == [0, 0, 0]


def test_every_script_that_saves_checkpoints_can_be_killed():
    root = Path(kill_everywhere.__file__).parent.parent
    saving = {path.stem for path in root.glob("*.py") if "checkpoint.save(" in path.read_text(encoding="utf-8")}
    assert len(saving) >= 11 and saving <= {*kill_trainings.SCRIPTS}


def test_the_events_are_those_of_a_checkpoint_and_the_logs(bare):
    events = json.loads((bare[0] / "events.json").read_text())
    for name in (
        *("write metrics.jsonl", "write samples.jsonl", "os.rename config.json.tmp", "os.rename result.json.tmp"),
        *("os.rename checkpoint/latest.tmp", "os.rename checkpoint/best.tmp", "os.rename checkpoint/step-000002"),
        *("os.remove model.safetensors", "os.rmdir checkpoint/step-000002.tmp-deleted", "fsync ."),
    ):
        assert name in events, name
    assert any(event.startswith("half of checkpoint/step-000002.tmp-") for event in events)


@pytest.mark.parametrize("end", DAMAGE)
def test_a_fault_is_found(tmp_path, end):
    code = (
        "import pathlib, sys\nfrom experiments.tools import kill_everywhere\nfrom minir1 import checkpoint, log\n"
        f"{DAMAGE[end]}\n"
        "kill_everywhere.main(kill_everywhere.Config('bare', every=25, out=pathlib.Path(sys.argv[1])))\n"
    )
    done = command("-c", code, tmp_path / "out")
    assert done.returncode == 1 and f": {end}: " in done.stdout, done.stdout + done.stderr


def test_only_the_clock_may_differ(tmp_path):
    rows = [{"step": 1, "train/a": 1.0, "time/b_s": 2.0, "perf/c": 3.0}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert kill_everywhere.content(path, tmp_path) == [{"step": 1, "train/a": 1.0}]
    write = lambda folder: (folder / "model.safetensors").write_bytes(b"w")
    states = []
    for seconds, weight in ((1.0, 0.5), (2.0, 0.5), (1.0, -0.5)):
        state = {"step": 1, "seconds": seconds, "w": torch.tensor(weight), "bf16": torch.ones(2, dtype=torch.bfloat16)}
        file = checkpoint.save(tmp_path / "checkpoint", 1, write, state) / checkpoint.STATE
        states.append(kill_everywhere.content(file, tmp_path))
    assert states[0] == states[1] != states[2]
