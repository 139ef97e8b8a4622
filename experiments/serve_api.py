"""The server's routes: OpenAI's chat completions, completions and models, over one engine.

Every answer to a request is a row of the engine: choice i of a request with a seed is row i of
`sample.generate(model, prompts, answers=n, seed=seed)`. When the client leaves, the rows are free within a step. Errors
have OpenAI's shape: 400 what cannot be answered, 404 another model or path, 408 a body that does not arrive within
MOST_SECONDS, 413 one above MOST_BYTES, 429 a full queue, 503 no answer within the time limit or a server that shuts
down, 500 an engine that failed.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from experiments.serve_answer import (
    Choice,
    Closed,
    Delta,
    characters,
    chat_logprobs,
    chat_message,
    completion_logprobs,
    usage,
)
from experiments.serve_body import ApiError, Chat, Completion, Message, Sampling, explained, unread
from experiments.serve_http import limited, named, shown
from minir1 import conversation, engine, templates
from minir1.address import is_loopback, own_names
from minir1.engine import Engine, Full
from minir1.tokenizer import Tokenizer

MOST_BYTES = 2**23  # of the body of a request
MOST_SECONDS = 60.0  # until it has arrived


@dataclass(frozen=True)
class Service:
    """What is served, and its limits."""

    engine: Engine
    tokenizer: Tokenizer
    name: str  # of the model
    max_tokens: int = 1024  # of an answer to a request that names no limit
    timeout: float = 600.0  # seconds for a whole answer, the time in the queue included


def create(service: Service, host: str) -> FastAPI:
    """The application at an address; the engine runs while the application does."""

    @asynccontextmanager
    async def lifespan(_):
        with service.engine:
            yield

    app = FastAPI(title="minir1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(limited, most=MOST_BYTES, seconds=MOST_SECONDS)
    if is_loopback(host):
        app.add_middleware(named, names=own_names(host))
    app.add_exception_handler(ApiError, lambda _, error: shown(error))
    app.add_exception_handler(RequestValidationError, lambda _, error: shown(explained(error.errors())))
    app.add_exception_handler(HTTPException, lambda _, error: shown(failed(error)))
    app.add_exception_handler(Closed, lambda _, error: shown(failed(error)))
    app.add_exception_handler(Exception, lambda _, error: shown(failed(error)))
    model = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "minir1"}

    @app.get("/health")
    def health() -> dict:
        if service.engine.error is not None:
            raise ApiError(503, f"the engine has failed: {service.engine.error}.", "unavailable")
        return dict(zip(("running", "waiting"), service.engine.load()))

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    def one_model(name: str) -> dict:
        check_name(service, name)
        return model

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Response:
        check_name(service, body.model)
        prompt, opened = await run_in_threadpool(chat_prompt, service.tokenizer, body.messages)
        limit = body.max_completion_tokens or body.max_tokens
        top = body.top_logprobs if body.logprobs else None
        reply = Reply(service, body, "chat", [prompt], limit, top, opened)
        return await reply.response(request)

    @app.post("/v1/completions")
    async def completion(body: Completion, request: Request) -> Response:
        check_name(service, body.model)
        prompts = await run_in_threadpool(raw_prompts, service.tokenizer, body.prompt)
        reply = Reply(service, body, "text", prompts, body.max_tokens, body.logprobs, None)
        return await reply.response(request)

    return app


# ---- a request's prompts -----------------------------------------------------------------------


def check_name(service: Service, name: str) -> None:
    """404 for a model that is not served."""
    if name != service.name:
        message = f"The model '{name}' is not served here; '{service.name}' is."
        raise ApiError(404, message, "model_not_found", "model")


def chat_prompt(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], bool]:
    """The tokens of the chat template over some messages, and whether it has opened <think> for the model.

    The thinking of earlier answers is left out, and their special tokens are plain text, as in the chat. ApiError for a
    model without a template.
    """
    if not tokenizer.template:
        message = "This model has no chat template: send the whole prompt to /v1/completions instead."
        raise ApiError(400, message, "invalid_value", "messages")
    roles = {"developer": "system"}  # the newer name
    turns = [
        {"role": roles.get(message.role, message.role), "content": "".join(part.text for part in message.content)}
        for message in messages
    ]
    try:
        text = tokenizer.render(conversation.prepared(tokenizer, turns))
    except ValueError as error:
        raise ApiError(400, str(error), "invalid_value", "messages") from error
    return tokenizer.encode(text), templates.opened(text) == "<think>"


def raw_prompts(tokenizer: Tokenizer, prompts: list) -> list[list[int]]:
    """The tokens of texts, special tokens written in them included; lists of tokens are left as they are."""
    return [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


# ---- its answers -------------------------------------------------------------------------------


class Reply:
    """The choices of one request, from the engine to the client."""

    def __init__(
        self,
        service: Service,
        body: Sampling,
        kind: str,  # "chat" | "text"
        prompts: list[list[int]],
        limit: int | None,  # tokens of an answer
        top: int | None,  # most likely tokens to report; None: no log-probs
        opened: bool | None,  # as for Choice
    ):
        self.service, self.body, self.kind, self.prompts, self.top = service, body, kind, prompts, top
        rows, most = len(prompts) * body.n, service.engine.rows + service.engine.waiting
        if rows > most:
            message = f"{len(prompts)} prompts with n = {body.n} are {rows} answers: this server takes at most {most}."
            raise ApiError(400, message, "invalid_value", "n")
        self.offsets = [0] * rows  # characters of the tokens that were reported, by choice
        self.fresh = set(range(rows))  # choices without a chunk so far
        name = {"chat": "chatcmpl", "text": "cmpl"}[kind]
        self.head = {"id": f"{name}-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
        self.arrived = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wake():  # in the engine's thread
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self.arrived.set)

        seed = secrets.randbelow(2**63) if body.seed is None else body.seed % 2**63
        settings = {name: getattr(body, name) for name in ("temperature", "top_p")}
        for name, value in settings.items():
            settings[name] = service.tokenizer.recommended(name, 1.0) if value is None else value
        settings["top_p"] = settings["top_p"] or 1e-9  # 0: the most likely token
        settings |= {"top_k": body.top_k, "seed": seed, "top_logprobs": top or 0}
        settings |= {"stop": tuple(service.tokenizer.stops)}
        self.choices: list[Choice] = []
        try:
            for row in range(rows):
                prompt = prompts[row // body.n]
                wanted = engine.Request(prompt, self.budget(prompt, limit), **settings, row=row)
                answer = service.engine.submit(wanted, wake)
                self.choices.append(Choice(row, answer, service.tokenizer, body.stop, opened))
        except Full as error:
            self.cancel()
            raise ApiError(429, f"The server is busy: {error}. Try again later.", "rate_limit_exceeded") from error
        except ValueError as error:
            self.cancel()
            raise ApiError(400, str(error), "invalid_value") from error
        except RuntimeError as error:  # closed, or failed
            self.cancel()
            raise ApiError(503, f"{error}.", "unavailable") from error

    def budget(self, prompt: list[int], limit: int | None) -> int:
        """The tokens that an answer may have; ApiError where prompt and answer do not fit into a row."""
        slots, count = self.service.engine.slots, len(prompt)
        if slots - count < (limit or 1):
            asked = f"the prompt has {count}" + (f", and {limit} more were asked for" if limit else "")
            message = f"This server's maximum context length is {slots} tokens: {asked}."
            raise ApiError(400, message, "context_length_exceeded", {"chat": "messages", "text": "prompt"}[self.kind])
        return limit or min(self.service.max_tokens, slots - count)

    def cancel(self) -> None:
        """Free the rows of what has not ended."""
        for choice in self.choices:
            choice.answer.cancel()

    async def response(self, request: Request) -> Response:
        """All at once, or as server-sent events."""
        if self.body.stream:
            return Events(self, request)
        deltas: list[list[Delta]] = [[] for _ in self.choices]
        async with aclosing(self.deltas(request)) as arriving:
            async for delta in arriving:
                deltas[delta.index].append(delta)
        if any(choice.finish is None for choice in self.choices):  # the client has left
            return Response(status_code=499)
        choices = [self.whole(of_choice) for of_choice in deltas]
        return JSONResponse({**self.head, "object": self.object_name(), "choices": choices, "usage": self.usage()})

    async def deltas(self, request: Request) -> AsyncIterator[Delta]:
        """What arrives, until all choices have finished or the client has left. ApiError when the time is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.service.timeout
        timer = loop.call_at(deadline, self.arrived.set)
        left = loop.create_task(disconnected(request))
        left.add_done_callback(lambda _: self.arrived.set())
        running = self.choices
        try:
            while running and not left.done():
                await self.arrived.wait()
                self.arrived.clear()
                for choice in running:
                    if delta := choice.advance():
                        yield delta
                running = [choice for choice in running if choice.finish is None]
                if running and loop.time() >= deadline:
                    raise ApiError(503, f"No answer within {self.service.timeout:g} seconds.", "timeout")
        finally:
            timer.cancel()
            left.cancel()
            self.cancel()

    async def events(self, request: Request) -> AsyncIterator[str]:
        """The answer as server-sent events; what goes wrong is the last of them."""
        head = self.head | {"object": self.object_name(chunk=True)}
        if self.body.stream_options and self.body.stream_options.include_usage:
            head["usage"] = None
        try:
            async with aclosing(self.deltas(request)) as arriving:
                async for delta in arriving:
                    yield event({**head, "choices": [self.chunk(delta)]})
            if "usage" in head:
                yield event({**head, "choices": [], "usage": self.usage()})
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield event(failed(error).body)
            if not isinstance(error, (ApiError, Closed)):
                raise  # to be logged

    def object_name(self, chunk: bool = False) -> str:
        """The name of the object in OpenAI's API."""
        return "text_completion" if self.kind == "text" else f"chat.completion{'.chunk' if chunk else ''}"

    def usage(self) -> dict:
        """Tokens of the prompts and of the answers."""
        return usage(sum(map(len, self.prompts)), self.choices)

    def whole(self, deltas: list[Delta]) -> dict:
        """A choice of an answer that is sent at once."""
        thinking, text = ("".join(getattr(delta, name) for delta in deltas) for name in ("thinking", "text"))
        drawn = [one for delta in deltas for one in delta.drawn]
        one = self.chunk(Delta(deltas[-1].index, thinking, text, drawn, deltas[-1].finish))
        if self.kind == "chat":
            empty = {"content": "", "reasoning_content": None, "refusal": None}
            one["message"] = {"role": "assistant"} | empty | one.pop("delta")
        return one

    def chunk(self, delta: Delta) -> dict:
        """A choice of a chunk. The first of each choice names the role, the last how it finished."""
        index, tokenizer = delta.index, self.service.tokenizer
        one = {"index": index, "finish_reason": delta.finish, "logprobs": None}
        if self.kind == "text":
            one["text"] = delta.text
            if self.top is not None:
                one["logprobs"] = completion_logprobs(delta.drawn, tokenizer, self.offsets[index])
                self.offsets[index] += characters(tokenizer, delta.drawn)
            return one
        role = {"role": "assistant"} if index in self.fresh else {}
        self.fresh.discard(index)
        one["delta"] = role | chat_message(delta.thinking, delta.text)
        if self.top is not None:
            one["logprobs"] = chat_logprobs(delta.drawn, tokenizer)
        return one


class Events(StreamingResponse):
    """A reply as server-sent events, whose rows are free however it ends."""

    def __init__(self, reply: Reply, request: Request):
        super().__init__(reply.events(request), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.reply = reply

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reply.cancel()


def event(content: dict) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


async def disconnected(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ---- errors ------------------------------------------------------------------------------------


def failed(error: Exception) -> ApiError:
    """What a client sees of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return unread(error) or ApiError(error.status_code, str(error.detail))
    if isinstance(error, Closed):
        return ApiError(503, f"{error}.", "shutting_down")
    return ApiError(500, f"The server failed: {type(error).__name__}: {error}")
