"""Serve a model by OpenAI's API: chats and completions, streamed, many at once.

    python -m experiments.serve runs/demo
    python -m experiments.serve DeepSeek-R1-Distill-Qwen-1.5B --port 8000 --rows 16 --max-length 8192

Then `curl http://127.0.0.1:8000/v1/models`, or the client of the package openai with this address and any api_key
(docs/serving.md). Requests are batched continuously (minir1/engine.py), and an answer does not depend on who else is
served. Thinking between <think> and </think> is sent as reasoning_content, apart from content. serve_body.py says which
fields are supported, ignored and refused. Ctrl-C, or SIGTERM, ends the server, after a few seconds for answers that
run. Needs FastAPI and uvicorn, the extra [chat].
"""

from __future__ import annotations

import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import chat_task
from minir1 import checkpoint, cli
from minir1.address import is_loopback
from minir1.device import pick, pick_dtype
from minir1.engine import LARGE, Engine
from minir1.model import hf
from minir1.model.lora import merge
from minir1.settings import above, at_least


@dataclass(frozen=True)
class Config:
    """The model to serve, where, and the limits."""

    model: Annotated[Path, tyro.conf.Positional]  # a Hugging Face folder, or a run's or its checkpoints': then the best
    name: str | None = None  # of the model in requests; None: of its folder, of a run that of the run
    host: str = "127.0.0.1"  # the address to listen at; by default only this machine reaches it
    port: int = 8000  # 0: a free one
    rows: int = 64  # answers at once; more wait
    max_length: int | None = None  # tokens of a prompt with its answer; None: the model's, but at most 8192
    max_completion_length: int | None = None  # of a request that names no limit; None: as the run's training, else 1024
    waiting: int = 256  # answers that may wait; further ones are refused with 429
    timeout: float = 600.0  # seconds for a whole answer, waiting included; then it ends with 503
    grace: float = 5.0  # seconds that running answers get when the server is stopped
    packed: bool = False  # weights in bitsandbytes' 4 bits stay as they are: less memory, and slower
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32

    def __post_init__(self):
        at_least(self, 1, "rows", "max_length", "max_completion_length", "waiting")
        at_least(self, 0, "port")
        above(self, 0, "timeout", "grace")
        if self.port > 65_535:
            raise ValueError(f"port = {self.port}: 0 to 65535")
        if self.name == "":
            raise ValueError("name = '': at least one character, or leave it out")


def listening(host: str, port: int) -> socket.socket:
    """A socket at this address; ValueError where there is none to listen at."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if not host:
            raise OSError("an address is needed")
        host.encode("idna")  # UnicodeError; the socket would raise a TypeError
        listener = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host = {host!r}, port = {port}: cannot listen there: {error}") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a last packet may wait 40 ms for an ACK
    return listener


def name_of(path: Path) -> str:
    """The name of a model in requests: that of its folder, without `checkpoint` and what it holds."""
    parts = path.resolve().parts
    return parts[parts.index("checkpoint") - 1] if "checkpoint" in parts[1:] else parts[-1]


def main(config: Config) -> None:
    """Load the model, and serve it until a signal."""
    try:
        from experiments import serve_api, serve_http
    except ImportError as error:
        raise ImportError(
            f"the server needs the packages of the extra `chat`: pip install -c constraints.txt -e '.[chat]' ({error})"
        ) from error
    with listening(config.host, config.port) as listener:
        device = pick(config.device)
        folder = checkpoint.resolve(config.model, prefer="best")
        model, tokenizer = hf.load(folder, device, pick_dtype(config.dtype, device), config.packed)
        model = (model if config.packed else merge(model)).eval()
        largest = model.config.max_positions
        if config.max_length and config.max_length > largest:
            raise ValueError(f"max_length = {config.max_length}: the model has positions for {largest}")
        engine = Engine(model, config.rows, config.max_length or min(largest, LARGE), config.waiting)
        name = config.name or name_of(config.model)
        most = config.max_completion_length or chat_task.budget(folder)
        service = serve_api.Service(engine, tokenizer, name, most, config.timeout)
        server = serve_http.server(serve_api.create(service, config.host), engine, config.grace)
        host = f"[{config.host}]" if ":" in config.host else config.host
        print(f"{name} at http://{host}:{listener.getsockname()[1]}/v1", flush=True)
        if not is_loopback(config.host):
            print(f"warning: {config.host} can be reached from other machines, and the server asks for no password")
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # uvicorn sends it again when it has stopped
        try:
            server.run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, before)
        if engine.error is not None:
            raise RuntimeError(f"the engine has failed: {engine.error}") from engine.error


if __name__ == "__main__":
    cli.run(main, Config)
