"""chat_template.py: a template is compiled once, and one that never ends or fills the memory is stopped."""

import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import pytest

from minir1 import chat_template
from minir1.chat_template import ENVIRONMENT, MEMORY, SECONDS, answer, render
from minir1.tokenizer import TEMPLATE

ROOT = Path(__file__).parent.parent
VALUES = {"messages": [{"role": "user", "content": "2+2?"}]}


def test_a_template_is_compiled_once(monkeypatch):
    sources, compile = [], ENVIRONMENT.compile
    monkeypatch.setattr(ENVIRONMENT, "compile", lambda source: sources.append(source) or compile(source))
    chat_template.compiled.cache_clear()
    for n in range(5):
        messages = [{"role": "user", "content": str(n)}]
        assert answer(TEMPLATE, {"messages": messages}) == (f"User:{n}\nAssistant:", "")
    assert sources == [TEMPLATE]


def test_the_process_that_renders_stays():
    assert render(TEMPLATE, VALUES) == "User:2+2?\nAssistant:"
    first = chat_template._process(os.getpid())
    with pytest.raises(ValueError, match="the chat template is no Jinja: line 1"):
        render("{% if %}", VALUES)
    render(TEMPLATE, VALUES)
    assert chat_template._process(os.getpid()) is first and first.poll() is None
    first.kill()  # by somebody else, a shortage of memory perhaps
    first.wait()
    with pytest.raises(ValueError, match="takes more than"):
        render(TEMPLATE, VALUES)
    assert render(TEMPLATE, VALUES) == "User:2+2?\nAssistant:"


def test_an_interrupt_leaves_no_reply_for_the_next_prompt(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chat_template.select, "select", interrupted)
        render("one", VALUES)
    assert render("two", VALUES) == "two"


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "output": "{% for i in range(99999) %}{% for j in range(99999) %}0123456789{% endfor %}{% endfor %}",
    "words": "{{ lipsum(n=10**9) }}",
    "lists": "{% set s = namespace(a=[1]) %}{% for i in range(60) %}{% set s.a = [s.a, s.a] %}{% endfor %}{{ s.a }}",
    "digits": "{{ 1 | round(10**9, 'ceil') }}",
}
LARGE = {
    "product": "{{ 'x' * 10**10 }}",
    "list": "{{ [1] * 10**10 }}",
    "center": "{{ 'x' | center(10**10) }}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "method": "{{ '{:>10000000000}'.format(1) }}",
    "doubled": "{% set s = namespace(a='x') %}{% for i in range(60) %}{% set s.a = s.a ~ s.a %}{% endfor %}",
    "long": "{{ 'x' * 2 * 10**7 }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "surrogate": "{{ '\\ud800' }}",
    "nested": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "no mapping": "{{ 1 | dictsort }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_never_ends_is_stopped(name, monkeypatch):
    assert chat_template.SECONDS == 5
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="the chat template (takes more|cannot render)"):
        pool.submit(render, ENDLESS[name], VALUES).result()  # no limit needs the main thread
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
    assert render(TEMPLATE, VALUES) == "User:2+2?\nAssistant:"


@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_is_too_large_is_refused(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="the chat template (takes more|cannot render|makes a prompt)") as error:
        render(LARGE[name], VALUES)
    assert "\n" not in str(error.value) and not str(error.value).endswith(": ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_the_memory_of_the_process_is_limited():
    chat_template._process.cache_clear()
    render(TEMPLATE, VALUES)
    limits = open(f"/proc/{chat_template._process(os.getpid()).pid}/limits").read()
    assert str(MEMORY) in limits and MEMORY < 2**30


def test_threads_and_forks_get_their_own_answers():
    def asked(n):
        return render("{{ n }}" + " " * (n % 3), {"n": n}).strip() == str(n)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(asked, range(200)))
    child = os.fork()
    if not child:
        os._exit(0 if all(map(asked, range(50))) else 1)
    assert all(map(asked, range(50))) and os.waitpid(child, 0)[1] == 0


def test_values_that_json_does_not_know_are_written_as_text():
    assert render("{{ day }}", {"day": date(2025, 1, 31)}) == "2025-01-31"


def test_a_template_that_never_ends_ends_with_a_killed_process(tmp_path):
    rendering = f"from minir1 import chat_template as c; c.SECONDS = 600; c.render({ENDLESS['loops']!r}, {{}})"
    parent = subprocess.Popen(
        [sys.executable, "-c", rendering], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if not children.exists():
        parent.kill()
        pytest.skip("no list of child processes")
    while not (child := children.read_text().split()):
        time.sleep(0.01)
    time.sleep(0.5)  # it is rendering
    parent.kill()
    parent.wait()
    command, end = Path(f"/proc/{child[0]}/cmdline"), time.monotonic() + 3 * SECONDS
    while command.exists() and command.read_bytes():  # a process that has ended has no command
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_fork_renders_whatever_other_threads_do():
    with ThreadPoolExecutor(1) as threads:
        threads.submit(lambda: [render(TEMPLATE, VALUES) for _ in range(1000)])
        for _ in range(20):
            if (child := os.fork()) == 0:
                signal.alarm(20)  # a lock that nobody unlocks
                os._exit(render(TEMPLATE, VALUES) != "User:2+2?\nAssistant:")
            assert os.waitpid(child, 0)[1] == 0
