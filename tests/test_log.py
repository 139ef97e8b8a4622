"""log.py: the run folder, its resumption, and the wandb copy read back."""

import io
import json
import math
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


def test_a_run_is_a_folder(tmp_path):
    out = tmp_path / "runs" / "a"
    with log.open_run(out, Config()) as run:
        run.log(0, {"train/reward": 0.25})
        run.log(1, {"train/reward": torch.tensor(0.5), "train/tries": np.float32(2), "train/n": np.int64(3)})
        run.samples(1, [{"text": "3×4=12 ☃", "right": True}, {"text": "?", "right": False}])
        run.result({"before/pass@1": 0.25})
        run.result({"after/pass@1": np.float64(0.5), "figure": Path("a.png")})
    assert json.loads((out / "config.json").read_text())["out"] == "runs/x"
    rows = [{"step": 0, "train/reward": 0.25}, {"step": 1, "train/reward": 0.5, "train/tries": 2.0, "train/n": 3}]
    assert log.read_metrics(out) == log.read_metrics(out / "metrics.jsonl") == rows
    lines = (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"step": 1, "text": "3×4=12 ☃", "right": True} and "☃" in lines[0]
    result = json.loads((out / "result.json").read_text())
    assert result == {"before/pass@1": 0.25, "after/pass@1": 0.5, "figure": "a.png"}
    assert not list(out.glob("*.tmp"))


def test_lines_are_there_before_the_run_is_closed_and_are_valid_json(tmp_path):
    run = log.open_run(tmp_path, Config())
    run.log(3, {"train/loss": math.nan, "grad": -math.inf, "kl": torch.tensor(math.inf)})
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(name):
        raise AssertionError(name)

    row = json.loads(text, parse_constant=refuse)
    assert row == {"step": 3, "train/loss": None, "grad": None, "kl": None}


@pytest.mark.parametrize("metrics", [{"a": {"b": 1}}, {"a": torch.ones(2)}, {"a": "high"}, {"step": 1}])
def test_metrics_are_numbers_in_a_flat_dict(tmp_path, metrics):
    run = log.open_run(tmp_path, Config())
    with pytest.raises(ValueError, match="flat dict|step"):
        run.log(0, metrics)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("{}\n")
    with pytest.raises(ValueError, match="--resume.*--out") as error:
        log.open_run(tmp_path, Config())
    assert str(tmp_path) in str(error.value) and (tmp_path / name).read_text() == "{}\n"


def test_resume_takes_the_same_config_only(tmp_path):
    log.open_run(tmp_path, Config())
    other = Config(steps=99, out=Path("elsewhere"), resume=True, wandb="offline", microbatch=1)
    log.open_run(tmp_path, other, resume=True)
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

    log.open_run(tmp_path, Config())
    with pytest.raises(ValueError, match=r"clip: '\(absent\)' then, 0.2 now"):
        log.open_run(tmp_path, Other(), resume=True)


def test_resume_of_an_empty_or_missing_folder_starts(tmp_path):
    for out in (tmp_path, tmp_path / "new"):
        with log.open_run(out, Config(), resume=True) as run:
            run.log(0, {"a": 1.0})
        assert log.read_metrics(out) == [{"step": 0, "a": 1.0}]


def test_cut_back_keeps_the_lines_up_to_the_step(tmp_path):
    with log.open_run(tmp_path, Config()) as run:
        for step in range(5):
            run.log(step, {"a": step / 3})
            run.samples(step, [{"text": f"{step}é"}] * 2)
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with log.open_run(tmp_path, Config(), resume=True) as run:
        run.cut_back(2)
        assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:3])  # equal to the byte
        run.log(3, {"a": 1.0})
    assert log.read_metrics(tmp_path) == log._read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["a"] for row in log.read_metrics(tmp_path)] == [0, 1 / 3, 2 / 3, 1]
    assert [row["step"] for row in log._read_jsonl(tmp_path / "samples.jsonl")] == [0, 0, 1, 1, 2, 2]
    with log.open_run(tmp_path, Config(), resume=True) as run:
        run.cut_back(-1)
    assert log.read_metrics(tmp_path) == []


def test_a_line_torn_anywhere_is_dropped_and_does_not_swallow_the_next(tmp_path):
    whole, last = b'{"step": 0, "t": "a"}\n', '{"step": 1, "t": "é"}'.encode()
    log.open_run(tmp_path, Config())
    for length in range(1, len(last)):
        (tmp_path / "metrics.jsonl").write_bytes(whole + last[:length])
        assert [row["step"] for row in log.read_metrics(tmp_path)] == [0]
        log.open_run(tmp_path, Config(), resume=True).log(2, {})
        assert [row["step"] for row in log.read_metrics(tmp_path)] == [0, 2]
    (tmp_path / "metrics.jsonl").write_bytes(whole + last)  # only the newline is missing
    log.open_run(tmp_path, Config(), resume=True).log(2, {})
    assert [row["step"] for row in log.read_metrics(tmp_path)] == [0, 1, 2]


def test_a_damaged_line_in_the_middle_is_an_error_naming_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        log.read_metrics(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        log.read_metrics(tmp_path / "nowhere")


def test_unknown_wandb_mode(tmp_path):
    with pytest.raises(ValueError, match="'on'; allowed are off, online, offline"):
        log.open_run(tmp_path / "a", Config(), wandb="on")
    assert not (tmp_path / "a").exists()


def test_importing_and_running_without_wandb_does_not_import_it(tmp_path):
    code = (
        "import sys, dataclasses, pathlib, minir1.log as log\n"
        "config = dataclasses.make_dataclass('C', [])()\n"
        f"log.open_run(pathlib.Path({str(tmp_path)!r}), config).log(0, {{'a': 1.0}})\n"
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
    with log.open_run(tmp_path, Config(), wandb="offline") as run:
        run.log(0, {"train/reward": 0.25})
        run.log(7, {"train/reward": 0.5, "train/loss": math.nan})
    assert capfd.readouterr() == ("", "")

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
    with log.progress(3, "pre-train") as bar:
        bar.advance()
        bar.say("loss 1.2")
        bar.advance(2)
    assert capsys.readouterr() == ("", "")
    log.table("Countdown", ["", "pass@1"], [["before [1]", "34%"], ["after", 0.5], ["n" * 150, None]])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "before [1]" in out and "n" * 150 in out and "None" in out


def test_lines_appear_above_a_running_bar(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr(log, "get_console", lambda: console)
    with log.progress(2, "pre-train") as bar:
        for step in range(2):
            log.progress_line(step, 600, [("reward", "0.41")])
            bar.advance()
    above = [line.split("\x1b[2K")[-1] for line in screen.getvalue().split("\n")]
    assert "  0/600  reward 0.41" in above and "  1/600  reward 0.41" in above and "2/2" in screen.getvalue()


def test_results_are_written_as_plain_json(tmp_path):
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"ε": np.float32(0.5), "loss": math.nan, "rows": torch.tensor([1, 2]), "out": Path("b")})
    assert path.read_text().startswith('{\n  "ε": 0.5,\n') and path.read_text().endswith("}\n")
    assert json.loads(path.read_text()) == {"ε": 0.5, "loss": None, "rows": [1, 2], "out": "b"}


def test_a_table_for_a_document():
    assert log.markdown_table(["", "b", "c"], [["a|b", "1", "2"]]).splitlines() == [
        "|  | b | c |", "| --- | ---: | ---: |", "| a\\|b | 1 | 2 |"
    ]
    assert "| --- | --- |" in log.markdown_table(["a", "b"], [], words=2)
