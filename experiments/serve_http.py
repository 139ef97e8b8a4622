"""The HTTP server of experiments/serve.py: uvicorn, with an end that answers every client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException

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


def limited(app: Callable[..., Awaitable], most: int) -> Callable[..., Awaitable]:
    """ASGI middleware that refuses bodies of more than `most` bytes with 413."""

    async def call(scope, receive, send) -> None:
        read = 0

        async def counted():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise HTTPException(413, f"The body of the request has more than {most} bytes.")
            return message

        await app(scope, counted, send)

    return call
