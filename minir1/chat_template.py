"""Chat templates in Jinja, rendered in a process of their own, which has little memory and little time.

A template comes with a downloaded checkpoint. jinja's sandbox keeps it away from files, but not from loops that never
end or texts that fill the memory. The limits of a process do, whatever the template calls.
"""

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from threading import Lock

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, MEMORY, LONGEST = 5, 2**29, 10**7  # for one prompt; bytes of the process; characters of a prompt
LOCK = Lock()
if hasattr(os, "register_at_fork"):  # a fork waits for other threads: in the child nobody would unlock it
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


def render(template: str, values: dict) -> str:
    """The text of a template with `values`, passed on as JSON. Once it is compiled, a prompt takes about 0.1 ms.

    ValueError if the template is no Jinja, leaves the sandbox, needs a variable that is not set, itself refuses the
    messages, or exceeds SECONDS, MEMORY or LONGEST.
    """
    asked, reply = json.dumps([template, values], default=str), ""
    with LOCK:
        process = _process(os.getpid())
        try:
            with suppress(BrokenPipeError):  # it has ended
                print(asked, file=process.stdin, flush=True)
                reply = process.stdout.readline() if select.select([process.stdout], [], [], SECONDS)[0] else ""
        finally:  # a late reply must not be the next one's, also after Ctrl-C
            if not reply:
                process.kill()
                process.wait()
                _process.cache_clear()
    text, error = json.loads(reply or f'["", "takes more than {SECONDS} s or {MEMORY >> 20} MiB"]')
    if error:
        raise ValueError(f"the chat template {error}")
    return text


@lru_cache(maxsize=1)
def _process(parent: int) -> subprocess.Popen:
    """The process that renders for one process (a fork must not share it)."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, __file__], text=True, start_new_session=True, **pipes)
    process.stdout.readline()  # it has started
    return process


def serve() -> None:
    """Answer each line of standard input, [template, values], by [text, error]."""
    import resource  # not on Windows

    with suppress(ValueError, OSError):  # macOS limits no memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(flush=True)
    for line in sys.stdin:
        signal.alarm(SECONDS + 1)  # ends this process where the other one is gone and cannot
        print(json.dumps(answer(*json.loads(line))), flush=True)
        signal.alarm(0)


def answer(template: str, values: dict) -> tuple[str, str]:
    """The text, or "" and the error."""
    try:
        text = compiled(template).render(values)
        text.encode()  # fails for half a surrogate pair
    except TemplateSyntaxError as error:
        return "", f"is no Jinja: line {error.lineno}: {error}"
    except Exception as error:  # any that a template may cause
        return "", f"cannot render these messages: {str(error) or type(error).__name__}"
    return (text, "") if len(text) <= LONGEST else ("", f"makes a prompt of {len(text):,} characters")


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, which marks what a model wrote and changes no text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise(message: str):
    raise TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja's own escapes <, > and &, for web pages
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# With what Hugging Face lets a template use: trimmed blocks, break and continue, three functions.
ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
)
ENVIRONMENT.filters["tojson"] = _tojson
ENVIRONMENT.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
compiled = lru_cache(ENVIRONMENT.from_string)

if __name__ == "__main__":
    serve()
