"""How long a call takes, whatever else the machine and the test process do."""

import gc
import time


def quickest(function, *arguments, times: int = 3) -> float:
    """Least processor seconds of this thread over so many calls, without collections of garbage.

    A wall clock also counts other programs; in a large test process one collection takes half a second.
    Time in other threads and processes isn't counted.
    """
    laps = []
    gc.disable()
    try:
        for _ in range(times):
            began = time.thread_time()
            function(*arguments)
            laps.append(time.thread_time() - began)
    finally:
        gc.enable()
    return min(laps)
