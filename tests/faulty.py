"""r1_zero in which rank 1 fails: `torchrun tests/faulty.py FAULTS OPTIONS`, a fault of each start, joined by +.

    kill | hang | memory | nan, each followed by the number of the micro-batch in which it happens; none
"""

import os
import signal
import sys
import time

START, FAULT = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), sys.argv.pop(1).split("+")
kind, _, moment = (FAULT[START] if START < len(FAULT) else "none").partition(":")
calls = 0


def note(what: str) -> None:
    """A line with the time, in one piece, as other ranks print too."""
    os.write(2, f"rank {os.environ['RANK']} {what} at {time.time():.2f}\n".encode())


def faulty(weights, loss):
    """The loss of a micro-batch, or the fault."""
    global calls
    calls += 1
    if os.environ["RANK"] != "1" or kind == "none" or calls != int(moment):
        return real(weights, loss)
    note(f"has the fault {kind}")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(600)
    if kind == "memory":
        torch.empty(2**60)
    return real(weights, loss) * float("nan")


if __name__ == "__main__":
    note("starts")
    import torch

    from experiments import r1_zero
    from minir1 import cli

    r1_zero.weighted_sum, real = faulty, r1_zero.weighted_sum
    cli.run(r1_zero.main, r1_zero.Config, on_ranks=True)
