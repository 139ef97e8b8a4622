"""How long does a chat wait for its page and for the first token, and what do turns before a question do to a model?

    python -m experiments.benchmarks.bench_chat runs/demo --browser /usr/bin/chromium --out docs/results/chat.json

The page is usable once its box takes a question, in a browser that was open before: the time is that from the command
`python -m experiments.chat MODEL --web` on. It needs playwright, of the extra `test`. The time to the first token is
that from a question to the first piece of its answer: the prompt by the chat template, its tokens, the prefill, one
token and its text. Then problems of the test split are answered with 0, 1, … solved problems of the training split as
turns before them. A model that was trained on single questions has seen no such prompt.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from experiments import chat_model
from experiments.chat_model import Model, Settings
from experiments.chat_terminal import drawing
from minir1 import cli, conversation, tasks
from minir1.conversation import Reply, Turn
from minir1.files import write_json
from minir1.judge import judge
from minir1.log import table
from minir1.rollout import answers_of, collect
from minir1.settings import at_least, new_file


@dataclass(frozen=True)
class Config:
    """Which model, how often."""

    model: Annotated[Path, tyro.conf.Positional]  # a Hugging Face folder, or a run
    task: str = "countdown"
    data: str | None = None  # the folder or file that the task reads
    problems: int = 200  # of the test split, evenly spread
    turns: tuple[int, ...] = (0, 1, 2)  # before a question
    max_completion_length: int = 384  # tokens
    browser: Path | None = None  # Chromium; None: the page is not measured
    pages: int = 5  # times that the page is opened
    device: str = "auto"  # auto | cpu | cuda | mps
    out: Path | None = None  # a JSON file for the figures

    def __post_init__(self):
        at_least(self, 1, "problems", "max_completion_length", "pages")
        at_least(self, 0, "turns")
        new_file(self, "out")
        if self.browser and not self.browser.is_file():
            raise ValueError(f"browser = {self.browser}: there is no such file")


def page_usable(model: Path, browser) -> float:
    """Seconds from the command until the page's box takes a question, in a browser that playwright has opened.

    ValueError if the command ends before.
    """
    from playwright.sync_api import Error

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page, began = browser.new_page(), time.perf_counter()
    command = [sys.executable, "-m", "experiments.chat", str(model), "--web", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            try:
                page.goto(f"http://127.0.0.1:{port}")
                page.fill("#box textarea", "a question")
                return time.perf_counter() - began
            except Error as error:
                if "ERR_CONNECTION_REFUSED" not in str(error):
                    raise
                time.sleep(0.05)
        raise ValueError(f"{' '.join(command)} has ended with {process.returncode}")
    finally:
        process.terminate()
        process.wait()
        page.close()


def pages(config: Config) -> dict[str, float]:
    """`page_usable`, of which the first is slowest where no file is in memory yet."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=config.browser, args=["--no-sandbox"])
        seconds = [page_usable(config.model, browser) for _ in range(config.pages)]
        browser.close()
    return {"page/median_s": statistics.median(seconds), "page/max_s": max(seconds)}


def first_token(chat: Model, question: str) -> float:
    """Seconds from a question to the first piece of its answer."""
    settings, began = Settings(), time.perf_counter()
    asked = chat_model.prompt(chat, (), question, settings)
    next(chat_model.answer(chat, drawing(chat, settings), asked, settings, Reply(asked.opened)))
    return time.perf_counter() - began


def right(chat: Model, task: tasks.Task, problems: list[tasks.Problem], turns: list[Turn], most: int) -> int:
    """How many problems are solved after these turns, one answer each."""
    sizes = {"window": chat.window, "reserve": most, "template": chat.template}
    prompts = [conversation.prompt(chat.tokenizer, turns, problem.prompt, **sizes).tokens for problem in problems]
    rollout = collect(chat.model, prompts, answers=1, max_tokens=most, stop=chat.tokenizer.stops, seed=0)
    texts = [chat.tokenizer.decode(answer, keep_special=False) for answer in answers_of(rollout)]
    return sum(verdict.status == "right" for verdict in judge(task, list(zip(problems, texts))))


def main(config: Config) -> dict[str, float]:
    """Measure, print, write."""
    task = tasks.load(config.task, config.data)
    problems = tasks.spread(task.problems("test"), config.problems)
    solved = tasks.spread(task.problems("train"), max(1, *config.turns, 1))
    chat = chat_model.opened(config.model, task=config.task, data=config.data, device=config.device)
    first_token(chat, problems[0].prompt)  # loads what the first use loads
    laps = [first_token(chat, problem.prompt) for problem in problems]
    result = {"threads": torch.get_num_threads(), "problems": len(problems)}
    result |= {"first_token/median_ms": 1000 * statistics.median(laps), "first_token/max_ms": 1000 * max(laps)}
    if config.browser:
        result |= pages(config)
    for count in sorted(set(config.turns)):
        turns = [Turn(problem.prompt, f"<answer>{problem.reference}</answer>") for problem in solved[:count]]
        result[f"right/{count}"] = right(chat, task, problems, turns, config.max_completion_length)
    table(str(config.model), ["", "measured"], [[key, f"{value:.4g}"] for key, value in result.items()])
    if config.out:
        write_json(config.out, result)
    return result


def page(figures: dict[str, float]) -> str:
    """What docs/chat.md says of it."""
    counts = sorted(int(key.removeprefix("right/")) for key in figures if key.startswith("right/"))
    solved = [f"{figures[f'right/{n}']} with {'none' if n == 0 else n} before" for n in counts]
    usable = (
        f"The page takes a question {figures['page/median_s']:.1f} s after the command (median; at most "
        f"{figures['page/max_s']:.1f} s). " if "page/median_s" in figures else ""
    )
    return usable + (
        f"From a question to the first piece of its answer the demonstration's model takes "
        f"{figures['first_token/median_ms']:.0f} ms (median of {figures['problems']}; at most "
        f"{figures['first_token/max_ms']:.0f} ms, on {figures['threads']} core{'s' * (figures['threads'] > 1)}). Of "
        f"{figures['problems']} problems it solves {', '.join(solved)}."
    )


if __name__ == "__main__":
    cli.run(main, Config)
