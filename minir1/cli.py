"""How a script starts: its options are read from the command line, and bad input is one line."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Callable

import tyro


def run(main: Callable, config: type, **settings) -> None:
    """Call `main` with the options of the command line, as the dataclass `config` describes them.

    settings: those of tyro.cli, such as default=Config(steps=10). Input that this project refuses (ValueError) is
    printed as `error: what is wrong and what is allowed`, and the process ends with code 2. Any other exception keeps
    its traceback, such as the RuntimeError of a failed training.
    """
    options = tyro.cli(config, **settings)
    try:
        main(options)
    except ValueError as error:
        if not _refusal(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _refusal(error: ValueError) -> bool:
    """Whether a `raise` in this project made the error. Any other ValueError is a bug, and needs its traceback."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    statement = linecache.getline(frame.f_code.co_filename, line).strip()
    package = frame.f_globals["__name__"].partition(".")[0]
    return package in ("minir1", "experiments", "__main__") and statement.startswith("raise ")
