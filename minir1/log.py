"""A run is a folder: config.json, metrics.jsonl, samples.jsonl, result.json, rollouts/, figures/, checkpoint/.

The log files are plain text that any tool can read during the run. Each call opens, appends and closes, so a killed run
loses at most its last line, and `start` truncates the files to the checkpoint from which a run resumes. rollouts/ has a
file per step that is stored (rollout_file.py); those of later steps are deleted then.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from rich import get_console
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from minir1.files import plain, read_json, replace_text, write_json
from minir1.ranks import on_first, rank

LOGS = ("metrics.jsonl", "samples.jsonl")
WANDB_MODES = ("off", "online", "offline")
MAY_CHANGE = (  # what a resumed run may change
    "resume", "steps", "out", "wandb", "microbatch", "recompute", "store_steps", "store_groups",
)  # fmt: skip


class Run:
    """A run folder. Made by `open_run`; it writes after `start`. Of several ranks the first alone writes."""

    def __init__(self, out: Path, config: dict, wandb: str):
        self.out, self.config, self.wandb = out, config, wandb
        self.tracker = self.lock = None  # the wandb run; the descriptor of a locked file

    def close(self) -> None:
        """Finish the wandb run, if there is one, and unlock the folder. May be called twice."""
        if self.tracker is not None:
            self.tracker.finish()
        if self.lock is not None:
            os.close(self.lock)
        self.tracker = self.lock = None

    def start(self, step: int = -1) -> Run:
        """Make the folder, save config.json, and truncate the logs to `step`: that of a resumed checkpoint, or -1.
        Stored rollouts of later steps are deleted.

        ValueError, with nothing written, if a line is damaged, `step` has none, or another process uses the folder.
        """
        on_first(lambda: self._start(step))
        return self

    def _start(self, step: int) -> None:
        rows = {path: _read_jsonl(path) for path in map(self.out.joinpath, LOGS) if path.exists()}
        if step > 0 and all(row["step"] != step for row in rows.get(self.out / LOGS[0], [])):
            raise ValueError(f"{self.out / LOGS[0]} lacks step {step}, from which the run resumes: put the file back")
        self.out.mkdir(parents=True, exist_ok=True)
        if self.lock is None:
            self.lock = _lock(self.out)
            if (self.out / "config.json").exists():  # written since `open_run`
                raise ValueError(f"{self.out} already holds a run: choose another --out")
        if self.wandb != "off":  # it may fail, and config.json would make the folder a run
            self.tracker = _start_wandb(self.out, self.config, self.wandb)
        write_json(self.out / "config.json", self.config)
        for path in rows:
            replace_text(path, _lines(row for row in rows[path] if row["step"] <= step))
        for path in self.out.glob("rollouts/step-*"):
            if (number := re.match(r"step-([0-9]+)\.", path.name)) and int(number[1]) > step:
                path.unlink()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append {"step": step, **metrics} to metrics.jsonl; NaN and infinity become null.

        Raises ValueError when a value is no number or a key is called "step".
        """
        row = _row(step, metrics)
        nested = [key for key, value in row.items() if isinstance(value, (dict, list, str))]
        if nested:
            raise ValueError(f"metrics must be numbers in a flat dict; {nested[0]!r} is {metrics[nested[0]]!r}")
        if rank():
            return
        _append(self.out / "metrics.jsonl", [row])
        if self.tracker is not None:
            numbers = {key: value for key, value in row.items() if key != "step" and value is not None}
            self.tracker.log(numbers, step=step)

    def samples(self, step: int, records: list[dict]) -> None:
        """Append {"step": step, **record} for each record to samples.jsonl."""
        if not rank():
            _append(self.out / "samples.jsonl", [_row(step, record) for record in records])

    def result(self, values: dict) -> None:
        """Merge `values` (flat keys such as "after/pass@1") into result.json, atomically.

        Of seconds/… and memory/… the larger value stays: a finished run that is resumed measures a fraction of both.
        """

        def merge() -> None:
            path = self.out / "result.json"
            stored = read_json(path) if path.exists() else {}
            costs = [key for key in values if key.startswith(("seconds/", "memory/"))]
            write_json(path, stored | values | {key: max(values[key], stored.get(key, 0.0)) for key in costs})

        on_first(merge)


def open_run(out: Path, config, *, resume: bool = False, wandb: str = "off") -> Run:
    """Check that a run of `config` (a dataclass) may write to the folder `out`. Writes nothing: `Run.start` does.

    Raises ValueError if the folder holds a run and `resume` is False; if a resumed run has another config (except for
    MAY_CHANGE), naming each field with both values, or another process uses it (see `_lock`); if `wandb` is not one of
    WANDB_MODES, or not installed. Resuming a folder without a run starts one.
    """
    if wandb not in WANDB_MODES:
        raise ValueError(f"wandb is {wandb!r}; allowed are {', '.join(WANDB_MODES)}")
    if wandb != "off" and not find_spec("wandb"):
        raise ValueError(f"wandb is {wandb!r}, but the package wandb is not installed: pip install wandb, or off")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out = {out} is a file: choose a folder")
    run = Run(out, plain(dataclasses.asdict(config)), wandb)
    on_first(lambda: _check(run, resume))
    return run


def _check(run: Run, resume: bool) -> None:
    """The refusals of `open_run`; locks a folder that holds a run."""
    out = run.out
    present = [name for name in ("config.json", *LOGS, "result.json", "checkpoint") if (out / name).exists()]
    if present and not resume:
        continued = "continue it with --resume, or " if "resume" in run.config else ""  # not every script can
        raise ValueError(f"{out} already holds a run: {continued}choose another --out")
    if present:
        _same_config(read_json(out / "config.json", f"{present[0]} is there: choose another --out"), run.config, out)
        if "result.json" in present:
            read_json(out / "result.json")
        run.lock = _lock(out)


def run_holding(folder: Path, name: str) -> Path:
    """The run with a file or folder `name`: `folder` itself, or one below it. Of the demonstration's runs, base and rl,
    the last is taken, as `checkpoint.resolve` does.

    `folder` itself if no run has it. ValueError where there is no folder, and if several runs have it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: need the folder of a run, such as runs/r1-zero")
    below = sorted(path.parent for path in folder.glob(f"*/{name}"))
    if (folder / name).exists() or not below:
        return folder
    if len(below) > 1 and folder / "rl" not in below:
        names = ", ".join(path.name for path in below)
        raise ValueError(f"{folder} is the folder of several runs: name one of them, such as {below[-1]} ({names})")
    return folder / "rl" if folder / "rl" in below else below[0]


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, or of the one in a run folder, without a torn last line. Of several ranks the first
    reads, as it alone writes.

    Raises ValueError if there is no such file, or if another line is no JSON.
    """
    return on_first(lambda: _read_metrics(Path(path)))


def _read_metrics(path: Path) -> list[dict]:
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"{path} does not exist: expected a metrics.jsonl or a folder that holds one")
    return _read_jsonl(path)


def _row(step: int, values: dict) -> dict:
    if "step" in values:
        raise ValueError('"step" is given apart; leave it out of the values')
    return {"step": int(step), **plain(values)}


def _append(path: Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(_lines(rows))


def _lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _read_jsonl(path: Path) -> list[dict]:
    # A kill can tear the last line, even inside a character: it has no newline and is no JSON.
    *lines, last = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate([*lines, last] if last.endswith(b"}") else lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number > len(lines):
                break
            raise ValueError(f"{path}, line {number} is no JSON: {line[:80]!r}") from error
        if not isinstance(rows[-1], dict) or not isinstance(rows[-1].get("step"), int):
            raise ValueError(f"{path}, line {number} is no object with a step, a whole number: {line[:80]!r}")
    return rows


def _flat(values: dict, prefix: str = "") -> dict:
    """{"rl": {"lr": 1}} -> {"rl.lr": 1}"""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _same_config(old: dict, new: dict, out: Path) -> None:
    old, new = _flat(old), _flat(new)
    fields = [key for key in {**old, **new} if key.rpartition(".")[2] not in MAY_CHANGE]
    values = {key: (old.get(key, "(absent)"), new.get(key, "(absent)")) for key in fields}
    changed = [f"{key}: {then!r} then, {now!r} now" for key, (then, now) in values.items() if then != now]
    if changed:
        raise ValueError(f"{out} was started with another config ({'; '.join(changed)}): choose another --out")


def _lock(out: Path) -> int:
    """Lock a folder for this process, until the descriptor is closed or the process ends; ValueError if another has it.

    No lock on Windows, and on file systems that offer none. POSIX's, and not flock's: it belongs to the process, so
    children do not hold it on after a kill, and an error that left a run open does not lock this process out.
    """
    descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        import fcntl  # not on Windows

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise ValueError(f"{out} is in use by another process: wait for it, or choose another --out") from None
    except (ImportError, OSError):
        pass
    return descriptor


def _start_wandb(out: Path, config: dict, mode: str):
    """A wandb run that holds the same metrics; a resumed run is a second one in the same group."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported
    import wandb

    quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True)
    name = out.resolve().name
    return wandb.init(project="minir1", name=name, group=name, dir=str(out), mode=mode, config=config, settings=quiet)


# ---- the terminal ----------------------------------------------------------------------------


def progress_line(step: int, steps: int, fields: list[tuple[str, str]]) -> None:
    """Print one line of a training log: `  20/600  reward 0.41  length 35.2`."""
    line = Text(f"{step:>{len(str(steps))}}/{steps}", style="bold cyan")
    for name, value in fields:
        line.append(f"  {name} ", style="not bold dim default").append(value, style="not bold default")
    _console().print(line, soft_wrap=True)


@contextmanager
def progress(total: int, description: str) -> Iterator[Callable]:
    """A progress bar: `with progress(100, "judge") as advance: advance(3, note="12 tokens/s")`.

    A note stands at the end of the bar until the next one. Silent without a name or terminal.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = _console()
    silent = not (description and console.is_terminal)
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True, disable=silent) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda count=1, **note: bar.update(task, advance=count, **note)


def steps(start: int, end: int, description: str) -> Iterator[int]:
    """The steps start + 1 … end of a training, under a progress bar. A line says so if none is left."""
    if start >= end:
        print(f"nothing is left to train: {start:,} of {end:,} steps are done")
    with progress(end, description) as advance:
        advance(start)
        for step in range(start + 1, end + 1):
            yield step
            advance()


def table(title: str, columns: list[str], rows: list[list]) -> None:
    """Print a table; the first column is text, the others are aligned to the right."""
    grid = Table(title=Text(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    for number, name in enumerate(columns):
        grid.add_column(Text(name), justify="right" if number else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    _console().print(grid)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table for a document; the first `words` columns are text, the others are aligned to the right."""
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _console() -> Console:
    """Rich's own console, so that lines appear above a running bar; in a pipe a wide one, which truncates no line."""
    console = get_console()
    return console if console.is_terminal else Console(width=200)
