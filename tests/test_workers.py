"""workers.py: results, errors, time limits and crashes, from several threads."""

import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from minir1 import workers
from minir1.tasks import load


def add(a, b):
    return a + b


def process():
    print("noise")  # no reply
    return os.getpid()


def fail():
    raise KeyError("which")


def sleep(seconds):
    time.sleep(seconds)
    return seconds


def loop():
    while True:
        pass


def crash():
    os._exit(3)


def no_json():
    return {1, 2}


def swallow():
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass


def fill():
    return len("x" * 10**11)


def test_a_worker_that_another_thread_takes_first_is_no_error(monkeypatch):
    class Raced(list):
        def __len__(self):  # there was one a moment ago
            return 1

    monkeypatch.setattr(workers, "idle", Raced())
    assert workers.call(add, 2, 3, seconds=20) == 5
    workers.idle.pop().end()


def test_results_are_those_of_the_function():
    assert workers.call(add, 2, 3, seconds=20) == 5
    assert workers.call(add, "a\n", "é\u2028", seconds=20) == "a\né\u2028"


def test_a_worker_is_another_process_and_is_reused():
    first = workers.call(process, seconds=20)
    assert first != os.getpid() and workers.call(process, seconds=20) == first


@pytest.mark.parametrize(
    "function, error",
    [
        (fail, f"fail: KeyError: 'which' at {re.escape(__file__)}:{fail.__code__.co_firstlineno + 1}$"),
        (crash, "crash: the worker process"),
        (no_json, "no_json: TypeError: [^/]*$"),  # of no line of this file
        (fill, "fill: MemoryError"),
    ],
)
def test_an_error_loses_one_call(function, error):
    with pytest.raises(RuntimeError, match=error):
        workers.call(function, seconds=20)
    assert workers.call(add, 1, 1, seconds=20) == 2


@pytest.mark.parametrize("function", [loop, swallow])
def test_a_call_that_never_ends_is_killed(function):
    workers.call(add, 1, 1, seconds=20)
    began = time.perf_counter()
    with pytest.raises(TimeoutError, match=f"{function.__name__} takes more than 0.3 s"):
        workers.call(function, seconds=0.3)
    assert time.perf_counter() - began < 20
    assert workers.call(add, 1, 1, seconds=20) == 2


def test_many_threads_get_their_own_results():
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: workers.call(add, n, n, seconds=60), range(60)))
    assert results == [2 * n for n in range(60)]


def test_a_thread_that_is_not_the_main_one():
    results = []
    thread = threading.Thread(target=lambda: results.append(workers.call(add, 3, 4, seconds=20)))
    thread.start()
    thread.join()
    assert results == [7]


def test_a_task_of_a_users_file_can_use_them(tmp_path):
    (tmp_path / "slow.py").write_text(
        "from minir1 import workers\nfrom minir1.tasks import Problem, Verdict\n"
        "def same(a, b): return a == b\n"
        "def problems(split, data): return [Problem('q', 'a')]\n"
        "def verify(problem, text):\n"
        "    right = workers.call(same, problem.reference, text, seconds=20)\n"
        "    return Verdict('right' if right else 'wrong', {})\n"
    )
    task = load(tmp_path / "slow.py")
    assert [task.verify(task.problems("train")[0], text).status for text in "ab"] == ["right", "wrong"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_does_not_share_workers():
    mine = workers.call(process, seconds=20)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, str(workers.call(process, seconds=60)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(read, 20)) != mine and workers.call(process, seconds=20) == mine


def test_a_worker_that_was_killed_while_it_was_idle_loses_no_call():
    assert workers.call(os.path.join, "a", "b", seconds=5) == "a/b"
    workers.idle[-1].process.kill()
    workers.idle[-1].process.wait()
    assert workers.call(os.path.join, "a", "b", seconds=5) == "a/b"
