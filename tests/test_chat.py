"""chat.py and chat_model.py: the options, the model and its settings."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from talker import saved

from experiments import chat, chat_model, chat_terminal
from experiments.benchmarks import bench_chat
from experiments.chat_model import Settings
from minir1.conversation import Reply
from minir1.model.packed_linear import packed_layers

ROOT = Path(__file__).parent.parent
COUNTS = {"\nAssistant:": "<think>", "<think>": "7", "7": "8", "8": "7"}  # 7 and 8 for ever
ENDS = {"\nAssistant:": "<think>", "<think>": "7", "7": " no\n", " no\n": "</think>", "</think>": "<answer>",
        "<answer>": "9", "9": "</answer>"}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model that never ends its thinking unless it is forced, and one that answers."""
    path = tmp_path_factory.mktemp("talkers")
    return {
        "counts": saved(path / "counts", COUNTS | {"</think>": "<answer>", "<answer>": "9", "9": "</answer>"}),
        "ends": saved(path / "ends", ENDS),
    }


# ---------------------------------------------------------------- the model and its settings


def test_a_model_is_opened_with_what_a_chat_needs_to_know(folders):
    model = chat_model.opened(folders["ends"])
    assert (model.window, model.turns, model.takes_system, model.template, model.task) == (4096, 0, False, "chat", "")
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    words = " ".join(chat_model.introduction(model))
    assert "a window of 4,096 tokens" in words and "trained on single questions: each is asked alone" in words
    narrow = chat_model.opened(folders["ends"], window=32, turns=3)
    assert (narrow.window, narrow.turns) == (32, 3)
    words = " ".join(chat_model.introduction(narrow))
    assert "a window of 32 tokens (the model's is 4,096: --window)" in words and "may answer none" in words
    with pytest.raises(ValueError, match="window = 5000: the model has positions for 4096"):
        chat_model.opened(folders["ends"], window=5000)
    with pytest.raises(ValueError, match="turns = 1: template 'plain' asks one question"):
        chat_model.opened(folders["ends"], template="plain", turns=1)
    with pytest.raises(ValueError, match="packed = True is for weights in bitsandbytes' 4 bits"):
        chat_model.opened(folders["ends"], packed=True)


def test_weights_in_four_bits_stay_packed_and_answer_alike(tmp_path):
    """A folder as bitsandbytes writes it: the answer is that of the dequantised weights."""
    from test_four_bit import CONFIGS, plain, quantised

    folder = quantised(plain(tmp_path / "plain", CONFIGS["qwen3"]), tmp_path / "packed")
    answers = []
    for packed in (True, False):
        model = chat_model.opened(folder, packed=packed, dtype="float32", window=64)
        assert bool(packed_layers(model.model)) == packed
        settings = Settings(temperature=0, most=12)
        draw, reply = chat_terminal.drawing(model, settings), Reply("")
        asked = chat_model.prompt(model, (), "11 from 3", settings)
        shown = list(chat_model.answer(model, draw, asked, settings, reply))
        assert shown and "".join(text for _, text in shown) == reply.text
        answers.append(reply.tokens)
    assert answers[0] == answers[1] and len(set(answers[0])) > 1


def test_the_folder_of_the_demonstration_is_its_last_stage(tmp_path, folders):
    step = tmp_path / "rl" / "checkpoint" / "step-000001"
    step.parent.mkdir(parents=True)
    step.symlink_to(folders["ends"])
    (step.parent / "best").write_text("step-000001\n")
    (tmp_path / "rl" / "config.json").write_text(json.dumps({"task": "countdown", "max_completion_length": 384}))
    model = chat_model.opened(tmp_path)
    most = [chat.settings_of(config, model).most for config in (chat.Config(), chat.Config(max_completion_length=5))]
    assert most == [384, 5]
    assert model.task == "countdown" and re.fullmatch(r"make \d+ from [\d,]+", model.examples[0])


def test_what_generation_config_recommends(folders):
    model = chat_model.opened(folders["ends"])
    config = chat.Config()
    for stated, want in (
        ({}, (1.0, 1.0)), ({"temperature": 0.6, "top_p": 0.95}, (0.6, 0.95)),
        ({"temperature": 0.6, "do_sample": False}, (1.0, 1.0)), ({"temperature": "hot", "top_p": 7}, (1.0, 1.0)),
    ):  # fmt: skip
        model.tokenizer.generation = stated
        assert chat.settings_of(config, model)[:2] == want
    assert chat.settings_of(chat.Config(temperature=0.3, thinking=5), model) == Settings(0.3, 1.0, 1024, 5)
    with pytest.raises(ValueError, match="system: the chat template of this model has no place"):
        chat.settings_of(chat.Config(system="x"), model)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"top_p": 1.5}, "top-p = 1.5"), ({"top_p": 0.0}, "top_p = 0.0"), ({"port": 70000}, "port = 70000"),
        ({"host": "0.0.0.0", "port": 1}, "^host, port: add --web"), ({"rows": 2}, "^rows: add --web"),
        ({"beside": Path("x")}, "add --web"), ({"temperature": 1e-9}, "temperature = 1e-09"),
        ({"serve": True, "web": True}, "web, serve: one of them"),
        ({"serve": True, "temperature": 0.5, "system": "x"}, "^system, temperature: --serve has no such option"),
    ],
)  # fmt: skip
def test_options_that_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        chat.Config(**options)
    if match.endswith("--web"):
        chat.Config(web=True, **options)


def test_without_a_model_the_demonstration_is_offered(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(chat.demo, "main", made.append)
    with pytest.raises(ValueError, match="runs/demo holds no finished demonstration: make it with `make demo`"):
        chat.chosen(None)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    for said, line in (("n", "name a model"), ("", "name a model")):
        monkeypatch.setattr("builtins.input", lambda prompt: said)
        with pytest.raises(ValueError, match=line):
            chat.chosen(None)
    monkeypatch.setattr("builtins.input", lambda prompt: " Yes ")
    assert not made and chat.chosen(None) == Path("runs/demo")
    Path("runs/demo").mkdir(parents=True)
    chat.chosen(None)
    assert [config.resume for config in made] == [False, True] and made[0].out == chat.DEMO
    (Path("runs/demo/rl/checkpoint")).mkdir(parents=True)
    Path("runs/demo/rl/checkpoint/latest").write_text("x")
    capsys.readouterr()
    assert chat.chosen(None) == chat.DEMO and len(made) == 2 and chat.chosen(Path("x")) == Path("x")
    assert capsys.readouterr().out == "runs/demo is not finished: this is its policy so far; `make demo` continues it\n"
    Path("runs/demo/result.json").write_text("{}")
    assert chat.chosen(None) == chat.DEMO and capsys.readouterr().out == ""


def test_make_installs_what_the_page_needs():
    """`make chat` installs the extra `chat`, and the tests of the page run where `make test` did."""
    words = ["make", "-n", "-B", "--no-print-directory", "chat"]  # for `make test` prints its folder otherwise
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-c constraints.txt -e '.[chat]'" in said and said.rstrip().endswith("-m experiments.chat")
    extras = dict(re.findall(r'"(test|chat)": \[(.*?)\]', (ROOT / "setup.py").read_text(encoding="utf-8"), re.S))
    chat, test = (set(re.findall(r'"([\w-]+)"', extras[name])) for name in ("chat", "test"))
    assert "gradio" in chat and chat <= test
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert chat <= set(pinned)


def test_the_server_gets_the_options_that_it_has(tmp_path, monkeypatch):
    from experiments import serve

    configs = []
    monkeypatch.setattr(serve, "main", configs.append)
    chat.main(chat.Config(tmp_path, serve=True))
    chat.main(chat.Config(tmp_path, serve=True, port=1, rows=2, window=99, max_completion_length=5, device="cpu"))
    assert configs[0] == serve.Config(tmp_path)
    assert configs[1] == serve.Config(tmp_path, port=1, rows=2, max_length=99, max_completion_length=5, device="cpu")


def test_what_the_documents_say_of_the_times():
    figures = {"threads": 1, "problems": 9, "first_token/median_ms": 14.2, "first_token/max_ms": 26.0, "right/0": 8}
    said = "From a question to the first piece of its answer the demonstration's model takes 14 ms (median of 9; "
    assert bench_chat.page(figures).startswith(said)
    figures |= {"page/median_s": 4.04, "page/max_s": 9.0}
    usable = "The page takes a question 4.0 s after the command (median; at most 9.0 s). "
    assert bench_chat.page(figures).startswith(usable + said)
    with pytest.raises(ValueError, match="browser = nowhere: there is no such file"):
        bench_chat.Config(Path("x"), browser=Path("nowhere"))
