"""Talk to a model, in the terminal or in the browser.

    python -m experiments.chat
    python -m experiments.chat DeepSeek-R1-Distill-Qwen-1.5B --thinking 2000
    python -m experiments.chat runs/demo --web --beside runs/demo/base
    python -m experiments.chat runs/demo --serve

Without a model it opens the one that `make demo` leaves in runs/demo, and offers to make it where there is none. In the
terminal /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves. What the model thinks is dimmed. A question
that the model's task knows, such as `make 24 from 11,3,3`, is judged by the task's verifier. --web opens a page instead
(experiments/chat_web.py), --serve OpenAI's API (experiments/serve.py). Both need what `make chat` installs:
pip install -c constraints.txt -e '.[chat]'.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.text import Text

from experiments import chat_model, chat_terminal, demo
from experiments.chat_model import Model, Settings
from minir1 import cli
from minir1.sample import stream
from minir1.settings import above, at_least
from minir1.templates import TEMPLATES

DEMO = Path("runs/demo")
PAGE = ("beside", "host", "port", "rows")  # options of --web
SERVED = ("model", "serve", "host", "port", "rows", "window", "max_completion_length", "packed", "device", "dtype")
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Config:
    """Which model, and how it answers."""

    model: Annotated[Path | None, tyro.conf.Positional] = None  # a Hugging Face folder, or a run; None: runs/demo
    web: bool = False  # a page in the browser instead of the terminal
    serve: bool = False  # OpenAI's API instead of the terminal, as experiments/serve.py
    beside: Path | None = None  # a second model that answers the same questions, with --web
    host: str = "127.0.0.1"  # the address of the page or server; any other than this machine's own is open to others
    port: int | None = None  # None: 7860 for --web, 8000 for --serve
    task: str | None = None  # whose verifier judges answers; None: the one of the model's run
    data: str | None = None  # the folder or file that the task reads
    allow_code: bool = False  # the task may run programs that the model wrote, in a sandbox
    template: Literal[TEMPLATES] | None = None  # None: chat, or plain where the checkpoint has no chat template
    turns: int | None = None  # earlier ones that the model sees; None: all that fit, 0 if trained on single questions
    window: int | None = None  # tokens of prompt and answer; None: the model's, but at most 8192
    rows: int | None = None  # answers at once, each with a cache of the window; None: 8 for --web, 64 for --serve
    system: str = ""  # the system prompt
    temperature: float | None = None  # None: as generation_config.json recommends, else 1
    top_p: float | None = None  # None: as generation_config.json recommends, else 1
    max_completion_length: int | None = None  # tokens of an answer, at most; None: as in the run's training, else 1024
    thinking: int | None = None  # tokens after which the thinking is closed by force; None: never
    seed: int = 0
    packed: bool = False  # weights in bitsandbytes' 4 bits stay as they are: 28 to 45 % of bf16's memory, and slower
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32

    def __post_init__(self):
        at_least(self, 1, "max_completion_length", "port", "rows")
        at_least(self, 16, "window")
        at_least(self, 0, "turns", "temperature", "thinking", "seed")
        above(self, 0, "top_p")
        if self.port is not None and self.port > 65535:
            raise ValueError(f"port = {self.port}: at most 65535")
        chat_model.checked(wanted(self, 1.0, 1.0, 1024))
        if self.web and self.serve:
            raise ValueError("web, serve: one of them, in one process each")
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        if not (self.web or self.serve):
            self._refuse([name for name in changed if name in PAGE], "add --web")
        if self.serve:
            self._refuse([name for name in changed if name not in SERVED], "--serve has no such option")

    def _refuse(self, names: list[str], why: str) -> None:
        if names:
            raise ValueError(f"{', '.join(names)}: {why}")


def wanted(config: Config, temperature: float, top_p: float, most: int) -> Settings:
    """The settings that the options ask for, with these values where they leave it to the model."""
    return Settings(
        temperature if config.temperature is None else config.temperature,
        top_p if config.top_p is None else config.top_p,
        config.max_completion_length or most,
        config.thinking,
        config.system,
        config.seed,
    )


def settings_of(config: Config, chat: Model) -> Settings:
    """The settings of the first answer. ValueError for a system prompt that the model has no place for."""
    if config.system and not chat.takes_system:
        raise ValueError("system: the chat template of this model has no place for a system prompt")
    recommended = chat.tokenizer.recommended
    return wanted(config, recommended("temperature", 1.0), recommended("top_p", 1.0), chat.most)


# ---- which model ---------------------------------------------------------------------------------


def chosen(path: Path | None) -> Path:
    """The model's folder; without one the demonstration's, which is made if the user says so. ValueError if there is
    none."""
    if path is not None:
        return path
    if not (DEMO / "rl" / "checkpoint" / "latest").is_file():
        none = f"{DEMO} holds no finished demonstration"
        if not sys.stdin.isatty():
            raise ValueError(
                f"{none}: make it with `make demo`, in about ten minutes (it continues one that was interrupted), or "
                "name a model"
            )
        if input(f"{none}. Make it now, in about ten minutes? [y/N] ").strip().lower() not in ("y", "yes"):
            raise ValueError(f"{none}: name a model, a Hugging Face folder or a run")
        demo.main(demo.Config(resume=DEMO.exists()))
    elif not (DEMO / "result.json").is_file():
        print(f"{DEMO} is not finished: this is its policy so far; `make demo` continues it")
    return DEMO


def main(config: Config) -> None:
    """Open the model, and talk."""
    path = chosen(config.model)
    if config.serve:
        return serve(path, config)
    options = {name: getattr(config, name) for name in ("template", "turns", "window", "device", "dtype")}
    options |= {name: getattr(config, name) for name in ("task", "data", "allow_code", "packed")}
    chat = chat_model.opened(path, **options)
    settings = settings_of(config, chat)
    if config.web:
        os.environ.update(QUIET)
        try:
            from experiments import chat_web
        except ModuleNotFoundError as error:
            if error.name not in ("gradio", "starlette"):
                raise
            line = "pip install -c constraints.txt -e '.[chat]'"
            raise ValueError(f"web: Gradio is not installed: {line}") from error
        other = chat_model.opened(config.beside, **options) if config.beside else None
        where = config.host, config.port or 7860, config.rows or 8
        return chat_web.main([chat, other] if other else [chat], settings, *where)
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=200)  # in a pipe: breaks no line
    for line in chat_model.introduction(chat):
        console.print(Text(line, "dim"))
    console.print(Text("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves. Try:", "dim"))
    for number, question in enumerate(chat.examples, start=1):
        console.print(Text(f"  /{number}  {question}", "dim"))
    warm_up(chat)
    chat_terminal.run(chat_terminal.Session(chat, settings, console))


def serve(path: Path, config: Config) -> None:
    """OpenAI's API, until a signal."""
    from experiments import serve

    shared = {name: getattr(config, name) for name in ("host", "max_completion_length", "packed", "device", "dtype")}
    shared |= {"port": config.port or 8000, "rows": config.rows or 64, "max_length": config.window}
    serve.main(serve.Config(path, **shared))


def warm_up(chat: Model) -> None:
    """Draw one token, so that the first answer does not wait for what is loaded at the first use."""
    for _ in stream(chat.model, [0], max_tokens=2):
        pass


if __name__ == "__main__":
    cli.run(main, Config)
