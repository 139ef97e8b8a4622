"""Functions in worker processes, each call with a time limit that always holds.

    workers.call(equal, "1/2", "0.5", seconds=5)

A thread cannot be stopped, and a limit by SIGALRM works in the main thread alone. A process can be killed, whatever it
does. Workers are reused from call to call, any thread may call, and as many calls run at once as there are cores.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable

START = 120  # seconds for a worker to start and to import a function's module, which are not in a call's limit
MEMORY = 4 * 2**30  # bytes of address space of a worker
SLOTS = threading.BoundedSemaphore(os.cpu_count() or 1)  # calls at once
idle: list[Worker] = []  # of this process: pop and append are atomic


def _forked() -> None:
    """A fork must share neither its parent's pipes nor the slots that other threads of the parent hold."""
    global SLOTS
    SLOTS = threading.BoundedSemaphore(os.cpu_count() or 1)
    idle.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
atexit.register(lambda: [worker.end() for worker in idle])


class Worker:
    """A process that answers requests, JSON lines, one after the other."""

    def __init__(self):
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}  # equal results in all of them
        environment = os.environ | fixed
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, "-c", "from minir1 import workers; workers.serve()"]
        self.process = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)
        self.imported: set[tuple] = set()

    def ask(self, request: list, seconds: float) -> dict | None:
        """The reply, or None if there is none after so many seconds; then the worker has been killed."""
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), self.process.kill()))
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended
                print(json.dumps(request), file=self.process.stdin, flush=True)
            reply = self.process.stdout.readline()  # "" when it ends
        finally:
            timer.cancel()
            timer.join()
        if late.is_set():
            return None
        return json.loads(reply) if reply else {"error": "the worker process ended", "ended": True}

    def end(self) -> None:
        """Kill the process and close its pipes."""
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()


def call(function: Callable, *args, seconds: float):
    """`function(*args)` from a worker process. The arguments and the result are passed on as JSON.

    function: defined at the top of a module, or of a file that holds a task. TimeoutError after `seconds`, and
    RuntimeError if the function raises or its process ends (both lose this one call: the next gets another worker).
    """
    source = [function.__module__, function.__code__.co_filename, function.__qualname__]
    with SLOTS:
        worker = _ready()
        healthy = False
        try:
            reply = {}
            if tuple(source) not in worker.imported:
                reply = worker.ask([START, source, None], START)
                worker.imported.add(tuple(source))
            if reply is not None and "error" not in reply:
                reply = worker.ask([seconds, source, args], seconds)
            healthy = reply is not None and "ended" not in reply
        finally:  # also after Ctrl-C: a late reply must not be the next call's
            idle.append(worker) if healthy else worker.end()
    if reply is None:
        raise TimeoutError(f"{function.__qualname__} takes more than {seconds} s")
    if "error" in reply:
        raise RuntimeError(f"{function.__qualname__}: {reply['error']}")
    return reply["result"]


def raised_at(error: Exception, file: str) -> str:
    """The innermost line of a file that an error went through, as " at FILE:LINE"; "" if it went through none."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" at {file}:{lines[-1]}" if lines else ""


def _ready() -> Worker:
    """An idle worker whose process still runs, or a new one."""
    with contextlib.suppress(IndexError):  # asking first whether there is one would not be atomic
        while True:
            worker = idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.end()
    return Worker()


def serve() -> None:
    """Answer each line of standard input, [seconds, source, args]: import the function if args is null, or call it."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows; macOS limits no memory
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a function prints is no reply
    for line in sys.stdin:
        seconds, source, args = json.loads(line)
        if hasattr(signal, "alarm"):
            signal.alarm(int(seconds) + 2)  # ends a worker whose parent was killed and cannot end it
        try:
            function = _function(*source)
            reply = json.dumps({"result": None if args is None else function(*args)})
        except Exception as error:  # whatever a function raises is the caller's to judge
            reply = json.dumps({"error": f"{type(error).__name__}: {str(error)[:300]}{raised_at(error, source[1])}"})
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        print(reply, file=replies, flush=True)


def _function(module: str, file: str, name: str) -> Callable:
    """A function by its module, or by its file where the module cannot be imported by name."""
    if module not in sys.modules:
        if module != "__main__" and importlib.util.find_spec(module):
            importlib.import_module(module)
        else:
            spec = importlib.util.spec_from_file_location(module, file)
            sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module])
    return getattr(sys.modules[module], name)
