"""r1_zero under torchrun, in which rank 1 fails in its third update: `torchrun tests/faulty.py FAULT OPTIONS`.

FAULT: kill | hang | nan | memory, in the first start alone; early is `kill` before the first checkpoint; refuse is a
ValueError of rank 1 alone.
"""

import os
import signal
import sys
import time

import torch

from experiments import r1_zero
from minir1 import cli
from minir1.distributed import rank

FAULT = sys.argv.pop(1)
calls, real = 0, r1_zero.weighted_sum


def faulty(weights, loss):
    """The loss of a micro-batch, or the fault."""
    global calls
    calls += 1
    if rank() != 1 or calls != (1 if FAULT == "early" else 12) or int(os.environ["TORCHELASTIC_RESTART_COUNT"]):
        return real(weights, loss)
    print("the fault", file=sys.stderr, flush=True)
    if FAULT in ("kill", "early"):
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT == "hang":
        time.sleep(600)
    if FAULT == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    if FAULT == "refuse":
        raise ValueError("rank 1 does not like this")
    return real(weights, loss) * float("nan")


if __name__ == "__main__":
    r1_zero.weighted_sum = faulty
    cli.run(r1_zero.main, r1_zero.Config)
