"""A server in a thread, its clients, and what it should answer."""

import json
import threading
import time
from pathlib import Path

import httpx
import openai

from experiments import serve, serve_api, serve_http
from minir1.engine import Engine
from minir1.model import hf
from minir1.sample import generate

ASKED = [{"role": "user", "content": "make 24 from 11,3,3"}]
PROMPT = "User:make 24 from 11,3,3\nAssistant:"
JSON = {"Content-Type": "application/json"}


class Running:
    """A server in a thread: its model, and clients for it."""

    seed = 0  # of an answer with thinking

    def __init__(self, folder: Path, rows: int, waiting: int, slots: int = 512, grace: float = 5.0, **limits):
        self.model, self.tokenizer = hf.load(folder)
        self.model.double()
        self.engine = Engine(self.model, rows, slots, waiting)
        self.service = serve_api.Service(self.engine, self.tokenizer, "toy", **limits)
        self.socket = serve.listening("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        app = serve_api.create(self.service, "127.0.0.1")
        self.server = serve_http.server(app, self.engine, grace, log_level="critical")
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def stop(self):
        self.server.should_exit = True
        self.thread.join()
        self.client.close()
        self.http.close()

    def chat(self, messages=ASKED, **settings):
        return self.client.chat.completions.create(model="toy", messages=messages, **settings)

    def complete(self, prompt=PROMPT, **settings):
        return self.client.completions.create(model="toy", prompt=prompt, **settings)

    def error(self, path="/v1/completions", content=None, **body):
        """Status and error of a request, whose shape is OpenAI's."""
        content = json.dumps({"model": "toy", "prompt": "a", "max_tokens": 2} | body) if content is None else content
        reply = self.http.post(path, content=content, headers=JSON)
        (error,) = reply.json().values()
        assert error.keys() == {"message", "type", "param", "code"} and reply.json().keys() == {"error"}
        return reply.status_code, error

    def idle(self):
        """Wait until no row is taken; fails after a while."""
        for _ in range(200):
            if self.engine.load() == (0, 0):
                return True
            time.sleep(0.02)
        return False


def thinks(text: str) -> bool:
    """Whether an answer has thinking, and an end."""
    return text.startswith("<think>") and text.find("</think>") > 12 and text.endswith("</answer>")


def answers_of(server, prompt: str, count: int = 1, **ways) -> list[str]:
    """The whole texts that `sample.generate` gives, without the end token."""
    sampled = generate(
        server.model, [server.tokenizer.encode(prompt)], answers=count, stop=server.tokenizer.stops,
        **{"max_tokens": 48, "seed": server.seed, **ways},
    )  # fmt: skip
    rows = [row[:n] for row, n in zip(sampled.tokens.tolist(), sampled.count.tolist())]
    return [server.tokenizer.decode([t for t in row if t not in server.tokenizer.stops]) for row in rows]


def wait_for(condition, seconds: float = 10.0) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(condition())
