"""What a client may ask of the server: the bodies of OpenAI's API, checked by pydantic, and its errors.

A field that is null counts as absent. Fields that change nothing here are ignored. Fields of OpenAI's API that are not
supported are refused, unless they have a value that asks for nothing (`neutral`); so are fields that the API does not
know, as OpenAI does. One field is not OpenAI's: top_k.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        message, param = (text and text.encode(errors="replace").decode() for text in (message, param))
        self.status = status
        kind = "server_error" if status >= 500 else "requests" if status == 429 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Body(BaseModel):
    """An object without nulls, and without what is ignored or asks for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)
    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[dict[str, tuple]] = {}  # field that is not supported -> the values that ask for nothing

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, body):
        if not isinstance(body, dict):
            return body
        used = {name: value for name, value in body.items() if value is not None and name not in cls.ignored}
        for name in cls.neutral.keys() & used.keys():
            if used.pop(name) not in cls.neutral[name]:
                text = f"Unsupported parameter: '{name}' is not supported by this server."
                raise PydanticCustomError("unsupported_parameter", "{text}", {"text": text, "param": name})
        return used


HALF = "Unicode text; half of a surrogate pair is none"


def whole(text: str) -> str:
    """A text without halves of surrogate pairs, which JSON can write as \\ud800 and no encoding has."""
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(HALF)
    return text


Text = Annotated[str, AfterValidator(whole)]
Stop = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(whole)]


def drawable(temperature: float | None) -> float | None:
    """A temperature that logits can be divided by, or 0."""
    if temperature and temperature < 1e-6:
        raise ValueError("0 (the most likely token), or at least 1e-6")
    return temperature


def listed(value):
    """One text as a list of one."""
    if not isinstance(value, str | list):
        raise ValueError("a text, or a list of texts")
    return [value] if isinstance(value, str) else value


def parts(content):
    """A text as a list of parts of a message."""
    if not isinstance(content, str | list):
        raise ValueError("a text, or a list of parts such as {'type': 'text', 'text': '…'}")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def prompts(value):
    """A text, tokens, or a list of either, as a list of texts and lists of tokens."""
    tokens = lambda entry: isinstance(entry, list) and all(type(token) is int for token in entry)
    entries = [value] if isinstance(value, str) or tokens(value) else value
    fine = lambda entry: entry and (isinstance(entry, str) or tokens(entry))
    if not isinstance(entries, list) or not all(map(fine, entries)):
        raise ValueError("a text, a list of tokens, or a list of either; none of them empty")
    return [whole(entry) if isinstance(entry, str) else entry for entry in entries]


class StreamOptions(Body):
    """Of a streamed answer."""

    ignored = frozenset(["include_obfuscation"])

    include_usage: bool = False  # a last chunk with the usage


class Sampling(Body):
    """What chats and completions have in common."""

    ignored = frozenset(
        "user metadata store service_tier safety_identifier parallel_tool_calls prompt_cache_key prompt_cache_options "
        "prompt_cache_retention".split()
    )
    neutral = {
        "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
        "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
        "modalities": (["text"],), "echo": (False,), "suffix": ("",), "best_of": (1,), "reasoning_effort": ("none",),
        "web_search_options": ({},), "verbosity": ("medium",), "prediction": (), "audio": (), "moderation": (),
    }  # fmt: skip

    model: str
    # None: as generation_config.json recommends, else 1
    temperature: Annotated[float | None, AfterValidator(drawable)] = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)  # None: as generation_config.json recommends, else 1
    top_k: int = Field(0, ge=0, lt=2**31)  # not OpenAI's; 0: all
    n: int = Field(1, ge=1, le=128)  # answers to each prompt
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)  # None: another for each request
    stop: Annotated[list[Stop], BeforeValidator(listed)] = Field([], max_length=4)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _streamed(self):
        if self.stream_options and not self.stream:
            text = "Invalid value for 'stream_options': 'stream' must be true for it."
            raise PydanticCustomError("invalid_value", "{text}", {"text": text, "param": "stream_options"})
        return self


class Part(Body):
    """Text in a message."""

    ignored = frozenset(["prompt_cache_breakpoint"])

    type: Literal["text"]
    text: Text


class Message(Body):
    """A turn of a chat."""

    ignored = frozenset("name refusal annotations reasoning_content".split())
    neutral = {"tool_calls": ([],), "function_call": (), "audio": ()}

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(parts)]


class Chat(Sampling):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)  # the newer name of max_tokens, and before it
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def _consistent(self):
        if self.top_logprobs and not self.logprobs:
            text = "Invalid value for 'top_logprobs': 'logprobs' must be true for it."
            raise PydanticCustomError("invalid_value", "{text}", {"text": text, "param": "top_logprobs"})
        return self


class Completion(Sampling):
    """POST /v1/completions"""

    prompt: Annotated[list, BeforeValidator(prompts)] = Field(min_length=1)
    logprobs: int | None = Field(None, ge=0, le=5)  # how many of the most likely tokens; None: no log-probs


UNREADABLE = {UnicodeDecodeError: "not UTF-8", RecursionError: "nested too deeply"}


def unread(error: Exception) -> ApiError | None:
    """Why a body could not be read as JSON, from what FastAPI raises in place of the cause; None for other errors."""
    why = UNREADABLE.get(type(error.__cause__))
    return why and ApiError(400, f"The body of the request is {why}.")


def explained(errors: list[dict]) -> ApiError:
    """The first thing that pydantic found wrong with a body, in OpenAI's words."""
    first = errors[0]
    kind, path = first["type"], ""
    for step in first["loc"][1:]:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    if "param" in first.get("ctx", {}):
        path = ".".join(filter(None, (path, first["ctx"]["param"])))
        return ApiError(400, first["ctx"]["text"], kind, path)
    if not path and isinstance(first.get("input"), bytes):  # FastAPI leaves the body of other types as it is
        return ApiError(400, "The Content-Type of the request must be application/json.")
    if kind == "json_invalid" or not path:
        return ApiError(400, "The body of the request is no JSON object.")
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: '{path}'.", "missing_required_parameter", path)
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{path}'.", "unknown_parameter", path)
    said = re.sub("^(Value error, |Input should be |(List|String) should have )", "", first["msg"])
    reason = {"list_type": "a list", "string_type": "a text", "string_unicode": HALF}
    reason |= dict.fromkeys(("model_type", "model_attributes_type"), "an object")
    reason = reason.get(kind, said)
    return ApiError(400, f"Invalid value for '{path}': expected {reason}.", "invalid_value", path)
