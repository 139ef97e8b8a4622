"""The processes of minir1/sandbox.py: a warden, which starts and watches a driver (the tests) and a candidate.

They run with the standard library alone, so these modules import nothing else. This one does not need POSIX either.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BOOT = "import sys; sys.path[0] = {!r}; from minir1.sandboxed import warden; del sys.path[0]; warden.{}(*{!r})"


def interpreter(function: str, arguments: list, root: str = ROOT) -> list[str]:
    """The command that runs a function of warden.py in a bare interpreter. root: the folder that minir1 is in."""
    return [os.path.realpath(sys.executable), "-s", "-S", "-c", BOOT.format(root, function, arguments)]
