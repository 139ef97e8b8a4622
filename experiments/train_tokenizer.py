"""Train a tokenizer on one's own text, and compare how well it compresses each kind of text.

    python -m experiments.train_tokenizer --data papers corpus.jsonl --preset math --out runs/tokenizer
    python -m experiments.train_tokenizer --data src --preset code --against Qwen2.5-0.5B --kinds prose docs
    python -m experiments.train_tokenizer --data books --preset languages --digits whole --bound 100 --size 32000

Byte-level BPE with a digit policy and patterns of minir1/tokenizer_training.py; --digits, --size and --bound replace
the preset's. --data takes files and folders of plain text and of JSON lines with a `text` field. A share of the
documents, chosen by a hash of their text, is not trained on but measured, beside the texts of --kinds.

Writes a folder that transformers.AutoTokenizer opens and `pretrain_text.py --tokenizer` takes, with report.json and
figures/tokenizer.png:

    bytes per token     of UTF-8; more is better: fewer tokens to read and to write
    tokens per word     tokens that hold a part of a word (a run of letters), on average
    tokens per number   the same of runs of digits
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers

from experiments import train_tokenizer_figure
from minir1 import cli, text_files
from minir1.files import write_json
from minir1.log import markdown_table, table
from minir1.seed import hashed
from minir1.settings import at_least, fraction, new_folder
from minir1.tokenizer_training import DIGITS, PRESETS, Recipe, train

MEASURED = 2_000_000  # bytes of each kind that are measured, the first ones
HELD_OUT = "held out"  # the kind of the documents that are not trained on
COLUMNS = ["text", "tokenizer", "tokens in all", "bytes", "bytes per token", "tokens per word", "tokens per number"]
NUMBERS, LENGTHS = 100, range(1, 13)  # random numbers of each length


@dataclass(frozen=True)
class Config:
    """A tokenizer, and what it is compared with."""

    data: tuple[Path, ...]  # files and folders: plain text, and JSON lines with a text field
    skip: tuple[str, ...] = ()  # names of folders below those of --data that are left out
    preset: Literal[tuple(PRESETS)] = "math"  # patterns, digit policy and size for a kind of text
    digits: Literal[DIGITS] | None = None  # how numbers become tokens; None: as in the preset
    size: int | None = None  # V, tokens in all; None: as in the preset
    bound: int | None = None  # with --digits whole: the largest number that is one token; None: 999
    special: tuple[str, ...] = ()  # further special tokens
    held_out: float = 0.05  # share of the documents that are measured instead
    kinds: dict[str, Path] = field(default_factory=dict)  # name and file or folder of further texts to measure
    against: tuple[Path, ...] = ()  # other tokenizers: folders with a tokenizer.json, or such files
    out: Path = Path("runs/tokenizer")

    def __post_init__(self):
        at_least(self, 1, "size")
        at_least(self, 9, "bound")
        fraction(self, "held_out")
        new_folder(self, "out")
        if not self.data:
            raise ValueError("data = (): at least one file or folder")
        if self.bound is not None and (self.digits or PRESETS[self.preset].digits) != "whole":
            raise ValueError(f"bound = {self.bound}: only --digits whole has a bound")
        recipe(self)
        if HELD_OUT in self.kinds:
            raise ValueError(f"kinds: {HELD_OUT!r} is the name of the documents of --data that are not trained on")


def recipe(config: Config) -> Recipe:
    """The preset with what the options replace."""
    changes = {name: getattr(config, name) for name in ("digits", "size", "bound")}
    changes = {name: value for name, value in changes.items() if value is not None}
    return replace(PRESETS[config.preset], special=config.special, **changes)


def backend_of(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer to compare with. path: a folder with a tokenizer.json, or such a file. ValueError for others."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"against = {path}: there is no file {file}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises the bare class
        raise ValueError(f"against = {path}: {file} is no tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def measure(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> dict[str, float]:
    """Bytes per token, and tokens per word and per number (none if there are none), over all of the texts.

    unknown: the share of tokens that say only that there is something else, if there are such.
    """
    total = dict.fromkeys(("bytes", "tokens", "unknown", "words", "word_tokens", "numbers", "number_tokens"), 0)
    unknown = getattr(backend.model, "unk_token", None)
    for text in texts:
        encoding = backend.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets).reshape(-1, 2)
        total["bytes"] += len(text.encode())
        total["tokens"] += len(offsets)
        total["unknown"] += encoding.tokens.count(unknown)
        for name, pattern in (("word", r"[^\W\d_]+"), ("number", r"\d+")):
            spans = np.array([match.span() for match in re.finditer(pattern, text)]).reshape(-1, 2)
            total[f"{name}s"] += len(spans)
            total[f"{name}_tokens"] += int(overlaps(offsets, spans).sum())
    result = {"bytes": total["bytes"], "bytes_per_token": total["bytes"] / max(1, total["tokens"])}
    if total["unknown"]:
        result["unknown"] = total["unknown"] / total["tokens"]
    for name in ("word", "number"):
        if total[f"{name}s"]:
            result[f"tokens_per_{name}"] = total[f"{name}_tokens"] / total[f"{name}s"]
    return result


def overlaps(tokens: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """How many tokens hold a part of each span. tokens, spans: begin and end, [T, 2] and [S, 2]; both ascend. -> [S]"""
    began = np.searchsorted(tokens[:, 0], spans[:, 1], side="left")  # tokens that begin before the span ends
    ended = np.searchsorted(tokens[:, 1], spans[:, 0], side="right")  # tokens that end before it begins
    return began - ended


def by_length(backend: tokenizers.Tokenizer) -> dict[str, float]:
    """"digits/3" -> tokens of a number of three digits, on average over random ones, as they stand in a sum."""
    rng, result = random.Random("numbers"), {}
    for length in LENGTHS:
        drawn = [str(rng.randrange(10 ** (length - 1), 10**length)) for _ in range(NUMBERS)]
        result[f"digits/{length}"] = measure(backend, [f"({number})" for number in drawn])["tokens_per_number"]
    return result


def first_bytes(texts: Iterable[tuple[str, str]], most: int = MEASURED) -> list[str]:
    """The first documents, up to `most` bytes, and at least one."""
    chosen, size = [], 0
    for _, text in texts:
        chosen.append(text)
        size += len(text.encode())
        if size >= most:
            break
    return chosen


def rows(report: dict) -> list[list[str]]:
    """The lines of the table, by kind of text."""
    result = []
    for kind, (name, one) in itertools.product(report["kinds"], report["tokenizers"].items()):
        if f"{kind}/bytes" in one:
            values = [one.get(f"{kind}/{key}") for key in ("bytes_per_token", "tokens_per_word", "tokens_per_number")]
            cells = ["-" if value is None else f"{value:.2f}" for value in values]
            if unknown := one.get(f"{kind}/unknown"):
                cells[0] += f" ({unknown:.0%} unknown)"
            result.append([kind, name, f"{one['size']:,}", f"{one[f'{kind}/bytes']:,}", *cells])
    return result


def page(report: dict) -> str:
    """The table for a document."""
    return markdown_table(COLUMNS, rows(report), words=2)


def names(paths: Sequence[Path]) -> list[str]:
    """A short name of each tokenizer to compare with: that of its folder, or its whole path where two are the same."""
    short = [path.parent.name if path.name == "tokenizer.json" else path.name for path in paths]
    return [name if name and short.count(name) == 1 else str(path) for name, path in zip(short, paths)]


def main(config: Config) -> dict:
    """Train, save, measure, draw; return the report."""
    if (config.out / "tokenizer.json").exists():
        raise ValueError(f"{config.out} already holds a tokenizer: choose another --out")
    made = recipe(config)
    others = dict(zip(names(config.against), map(backend_of, config.against)))
    for path in config.kinds.values():
        text_files.files([path])  # what is missing must be known before the training
    print(f"training {made.size:,} tokens, preset {config.preset}, digits {made.digits}")
    documents = text_files.documents(config.data, config.skip)
    used = (text for _, text in documents if hashed(text) >= config.held_out)
    if (first := next(used, None)) is None:
        raise ValueError("there is no document to train on: all files are blank, not UTF-8, or held out")
    tokenizer = train(itertools.chain([first], used), made)
    if tokenizer.size < made.size:
        print(f"the texts give only {tokenizer.size:,} tokens")
    config.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(config.out)

    kinds = {name: first_bytes(text_files.documents([path], quiet=True)) for name, path in config.kinds.items()}
    documents = text_files.documents(config.data, config.skip, quiet=True)
    held_out = first_bytes((where, text) for where, text in documents if hashed(text) < config.held_out)
    kinds = ({HELD_OUT: held_out} if held_out else {}) | kinds
    if not held_out:
        print(f"no document is held out: the hash of none is below {config.held_out}")
    report = {"preset": config.preset, "digits": made.digits, "kinds": list(kinds), "tokenizers": {}}
    for name, backend in {f"this one ({config.preset})": tokenizer.backend, **others}.items():
        one = {"size": backend.get_vocab_size(with_added_tokens=True)} | by_length(backend)
        for kind, texts in kinds.items():
            one |= {f"{kind}/{key}": value for key, value in measure(backend, texts).items()}
        report["tokenizers"][name] = one
    write_json(config.out / "report.json", report)
    table("compression by kind of text", COLUMNS, rows(report))
    train_tokenizer_figure.draw(report, config.out / "figures" / "tokenizer.png")
    return report


if __name__ == "__main__":
    cli.run(main, Config)
