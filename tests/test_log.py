"""log.py: the run folder, its resumption, and the wandb copy read back."""

import errno
import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from minir1 import files, log


@dataclass(frozen=True)
class Config:
    lr: float = 1e-3
    steps: int = 10
    out: Path = Path("runs/x")
    resume: bool = False
    wandb: str = "off"
    microbatch: int = 4
    hidden: tuple[int, ...] = (8, 8)


@dataclass(frozen=True)
class Empty:
    pass


def test_a_run_is_a_folder(tmp_path):
    out = tmp_path / "runs" / "a"
    run = log.open_run(out, Config())
    assert not out.exists()
    run.start()
    run.log(0, {"train/reward": 0.25})
    run.log(1, {"train/reward": torch.tensor(0.5), "train/tries": np.float32(2), "train/n": np.int64(3)})
    run.samples(1, [{"text": "3×4=12 ☃", "right": True}, {"text": "?", "right": False}])
    run.result({"before/pass@1": 0.25})
    run.result({"after/pass@1": np.float64(0.5), "figure": Path("a.png")})
    run.close()
    run.close()
    assert json.loads((out / "config.json").read_text())["out"] == "runs/x"
    rows = [{"step": 0, "train/reward": 0.25}, {"step": 1, "train/reward": 0.5, "train/tries": 2.0, "train/n": 3}]
    assert log.read_metrics(out) == log.read_metrics(out / "metrics.jsonl") == rows
    lines = (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"step": 1, "text": "3×4=12 ☃", "right": True} and "☃" in lines[0]
    result = json.loads((out / "result.json").read_text())
    assert result == {"before/pass@1": 0.25, "after/pass@1": 0.5, "figure": "a.png"}
    assert not list(out.glob("*.tmp"))


def test_lines_are_there_before_the_run_is_closed_and_are_valid_json(tmp_path):
    run = log.open_run(tmp_path, Config()).start()
    run.log(3, {"train/loss": math.nan, "grad": -math.inf, "kl": torch.tensor(math.inf)})
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(name):
        raise AssertionError(name)

    row = json.loads(text, parse_constant=refuse)
    assert row == {"step": 3, "train/loss": None, "grad": None, "kl": None}


@pytest.mark.parametrize("metrics", [{"a": {"b": 1}}, {"a": torch.ones(2)}, {"a": "high"}, {"step": 1}])
def test_metrics_are_numbers_in_a_flat_dict(tmp_path, metrics):
    run = log.open_run(tmp_path, Config()).start()
    with pytest.raises(ValueError, match="flat dict|step"):
        run.log(0, metrics)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "samples.jsonl", "result.json", "checkpoint"])
def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("{}\n")
    with pytest.raises(ValueError, match="--resume.*--out") as error:
        log.open_run(tmp_path, Config())
    assert str(tmp_path) in str(error.value) and (tmp_path / name).read_text() == "{}\n"
    if name != "config.json":
        with pytest.raises(ValueError, match=f"holds no config.json: {name} is there: choose another --out"):
            log.open_run(tmp_path, Config(), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_resume_takes_the_same_config_only(tmp_path):
    log.open_run(tmp_path, Config()).start()
    other = Config(steps=99, out=Path("elsewhere"), resume=True, wandb="offline", microbatch=1)
    log.open_run(tmp_path, other, resume=True).start()
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 99
    with pytest.raises(ValueError) as error:
        log.open_run(tmp_path, Config(lr=0.5, hidden=(8,)), resume=True)
    assert "lr: 0.001 then, 0.5 now" in str(error.value)
    assert "hidden: [8, 8] then, [8] now" in str(error.value)
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 1e-3


def test_resume_names_new_and_vanished_fields(tmp_path):
    @dataclass
    class Other:
        lr: float = 1e-3
        clip: float = 0.2
        hidden: tuple[int, ...] = (8, 8)

    log.open_run(tmp_path, Config()).start()
    with pytest.raises(ValueError, match=r"clip: '\(absent\)' then, 0.2 now"):
        log.open_run(tmp_path, Other(), resume=True)


def test_resume_of_an_empty_or_missing_folder_starts(tmp_path):
    for out in (tmp_path, tmp_path / "new"):
        log.open_run(out, Config(), resume=True).start().log(0, {"a": 1.0})
        assert log.read_metrics(out) == [{"step": 0, "a": 1.0}]


def test_a_resumed_run_keeps_the_lines_up_to_the_step(tmp_path):
    run = log.open_run(tmp_path, Config()).start()
    for step in range(5):
        run.log(step, {"a": step / 3})
        run.samples(step, [{"text": f"{step}é"}] * 2)
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    run = log.open_run(tmp_path, Config(), resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before)
    run.start(2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:3])  # equal to the byte
    run.log(3, {"a": 1.0})
    assert log.read_metrics(tmp_path) == log._read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["a"] for row in log.read_metrics(tmp_path)] == [0, 1 / 3, 2 / 3, 1]
    assert [row["step"] for row in log._read_jsonl(tmp_path / "samples.jsonl")] == [0, 0, 1, 1, 2, 2]
    log.open_run(tmp_path, Config(), resume=True).start()
    assert log.read_metrics(tmp_path) == []


def test_a_line_torn_anywhere_is_dropped_and_does_not_swallow_the_next(tmp_path):
    whole, last = b'{"step": 0, "t": "a"}\n', '{"step": 1, "t": "é"}'.encode()
    log.open_run(tmp_path, Config()).start()
    for torn in [*(last[:length] for length in range(1, len(last))), b'{"step": 1, "t": "}']:
        (tmp_path / "metrics.jsonl").write_bytes(whole + torn)
        assert [row["step"] for row in log.read_metrics(tmp_path)] == [0]
        log.open_run(tmp_path, Config(), resume=True).start(0).log(2, {})
        assert [row["step"] for row in log.read_metrics(tmp_path)] == [0, 2]
    (tmp_path / "metrics.jsonl").write_bytes(whole + last)  # only the newline is missing
    log.open_run(tmp_path, Config(), resume=True).start(1).log(2, {})
    assert [row["step"] for row in log.read_metrics(tmp_path)] == [0, 1, 2]


def test_a_damaged_line_in_the_middle_is_an_error_naming_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        log.read_metrics(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        log.read_metrics(tmp_path / "nowhere")


@pytest.mark.parametrize("line", ['{"a": 1.0}', '{"step": "2"}', '{"step": null}', "[2]", "3"])
@pytest.mark.parametrize("name", log.LOGS)
def test_a_line_without_a_step_is_an_error_naming_it(tmp_path, name, line):
    log.open_run(tmp_path, Config()).start().close()
    config = (tmp_path / "config.json").read_bytes()
    (tmp_path / name).write_text('{"step": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"{name}, line 2 is no object with a step, a whole number") as error:
        log.open_run(tmp_path, Config(steps=11), resume=True).start(0)
    assert str(tmp_path) in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == config and (tmp_path / name).read_text().endswith(line + "\n")


@pytest.mark.parametrize("lines", [None, 0, 1, 2])
def test_metrics_that_do_not_reach_to_the_checkpoint_are_refused(tmp_path, lines):
    run = log.open_run(tmp_path, Config()).start()
    for step in range(4):
        run.log(step, {"a": 1.0})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.unlink()
    if lines is not None:
        path.write_text("".join(whole[:lines]))
    with pytest.raises(ValueError, match="metrics.jsonl lacks step 2, from which the run resumes: put the file back"):
        log.open_run(tmp_path, Config(), resume=True).start(2)
    path.write_text("".join(whole[:3]))
    log.open_run(tmp_path, Config(), resume=True).start(2)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe"], ids=str)
@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, content):
    log.open_run(tmp_path, Config()).start().result({"a": 1.0})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged|holds no object") as error:
        log.open_run(tmp_path, Config(), resume=True)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


HOLDER = """
import dataclasses, pathlib, sys, time, minir1.log as log
run = log.open_run(pathlib.Path(sys.argv[1]), dataclasses.make_dataclass("C", [])(), resume=sys.argv[2] == "resume")
run.start()
print("ready", flush=True), sys.stdin.read()
"""


def hold(out: Path, how: str) -> subprocess.Popen:
    """A process that has a run open until it is killed or its standard input is closed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(out), how], **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def test_only_one_process_writes_to_a_folder(tmp_path):
    pytest.importorskip("fcntl")
    out = tmp_path / "run"
    early = log.open_run(out, Empty())  # before there was anything to lock
    other = hold(out, "start")
    refusal = f"^{out} is in use by another process: wait for it, or choose another --out$"
    before = {path: path.read_bytes() for path in out.iterdir()}
    for begin in (lambda: log.open_run(out, Empty(), resume=True), early.start):
        with pytest.raises(ValueError, match=refusal):
            begin()
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    other.kill()
    other.wait()
    run = log.open_run(out, Empty(), resume=True).start()
    assert log.open_run(out, Empty(), resume=True).lock  # the same process, as in a notebook after an error
    run.close()
    other = hold(out, "resume")
    with pytest.raises(ValueError, match=refusal):
        log.open_run(out, Empty(), resume=True)
    other.communicate("")
    log.open_run(out, Empty(), resume=True).start().close()


def test_a_run_that_has_come_and_gone_since_the_check_is_not_overwritten(tmp_path):
    early = log.open_run(tmp_path, Empty())
    log.open_run(tmp_path, Empty()).start().close()
    for begin in (early.start, lambda: log.open_run(tmp_path, Empty())):  # no field `resume`, so no such option
        with pytest.raises(ValueError, match=f"^{tmp_path} already holds a run: choose another --out$"):
            begin()
    with pytest.raises(ValueError, match=f"^{tmp_path} already holds a run: continue it with --resume, or choose"):
        log.open_run(tmp_path, Config())


def test_a_child_of_a_killed_process_does_not_hold_its_folder(tmp_path):
    """As a verifier in a process of its own would by flock."""
    pytest.importorskip("fcntl")
    code = (
        "import dataclasses, os, pathlib, signal, sys, time, minir1.log as log\n"
        "log.open_run(pathlib.Path(sys.argv[1]), dataclasses.make_dataclass('C', [])()).start()\n"
        "child = os.fork()\n"
        "if not child:\n    os.close(1); os.close(2); time.sleep(60)\n"
        "print(child, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        log.open_run(tmp_path, Empty(), resume=True).start().close()
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


def test_without_locks_a_run_is_not_refused(tmp_path, monkeypatch):
    """On Windows there is no fcntl; a file system may have no locks."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    log.open_run(tmp_path, Config()).start().close()
    monkeypatch.undo()
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    log.open_run(tmp_path, Config(), resume=True).start().close()


def test_unknown_wandb_mode(tmp_path):
    with pytest.raises(ValueError, match="'on'; allowed are off, online, offline"):
        log.open_run(tmp_path / "a", Config(), wandb="on")
    assert not (tmp_path / "a").exists()


def test_a_missing_wandb_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is 'offline', but the package wandb is not installed"):
        log.open_run(tmp_path / "a", Config(), wandb="offline")
    log.open_run(tmp_path / "a", Config())
    assert not (tmp_path / "a").exists()


def test_a_wandb_that_does_not_start_leaves_no_run(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no key")

    monkeypatch.setattr(log, "_start_wandb", refuse)
    with pytest.raises(RuntimeError, match="no key"):
        log.open_run(tmp_path, Config(), wandb="online").start()
    log.open_run(tmp_path, Config()).start()


def test_importing_and_running_without_wandb_does_not_import_it(tmp_path):
    code = (
        "import sys, dataclasses, pathlib, minir1.log as log\n"
        "config = dataclasses.make_dataclass('C', [])()\n"
        f"log.open_run(pathlib.Path({str(tmp_path)!r}), config).start().log(0, {{'a': 1.0}})\n"
        "print(sorted({'wandb', 'torch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def wandb_history(path: Path) -> list[dict]:
    """The history rows of a .wandb file: a LevelDB log (blocks of 32 KiB, records in parts) of wandb's records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, payload, rows = path.read_bytes(), 7, b"", []  # past the file's own header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header: the block ends with padding
            at += 32768 - at % 32768
            continue
        _, length, part = struct.unpack("<IHB", data[at : at + 7])  # check sum, length, 1 full … 4 last
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):
            record, payload = Record.FromString(payload), b""
            items = record.history.item
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            rows += [row] if row else []
    return rows


def test_wandb_offline_holds_the_same_numbers(tmp_path, capfd):
    run = log.open_run(tmp_path, Config(), wandb="offline").start()
    run.log(0, {"train/reward": 0.25})
    run.log(7, {"train/reward": 0.5, "train/loss": math.nan})
    run.close()
    out, err = capfd.readouterr()  # where openai is imported too, wandb recommends a product of its own
    assert not out and not [line for line in err.splitlines() if not line.startswith("wandb: ")]

    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 10
    while len(rows := wandb_history(file)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)  # offline, wandb's own process writes the file a moment after `finish`
    assert [(row["_step"], row["train/reward"]) for row in rows] == [(0, 0.25), (7, 0.5)]
    assert "train/loss" not in rows[1] and "step" not in rows[1]
    assert log.read_metrics(tmp_path)[1]["train/reward"] == 0.5


def test_the_terminal_is_quiet_and_plain_in_a_pipe(capsys):
    log.progress_line(20, 600, [("reward", "0.41"), ("[b]", "x" * 300)])
    assert capsys.readouterr().out == f" 20/600  reward 0.41  [b] {'x' * 300}\n"
    with log.progress(3, "pre-train") as advance:
        advance()
        advance(2)
    assert capsys.readouterr() == ("", "")
    log.table("Countdown", ["", "pass@1"], [["before [1]", "34%"], ["after", 0.5], ["n" * 150, None]])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "before [1]" in out and "n" * 150 in out and "None" in out


def test_lines_appear_above_a_running_bar(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr(log, "get_console", lambda: console)
    with log.progress(2, "pre-train") as advance:
        for step in range(2):
            log.progress_line(step, 600, [("reward", "0.41")])
            advance()
    above = [line.split("\x1b[2K")[-1] for line in screen.getvalue().split("\n")]
    assert "  0/600  reward 0.41" in above and "  1/600  reward 0.41" in above and "2/2" in screen.getvalue()


def test_a_training_with_no_step_left_says_so(capsys):
    assert list(log.steps(1, 3, "sft")) == [2, 3] and capsys.readouterr().out == ""
    assert list(log.steps(1200, 1200, "sft")) == list(log.steps(1200, 40, "sft")) == []  # of fewer --steps too
    said = "nothing is left to train: 1,200 of {} steps are done\n"
    assert capsys.readouterr().out == said.format("1,200") + said.format(40)


def test_a_second_look_at_a_run_leaves_its_seconds_and_memory(tmp_path):
    run = log.open_run(tmp_path / "run", Config()).start()
    run.result({"seconds/rl": 90.0, "memory/peak_gib": 2.0, "after/pass@1": 0.5})
    run.result({"seconds/rl": 3.0, "memory/peak_gib": 4.0, "after/pass@1": 0.25, "seconds/test": 1.0})
    want = {"seconds/rl": 90.0, "memory/peak_gib": 4.0, "after/pass@1": 0.25, "seconds/test": 1.0}
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == want
    run.close()


def test_results_are_written_as_plain_json(tmp_path):
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"ε": np.float32(0.5), "loss": math.nan, "rows": torch.tensor([1, 2]), "out": Path("b")})
    assert path.read_text().startswith('{\n  "ε": 0.5,\n') and path.read_text().endswith("}\n")
    assert json.loads(path.read_text()) == {"ε": 0.5, "loss": None, "rows": [1, 2], "out": "b"}


def test_the_run_that_a_folder_stands_for(tmp_path):
    """Itself, the demonstration's rl, or the only one below it."""
    assert log.run_holding(tmp_path, "rollouts") == tmp_path
    for name, expected in (("base", "base"), ("rl", "rl"), ("sft", "rl")):
        (tmp_path / name / "rollouts").mkdir(parents=True)
        assert log.run_holding(tmp_path, "rollouts") == tmp_path / expected
        assert log.run_holding(tmp_path / name, "rollouts") == tmp_path / name
    assert log.run_holding(tmp_path, "metrics.jsonl") == tmp_path
    (tmp_path / "rl" / "rollouts").rmdir()
    with pytest.raises(ValueError, match=rf"several runs: name one of them, such as {tmp_path}/sft \(base, sft\)$"):
        log.run_holding(tmp_path, "rollouts")
    with pytest.raises(ValueError, match="none is no folder: need the folder of a run"):
        log.run_holding(tmp_path / "none", "rollouts")


def test_a_table_for_a_document():
    assert log.markdown_table(["", "b", "c"], [["a|b", "1", "2"]]).splitlines() == [
        "|  | b | c |", "| --- | ---: | ---: |", "| a\\|b | 1 | 2 |"
    ]
    assert "| --- | --- |" in log.markdown_table(["a", "b"], [], words=2)
