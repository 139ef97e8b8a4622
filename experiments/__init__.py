"""The scripts: one stage of the recipe a file, run as `python -m experiments.NAME`."""

import sys

if sys.argv[0] == "-m":  # Python is about to run a script: Ctrl-C while it imports is a line, as later in minir1/cli.py
    sys.excepthook = lambda kind, *error: (
        print("interrupted", file=sys.stderr) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *error)
    )
