"""serve.py: the process, and what it serves."""

import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
import httpx  # noqa: E402
import uvicorn  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from served import PROMPT, wait_for  # noqa: E402
from test_four_bit import CONFIGS, plain, quantised  # noqa: E402

from experiments import serve, serve_api  # noqa: E402
from minir1.engine import Engine, Request  # noqa: E402
from minir1.model.packed_linear import packed_layers  # noqa: E402
from minir1.model.transformer import Transformer  # noqa: E402

ROOT = Path(__file__).parent.parent


def test_a_signal_ends_the_server_cleanly(endless):
    """While it answers: each client gets an error, and nothing is printed."""
    command = [sys.executable, "-m", "experiments.serve", str(endless), "--port", "0", "--grace", "0.5"]
    command += ["--name", "toy", "--rows", "2", "--max-length", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    expected = {signal.SIGTERM: (0, "", ""), signal.SIGINT: (130, "", "interrupted\n")}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in expected]  # they start at the same time
    for process, number in zip(processes, expected):
        line = process.stdout.readline()
        assert line.startswith("toy at http://127.0.0.1:") and line.endswith("/v1\n")
        client = openai.OpenAI(base_url=line.split()[-1], api_key="none", max_retries=0)
        with client, ThreadPoolExecutor(1) as pool:
            asked = {"model": "toy", "prompt": PROMPT, "max_tokens": 99_000}
            stream = iter(client.completions.create(**asked, stream=True))
            next(stream)
            whole = pool.submit(client.completions.create, **asked)
            health = line.split()[-1].replace("/v1", "/health")
            assert wait_for(lambda: httpx.get(health).json()["running"] == 2)
            process.send_signal(number)
            with pytest.raises(openai.APIError, match="the server is shutting down"):
                list(stream)
            with pytest.raises(openai.InternalServerError, match="the server is shutting down"):
                whole.result()
            said = process.communicate(timeout=20)
        assert (process.returncode, *said) == expected[number]


def test_addresses(endless, monkeypatch, capsys):
    with serve.listening("127.0.0.1", 0) as free:
        assert free.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("", "nosuch.invalid", "☃" * 80, "127.0.0.1"):
            with pytest.raises(ValueError, match=f"^host = '{host}', port = {port}: cannot listen there: "):
                serve.listening(host, port)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: sockets[0].close())
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    config = serve.Config(endless, host="0.0.0.0", port=0, rows=1)
    serve.main(config)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("endless") and "warning: 0.0.0.0 can be reached from other machines" in out[1]
    serve.main(replace(config, host="127.0.0.1", name="other"))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["other"]


def test_the_cache_has_8192_slots_a_row_unless_others_are_asked_for(endless, monkeypatch):
    """The model has positions for 100,000: 64 rows of these would not fit into a machine's memory."""
    made = []
    monkeypatch.setattr(serve, "Engine", lambda *sizes: made.append(Engine(*sizes)) or made[-1])
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    for length, slots in ((None, 8192), (9000, 9000)):
        serve.main(serve.Config(endless, port=0, rows=1, max_length=length))
        assert made[-1].slots == slots


def test_packed_weights_are_served_as_they_are(tmp_path, monkeypatch):
    made = []
    folder = quantised(plain(tmp_path / "plain", CONFIGS["llama"]), tmp_path / "nf4")
    monkeypatch.setattr(serve, "Engine", lambda *sizes: made.append(Engine(*sizes)) or made[-1])
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    for packed in (False, True):
        serve.main(serve.Config(folder, port=0, rows=1, max_length=9, packed=packed))
        assert bool(packed_layers(made[-1].model)) == packed


def test_a_failed_engine_ends_the_process(endless, monkeypatch):
    """With exit code 1, by `cli.run`; until then the server says that it is not well."""

    def fails(self, sockets):
        with self.engine, monkeypatch.context() as broken:
            broken.setattr(Transformer, "hidden", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                list(self.engine.submit(Request([1], 9)))
        assert TestClient(self.config.app, base_url="http://localhost").get("/health").status_code == 503

    monkeypatch.setattr(uvicorn.Server, "run", fails)
    monkeypatch.setattr(Transformer, "prefill", lambda self, grid, **_: torch.zeros(len(grid), self.config.dim))
    with pytest.raises(RuntimeError, match="^the engine has failed: division by zero$"):
        serve.main(serve.Config(endless, port=0, rows=1, max_length=99))


def test_without_the_extra_one_line_names_it(endless, monkeypatch):
    monkeypatch.delitem(sys.modules, "experiments.serve_http")
    monkeypatch.delattr("experiments.serve_http")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"extra `chat`: pip install -c constraints.txt -e '.\[chat\]'"):
        serve.main(serve.Config(endless))


def test_names():
    assert serve.name_of(Path("/a/runs/demo/checkpoint/step-000120")) == serve.name_of(Path("/a/runs/demo")) == "demo"
    assert serve.name_of(Path("/a/runs/demo/checkpoint")) == "demo"
    assert serve.name_of(Path("/checkpoints/Qwen2.5-0.5B")) == "Qwen2.5-0.5B"


def test_the_page_asks_for_the_model_that_its_command_serves():
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    path = re.search(r"^python -m experiments.serve (\S+)$", page, re.M)[1]
    asked = re.findall(r'model(?:": |=)"([^"]+)"', page)
    assert len(asked) == 2 and set(asked) == {serve.name_of(Path(path))}


@pytest.mark.parametrize("asked, most", [(None, 384), (5, 5)])
def test_the_longest_answer_is_that_of_the_runs_training(toy_base, tmp_path, monkeypatch, asked, most):
    (tmp_path / "checkpoint").symlink_to(toy_base() / "checkpoint")
    (tmp_path / "config.json").write_text('{"task": "countdown", "max_completion_length": 384}')

    def service(engine, tokenizer, name, tokens, timeout):
        engine.close()
        raise RuntimeError(f"{tokens} tokens")

    monkeypatch.setattr(serve_api, "Service", service)
    with pytest.raises(RuntimeError, match=f"^{most} tokens"):
        serve.main(serve.Config(tmp_path, max_completion_length=asked, port=0, device="cpu"))


def test_a_row_longer_than_the_positions_is_refused(toy_base):
    config = serve.Config(toy_base() / "checkpoint", max_length=10**6, port=0, device="cpu")
    with pytest.raises(ValueError, match="max_length = 1000000: the model has positions for"):
        serve.main(config)
