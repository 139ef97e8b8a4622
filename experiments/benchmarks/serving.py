"""The server under load: tokens a second of one client and of many at once, and what becomes of their answers.

    python -m experiments.benchmarks.serving runs/demo/rl --out docs/results/serving.json

Starts the server in a process of its own, and streams the answers to as many problems as there are clients:

- one client asks them one after the other: these are the answers alone;
- all clients ask at once, each several in a row: their answers must be those alone;
- many requests, half of whose clients leave after a random number of chunks: no answer of the others may be lost or
  changed, and in the end no row may be taken.

Then the same prompts without a server: by the engine, by `sample.generate`, and by transformers' `generate` with the
same weights, all in one batch and one after the other. Tokens are those up to the end of each answer; rates are by the
clock, the best of several repeats. The client runs on the same cores as the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro

from minir1 import checkpoint, cli, tasks
from minir1.engine import Engine, Request
from minir1.files import write_json
from minir1.log import markdown_table, table
from minir1.model import hf
from minir1.model.transformer import Transformer
from minir1.sample import generate
from minir1.settings import at_least, new_file
from minir1.templates import encode
from minir1.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """A load test on this machine."""

    model: Annotated[Path, tyro.conf.Positional]  # a Hugging Face folder, or a run's: then its best checkpoint
    task: str = "countdown"  # the problems that are asked
    data: str | None = None  # the folder or file that the task reads
    clients: int = 64  # at once
    rounds: int = 4  # requests of each client in a row
    requests: int = 1000  # of those with disconnects
    max_completion_length: int = 256
    repeats: int = 3  # of each measurement
    seed: int = 0  # of the answers, and of who leaves
    out: Path | None = None  # a JSON file for the figures

    def __post_init__(self):
        at_least(self, 1, "clients", "rounds", "requests", "max_completion_length", "repeats")
        at_least(self, 0, "seed")
        new_file(self, "out")


# ---- the server and its clients ----------------------------------------------------------------


class Received(NamedTuple):
    """An answer as a client saw it."""

    text: str
    finish: str | None  # None: the client left before the end
    tokens: int
    first: float  # seconds to the first text


@contextmanager
def served(model: Path, *options: str):
    """The port of a server of this model, in a process of its own that ends with the block."""
    command = [sys.executable, "-m", "experiments.serve", str(model), "--name", "model", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if address := re.search(r"http://\S+:(\d+)/v1", line):
                break
        else:
            raise RuntimeError(f"the server ended with code {process.wait()} before it served")
        yield int(address[1])
    finally:
        process.terminate()
        process.wait(30)


async def ask(port: int, body: dict, leave_after: int | None = None) -> Received:
    """Stream one answer; leave_after: chunks after which the client leaves."""
    began, first, texts, finish, tokens = time.perf_counter(), 0.0, [], None, 0
    content = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + content)
        if b" 200 " not in (status := await reader.readline()):
            raise RuntimeError(f"the server says {status.decode().strip()}")
        while (line := await reader.readline()) and line != b"data: [DONE]\n":
            if not line.startswith(b"data: "):
                continue
            if leave_after is not None and len(texts) >= leave_after:
                return Received("".join(texts), None, 0, first)
            chunk = json.loads(line[6:])
            for choice in chunk["choices"]:
                texts.append(choice["text"])
                first, finish = first or time.perf_counter() - began, choice["finish_reason"]
            tokens = (chunk.get("usage") or {}).get("completion_tokens", 0)
    finally:
        writer.close()
    return Received("".join(texts), finish, tokens, first)


async def at_once(port: int, queues: Sequence[Sequence[tuple[dict, int | None]]]) -> list[list[Received]]:
    """What each of several clients receives, who ask at the same time, each one request after the other."""

    async def client(queue) -> list[Received]:
        return [await ask(port, *one) for one in queue]

    return await asyncio.gather(*map(client, queues))


async def load(port: int) -> dict[str, int]:
    """How many requests run and wait."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return json.loads(answer.partition(b"\r\n\r\n")[2])


# ---- measurements ------------------------------------------------------------------------------


def with_server(port: int, bodies: list[dict], config: Config) -> dict[str, float]:
    """One client, many clients, and many that leave."""
    rng, figures = random.Random(config.seed), {}
    asyncio.run(at_once(port, [[(body, None)] for body in bodies]))  # a warm-up
    one = rate(lambda: asyncio.run(at_once(port, [[(body, None) for body in bodies]]))[0], config.repeats)
    alone = [received.text for received in one.answers]
    turns = [[(i + turn) % len(bodies) for turn in range(config.rounds)] for i in range(len(bodies))]
    queues = [[(bodies[i], None) for i in turn] for turn in turns]
    many = rate(lambda: sum(asyncio.run(at_once(port, queues)), []), config.repeats)
    expected = [alone[i] for turn in turns for i in turn]
    for name, measured in (("one", one), ("many", many)):
        firsts = sorted(received.first for received in measured.answers)
        figures |= {f"{name}/tok_s": measured.tok_s, f"{name}/first_ms": 1000 * firsts[len(firsts) // 2]}
    figures |= {"answers": len(expected), "equal": equal(many.answers, expected)}

    which = [rng.randrange(len(bodies)) for _ in range(config.requests)]
    leaves = [rng.choice([None, rng.randrange(40)]) for _ in which]
    parts = [range(start, config.requests, config.clients) for start in range(config.clients)]
    queues = [[(bodies[which[i]], leaves[i]) for i in part] for part in parts]
    received = dict(zip((i for part in parts for i in part), sum(asyncio.run(at_once(port, queues)), [])))
    stayed = [i for i in received if leaves[i] is None]
    begun = [i for i in received if leaves[i] is not None]
    figures |= {
        "leaving/requests": config.requests,
        "leaving/left": sum(received[i].finish is None for i in begun),
        "leaving/stayed": len(stayed),
        "leaving/stayed_equal": equal([received[i] for i in stayed], [alone[which[i]] for i in stayed]),
        "leaving/begun_equal": sum(alone[which[i]].startswith(received[i].text) for i in begun),
    }
    for _ in range(50):  # a row is free within a step
        if not any((left := asyncio.run(load(port))).values()):
            break
        time.sleep(0.1)
    return figures | {f"leaving/{name}": count for name, count in left.items()}


class Rate(NamedTuple):
    """What was received, and tokens a second."""

    answers: list
    tok_s: float


def rate(run: Callable[[], list], repeats: int, tokens: Callable[[list], int] | None = None) -> Rate:
    """The best of several runs."""
    rates = []
    for _ in range(repeats):
        began = time.perf_counter()
        answers = run()
        seconds = time.perf_counter() - began
        rates.append((tokens(answers) if tokens else sum(one.tokens for one in answers)) / seconds)
    return Rate(answers, max(rates))


def equal(answers: Sequence[Received], expected: Sequence[str]) -> int:
    """How many answers are complete and have the expected text."""
    return sum(one.finish is not None and one.text == text for one, text in zip(answers, expected))


def without_server(model: Transformer, tokenizer: Tokenizer, path: Path, prompts, config: Config) -> dict[str, float]:
    """Tokens a second of the engine, of `generate` and of transformers, in one batch and one after the other."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=model.embedding.weight.dtype).eval()
    stop, most = tuple(tokenizer.stops), config.max_completion_length
    sampling = {"do_sample": True, "top_k": 0, "pad_token_id": tokenizer.pad, "max_new_tokens": most}
    sampling |= {"eos_token_id": list(stop)}

    def by_engine(batch: list[list[int]]) -> int:
        answers = [engine.submit(Request(prompt, most, stop=stop, seed=i)) for i, prompt in enumerate(batch)]
        return sum(len(list(answer)) for answer in answers)

    def by_generate(batch: list[list[int]]) -> int:
        return int(generate(model, batch, max_tokens=most, stop=stop).count.sum())

    def by_transformers(batch: list[list[int]]) -> int:
        longest = max(map(len, batch))
        rows = torch.tensor([[tokenizer.pad] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        answers = theirs.generate(input_ids=rows, attention_mask=mask, **sampling)[:, longest:].tolist()
        return sum(next((n for n, token in enumerate(row, 1) if token in stop), len(row)) for row in answers)

    figures = {}
    with Engine(model, config.clients) as engine:
        for name, way in (("engine", by_engine), ("generate", by_generate), ("transformers", by_transformers)):
            way(prompts[:2])  # a warm-up
            few = prompts[:8]
            runs = {"one": lambda: [way([prompt]) for prompt in few], "many": lambda: [way(prompts)]}
            for how, run in runs.items():
                figures[f"{name}/{how}/tok_s"] = rate(run, config.repeats, sum).tok_s
    return figures


def main(config: Config) -> dict[str, float]:
    """Measure, print, and write the figures."""
    path = checkpoint.resolve(config.model, prefer="best")
    model, tokenizer = hf.load(path)
    task = tasks.load(config.task, config.data)
    prompts = encode(tokenizer, tasks.spread(task.problems("test"), config.clients), "chat")
    settings = {"model": "model", "max_tokens": config.max_completion_length}
    bodies = [settings | {"prompt": prompt, "seed": config.seed + i} for i, prompt in enumerate(prompts)]
    result = {"clients": config.clients, "max_tokens": config.max_completion_length}
    with served(path, "--rows", str(config.clients), "--waiting", str(config.clients)) as port:
        result |= with_server(port, bodies, config)
    result |= without_server(model.eval(), tokenizer, path, prompts, config)
    table(f"serving {config.clients} clients", HEAD, rows(result))
    print(finding(result))
    if config.out:
        write_json(config.out, result)
    return result


# ---- the page ----------------------------------------------------------------------------------

HEAD = ["tokens/s", "one at a time", "many at once", "times"]
WAYS = {"": "the server, streamed", "engine/": "the engine", "generate/": "`sample.generate`"}
WAYS |= {"transformers/": "transformers"}


def rows(figures: dict[str, float]) -> list[list[str]]:
    """Tokens a second of each way."""
    pairs = {title: [figures[f"{key}{how}/tok_s"] for how in ("one", "many")] for key, title in WAYS.items()}
    return [[title, f"{one:,.0f}", f"{many:,.0f}", f"{many / one:.1f}"] for title, (one, many) in pairs.items()]


def finding(figures: dict[str, float]) -> str:
    """What became of the answers."""
    first = [f"{figures[f'{how}/first_ms']:.0f} ms" for how in ("one", "many")]
    left, stayed, stayed_equal, begun_equal, running, waiting = (
        figures[f"leaving/{key}"] for key in ("left", "stayed", "stayed_equal", "begun_equal", "running", "waiting")
    )
    begun = figures["leaving/requests"] - stayed
    return (
        f"Of {figures['answers']:,} answers to {figures['clients']} clients at once {figures['equal']:,} are equal to "
        f"those alone; the first text comes after {first[0]} (median) with one client, and after {first[1]} with all. "
        f"Of {figures['leaving/requests']:,} further requests {left:,} were left by their clients. Of the {stayed:,} "
        f"clients who meant to stay {stayed_equal:,} received the whole answer as it is alone; of the {begun:,} others "
        f"{begun_equal:,} a beginning of it. In the end {running} rows were taken and {waiting} requests waited."
    )


def page(figures: dict[str, float]) -> str:
    """The table and the sentence."""
    return f"{markdown_table(HEAD, rows(figures))}\n\n{finding(figures)}"


if __name__ == "__main__":
    cli.run(main, Config)
