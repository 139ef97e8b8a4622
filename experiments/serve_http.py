"""The HTTP server of experiments/serve.py: uvicorn, with an end that answers every client."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from experiments.serve_body import ApiError
from minir1.engine import Engine

KEPT_OPEN = 75  # seconds; clients close unused connections after less, so none is closed while it is used again


class Server(uvicorn.Server):
    """uvicorn's. When it is stopped, it closes the engine after `grace` seconds, so that answers end as errors, and the
    connections a second later. It stops once the engine has failed."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float):
        super().__init__(config)
        self.engine, self.grace = engine, grace

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop."""
        return await super().on_tick(counter) or self.engine.error is not None

    async def shutdown(self, sockets=None) -> None:
        """Accept nothing more, and end."""
        asyncio.get_running_loop().call_later(self.grace, self.engine.close)
        await super().shutdown(sockets)


def server(app: FastAPI, engine: Engine, grace: float, log_level: str = "warning") -> Server:
    """A server of the application that the engine answers for."""
    times = {"timeout_keep_alive": KEPT_OPEN, "timeout_graceful_shutdown": grace + 1}
    return Server(uvicorn.Config(app, log_level=log_level, **times), engine, grace)


def shown(error: ApiError) -> JSONResponse:
    """An error as a response. A client may try again after 429 and 503; what is left of a body is not read."""
    headers = {429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}, 408: LAST, 413: LAST}
    return JSONResponse(error.body, error.status, headers.get(error.status))


LAST = {"Connection": "close"}


def limited(app: Callable[..., Awaitable], most: int, seconds: float) -> Callable[..., Awaitable]:
    """ASGI middleware that refuses bodies of more than `most` bytes with 413, before they are read where the header
    says so, and with 408 those that have not arrived after some seconds."""
    too_long = f"The body of the request has more than {most} bytes."

    async def call(scope, receive, send) -> None:
        stated = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if stated.isdecimal() and int(stated[:20]) > most:
            await shown(ApiError(413, too_long))(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        read, more, deadline = 0, scope["type"] == "http", loop.time() + seconds

        async def counted():
            nonlocal read, more
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time() if more else None)
            except asyncio.TimeoutError as error:
                raise HTTPException(408, f"The body of the request had not arrived after {seconds:g} s.") from error
            read, more = read + len(message.get("body", b"")), more and message.get("more_body", False)
            if read > most:
                raise HTTPException(413, too_long)
            return message

        await app(scope, counted, send)

    return call


def named(app: Callable[..., Awaitable], names: Sequence[str]) -> Callable[..., Awaitable]:
    """ASGI middleware that refuses requests to other names than these with 400, against DNS rebinding."""

    async def call(scope, receive, send) -> None:
        if scope["type"] != "lifespan":
            host = Headers(scope=scope).get("host", "")
            name = re.sub(":[0-9]*$", "", host).lower()
            if name not in map(str.lower, names):
                text = f"The server is not called '{host}': it answers to {', '.join(names)}."
                await shown(ApiError(400, text, "invalid_host"))(scope, receive, send)
                return
        await app(scope, receive, send)

    return call
