"""cli.py: what is wrong with the input, or went wrong in the run, is one line; bugs keep their traceback."""

import json
import os
import runpy
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from runs import command

from experiments import r1_zero
from minir1 import cli, tasks
from minir1.model import hf
from minir1.model.config import dense
from minir1.model.transformer import Transformer
from minir1.optim import clip_gradients
from minir1.tokenizer import train_bpe

ROOT = Path(__file__).parent.parent


@dataclass
class Config:
    name: str = "countdown"


def run(monkeypatch, main, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *words])
    cli.run(main, Config)


def test_main_gets_the_options(monkeypatch):
    options = []
    run(monkeypatch, options.append, "--name", "x")
    assert options == [Config("x")]


def test_refused_input_is_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, lambda config: tasks.load(config.name), "--name", "nope")
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and err.startswith("error: unknown task 'nope'; allowed: aime, ")
    assert err.count("\n") == 1


def not_finite(config):
    model = torch.nn.Linear(2, 2, bias=False)
    model.weight.grad = torch.full((2, 2), torch.nan)
    clip_gradients(model, 1.0, step=3)


def absent_file(config):
    open("/none/data.jsonl")


def absent_extra(config):
    import minir1.no_such_extra  # noqa: F401


def no_python(config):
    compile("def (", "task.py", "exec")  # as a task's file that is mistyped


def no_memory(config):
    raise torch.OutOfMemoryError("CUDA out of memory.\n  Tried to allocate 2.00 GiB.")


def seen_by_nobody(config):
    return [].index(3)  # a ValueError that no `raise` of this project made


def seen_by_torch(config):
    torch.empty(3) @ torch.empty(4)


LINES_AND_CODES = {
    not_finite: ("error: step 3: the gradient of weight is not finite", 1),
    absent_file: ("error: [Errno 2] No such file or directory: '/none/data.jsonl'", 2),
    absent_extra: ("error: ModuleNotFoundError: No module named 'minir1.no_such_extra' (--debug shows where)", 2),
    no_python: ("error: SyntaxError: invalid syntax (task.py, line 1) (--debug shows where)", 2),
    no_memory: ("error: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.", 1),
    seen_by_nobody: ("error: ValueError: 3 is not in list (--debug shows where)", 2),
    seen_by_torch: ("error: RuntimeError: inconsistent tensor size, ", 1),
}


@pytest.mark.parametrize("main", LINES_AND_CODES)
def test_an_error_is_one_line_and_a_traceback_with_debug(monkeypatch, capsys, main):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, main)
    line, code = LINES_AND_CODES[main]
    out, err = capsys.readouterr()
    assert end.value.code == code and not out and err.startswith(line) and err.count("\n") == 1, err
    with pytest.raises((*cli.REFUSED, *cli.FAILED)):
        run(monkeypatch, main, "--debug", "--name", "x")


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(monkeypatch, capsys):
    @dataclass
    class WithOut:
        out: Path | None = None

    for words, code in ((["--out", "/dev/null/x"], 2), (["--out", "runs/x"], None), ([], None)):
        monkeypatch.setattr(sys, "argv", ["script", *words])
        reached = []
        with pytest.raises(SystemExit) if code else nullcontext() as end:
            cli.run(reached.append, WithOut)
        assert bool(reached) == (code is None)
        if code:
            said = "error: out = /dev/null/x: /dev/null is no folder that can be written to\n"
            assert end.value.code == code and capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback(monkeypatch):
    with pytest.raises(TypeError):
        run(monkeypatch, lambda config: config.name + 1)


def interrupted(config):
    raise KeyboardInterrupt


@pytest.mark.parametrize("count, codes", [(1, []), (2, [0])])
def test_only_ranks_end_without_the_shutdown_of_python(monkeypatch, capsys, count, codes):
    """A thread of gloo that frees the tensors of the last exchange during the shutdown would abort the process."""
    ended = []
    monkeypatch.setattr(cli.ranks, "started", lambda: count)
    monkeypatch.setattr(cli.ranks, "group", nullcontext)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(sys, "argv", ["script"])
    with nullcontext() if count == 1 else pytest.raises(SystemExit):  # os._exit returns here
        cli.run(lambda config: print("done"), Config, on_ranks=True)
    assert ended == codes and capsys.readouterr() == ("done\n", "")


def test_an_interrupt_says_how_to_resume(monkeypatch, capsys):
    advice = ": the same command with --resume continues from what was saved"
    for config, more in ((Config, ""), (r1_zero.Config, advice)):
        monkeypatch.setattr(sys, "argv", ["script"])
        with pytest.raises(SystemExit) as end:
            cli.run(interrupted, config)
        assert end.value.code == 130 and capsys.readouterr().err == f"interrupted{more}\n"


@dataclass
class Outer:
    inner: r1_zero.Config = field(default_factory=r1_zero.Config)


@pytest.mark.parametrize(
    "config, words, line",
    [
        (r1_zero.Config, "--steps 0", "steps = 0: at least 1"),
        (Outer, "--inner.steps 0", "Error parsing inner: steps = 0: at least 1"),
        (r1_zero.Config, "--steps x", "Error parsing --steps: invalid literal for int() with base 10: 'x'"),
        (r1_zero.Config, "--stepz 3", "Unrecognized options: --stepz, 3; Perhaps you meant: --steps INT (default: 40)"),
        (r1_zero.Config, "--steps", "Missing value for argument '--steps'. Expected 1 values."),
    ],
)
def test_options_that_do_not_fit_are_one_line(monkeypatch, capsys, config, words, line):
    monkeypatch.setattr(sys, "argv", ["script", *words.split()])
    with pytest.raises(SystemExit) as end:
        cli.run(print, config)
    assert end.value.code == 2 and capsys.readouterr() == ("", f"error: {line}\n")


def test_help_is_tyro_s(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, print, "--help")
    assert not end.value.code and "--name" in capsys.readouterr().out


# ---- the scripts, as a user calls them ---------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An untrained model with a BPE tokenizer."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizer = train_bpe(["make 24 from 11,3,3"], 300)
    shape = {"vocab": tokenizer.size, "dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 32, "tied": True}
    hf.save(Transformer(dense(**shape, eos=tokenizer.eos, pad=tokenizer.pad)), tokenizer, path)
    return path


@pytest.fixture(scope="module")
def strange(base, tmp_path_factory):
    """The same, with a chat template that refuses every message."""
    path = tmp_path_factory.mktemp("strange")
    for file in base.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('only tools are allowed') }}"
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def other_layout(tmp_path_factory):
    """A data folder in another layout than GSM8K's."""
    path = tmp_path_factory.mktemp("data")
    (path / "train.jsonl").write_text('{"problem": "1+1?", "solution": "2"}\n')
    return path


LINES = {
    "r1_zero --task nope": "unknown task 'nope'; allowed: aime, ",
    "r1_zero --task nope.py": "task 'nope.py': there is no such file",
    "r1_zero --task gsm8k": "task gsm8k needs data: the folder with train.jsonl and test.jsonl",
    "r1_zero --task gsm8k --data {data}": 'train.jsonl, line 1: need {"question": "…", "answer": "… #### number"}, got',
    "r1_zero --task countdown --data {data}": "task countdown takes no data",
    "r1_zero --device nope": "device = 'nope': this machine has ",
    "r1_zero --checkpoint {base} --eval-split nope": "task countdown has no split 'nope'; it has train, validation,",
    "r1_zero --checkpoint {data}": "holds no config.json: not a checkpoint folder",
    "r1_zero --checkpoint {strange}": "the chat template cannot render these messages: only tools are allowed",
    "r1_zero --checkpoint {base} --max-completion-length 4": "of the groups hold both right and wrong answers",
    "pretrain --mix nope 1": "the mix has no nope; it has ",
    "pretrain --mix facts 2": "Mix.facts = 2.0",
    "pretrain --task gsm8k --data {data}": "task gsm8k has no corpus to pre-train on",
    "evaluate --checkpoint {base} --split nope": "task countdown has no split 'nope'; it has train, validation, test",
    "evaluate --checkpoint {strange} --problems 1": "the chat template cannot render these messages",
    "demo --task gsm8k --data {data}": "task gsm8k has no corpus to pre-train on",
    "demo --rl.seed 3": "--rl.seed: demo.py sets it; use --seed",
    "dpo --checkpoint {base} --pairs {data}/none": "none is no file: expected JSON lines with prompt, chosen, rejected",
    "dpo --task nope": "unknown task 'nope'; allowed: ",
    "reward_model --checkpoint {base} --pairs {data}/train.jsonl": "train.jsonl, line 1: needs an object with chosen",
    "sft --checkpoint {base} --data {data}/train.jsonl": "train.jsonl, line 1: needs messages, conversations, or",
    "preference_pairs --checkpoint {base} --eval-split nope --problems 1 --num-generations 2 --max-completion-length 2":
        "0 of 2 answers to train problems are right, and no problem has both kinds",
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_bad_input_of_each_script_is_one_line(base, strange, other_layout, tmp_path, monkeypatch, capfd, line):
    """In this process, as a new one imports for seconds."""
    script, *words = line.format(base=base, strange=strange, data=other_layout).split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"experiments.{script}", run_name="__main__", alter_sys=True)
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and LINES[line] in error, error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("config.json"))  # no folder of a run is left behind


def test_it_is_one_line_in_a_process_of_its_own_too(tmp_path):
    done = command("-m", "experiments.r1_zero", "--task", "nope", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown task 'nope'")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_an_unknown_choice_shows_those_that_there_are(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-m", "experiments.r1_zero", "--template", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and "('chat', 'r1_zero', 'plain')" in done.stderr
