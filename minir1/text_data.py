"""A corpus as tokens on the disk: written once, then read piece by piece, in an order that depends on the seed alone.

    corpus = write(folder, documents(paths), tokenizer)
    train, held_out = split(corpus, 0.05)
    rows(corpus, pieces(corpus, train, window=512)[:8])

Only the numbers of a document (where it starts, its bytes, a hash) are in memory; the tokens are a memory map, so a
corpus may be larger than memory. The order of the pieces is a permutation of all of them, not of a buffer.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minir1.data import passes
from minir1.files import read_json, write_json
from minir1.seed import hashed
from minir1.tokenizer import QUOTE, Tokenizer

TOKENS, INDEX, ABOUT = "tokens.bin", "documents.npz", "about.json"
CHUNK = 2**22  # characters that are tokenised at once


class Corpus(NamedTuple):
    """Document d is tokens[starts[d] : starts[d + 1]]: a start token, its text, the end token."""

    tokens: np.ndarray  # uint16 or uint32 [N], a memory map
    starts: np.ndarray  # int64 [documents + 1]
    sizes: np.ndarray  # int64 [documents], bytes of each text in UTF-8
    hashes: np.ndarray  # float64 [documents], 0 … 1, of each text


def start_token(tokenizer: Tokenizer) -> int:
    """What stands before the first token of a document: the BOS if the tokenizer names one, else the EOS."""
    return tokenizer.id(tokenizer.bos_token) if tokenizer.bos_token else tokenizer.eos


def write(folder: Path, texts: Iterable[tuple[str, str]], tokenizer: Tokenizer, held_out: float = 0.0) -> Corpus:
    """Tokenise documents (where they stand, text) into `folder`, in place of a corpus that is there, and open it.

    Special tokens written in a text become plain text; think and answer tags become tokens. ValueError if the folder
    holds something else, if there is no document, if `held_out`, the share for `split`, leaves none to train on, and
    for a document that the tokenizer has no tokens for: bits per byte would not count what is left out. After an error
    everything is as it was.
    """
    if folder.exists() and not (folder / ABOUT).exists() and os.listdir(folder):
        raise ValueError(f"{folder} is there and holds no {ABOUT}, so it is no corpus: move it away")
    missing = [parent for parent in folder.parents if not parent.exists()]
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        _write(aside, texts, tokenizer)
        corpus = read(aside)
        split(corpus, held_out)
        folder.mkdir(exist_ok=True)
        for name in (ABOUT, INDEX, TOKENS):  # the first marks the folder as a corpus; `read` refuses a part of one
            (aside / name).replace(folder / name)
        aside.rmdir()
    except BaseException:
        shutil.rmtree(aside)
        with contextlib.suppress(OSError):  # another process writes there
            for parent in missing:
                parent.rmdir()
        raise
    return corpus


def _write(folder: Path, texts: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> None:
    first, dtype = start_token(tokenizer), np.dtype("<u2" if tokenizer.size <= 2**16 else "<u4")
    unknown = tokenizer.unknown
    starts, sizes, hashes = array("q", [0]), array("q"), array("d")
    with open(folder / TOKENS, "wb") as file:
        for chunk in _chunks(texts):
            for (where, text), tokens in zip(chunk, _tokenise([text for _, text in chunk], tokenizer)):
                if unknown is not None and unknown in tokens:
                    raise ValueError(f"{where}: the tokenizer has no tokens for a part of this document")
                file.write(np.array([first, *tokens, tokenizer.eos], dtype).tobytes())
                starts.append(starts[-1] + len(tokens) + 2)
                sizes.append(len(text.encode()))
                hashes.append(hashed(text))
    if not sizes:
        raise ValueError("there is no document: all files are blank, or not UTF-8")
    np.savez(folder / INDEX, starts=np.array(starts), sizes=np.array(sizes), hashes=np.array(hashes))
    about = {"documents": len(sizes), "bytes": sum(sizes), "tokens": starts[-1], "dtype": dtype.str}
    write_json(folder / ABOUT, about | {"sha256": {name: _digest(folder / name) for name in (TOKENS, INDEX)}})


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _chunks(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    chunk, size = [], 0
    for where, text in texts:
        chunk.append((where, text))
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenise(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    quoted = [tokenizer.quote(text, assistant=True) for text in texts]
    plain = iter(tokenizer.encode_batch([text for text in quoted if QUOTE not in text]))
    return [tokenizer.encode(text) if QUOTE in text else next(plain) for text in quoted]


def read(folder: Path) -> Corpus:
    """Open what `write` left. ValueError naming a file that is missing or has changed; every byte is checked."""
    about = read_json(folder / ABOUT, "no corpus was written there to its end")
    try:
        for name, expected in about["sha256"].items():
            if _digest(folder / name) != expected:
                raise ValueError(f"{name} has changed")
        with np.load(folder / INDEX) as index:
            starts, sizes, hashes = (index[name] for name in ("starts", "sizes", "hashes"))
        tokens = np.memmap(folder / TOKENS, about["dtype"], "r")
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error
    return Corpus(tokens, starts, sizes, hashes)


def split(corpus: Corpus, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents to train on, and of those to hold out: about this share, and at least one.

    A document is held out by the hash of its text: whatever else the corpus holds, and with any tokenizer. share: 0
    holds none out. ValueError if nothing is left to train on.
    """
    held_out = corpus.hashes <= bound(corpus, share)
    if held_out.all():
        raise ValueError(
            f"held_out = {share} of {len(held_out)} documents leaves none to train on: give more text, or 0"
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def bound(corpus: Corpus, share: float) -> float:
    """The largest hash of a document that is held out; below 0 for none."""
    return max(share, corpus.hashes.min()) if share else -1.0


def pieces(corpus: Corpus, documents: np.ndarray, window: int) -> np.ndarray:
    """Where the pieces of these documents begin and end in the tokens: int64 [pieces, 2].

    A piece has at most window + 1 tokens, of which all but the first are predicted. The next piece of the document
    begins with the last token of this one, so that every token but the start token is predicted exactly once.
    """
    begin, end = corpus.starts[documents], corpus.starts[documents + 1]
    counts = -((begin - end + 1) // window)  # predicted tokens / window, rounded up
    number = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)  # of a piece in its document
    begins = np.repeat(begin, counts) + window * number
    return np.stack([begins, np.minimum(begins + window + 1, np.repeat(end, counts))], axis=1)


def rows(corpus: Corpus, chosen: np.ndarray) -> list[list[int]]:
    """The tokens of pieces, as `pieces` returns them."""
    return [corpus.tokens[begin:end].tolist() for begin, end in chosen]


def batches(lengths: Sequence[int], budget: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of numbers of pieces, of at most `budget` tokens each, or of one piece.

    Pass after pass over all pieces, each in an order of its own; a function of the arguments alone.
    """
    batch, tokens = [], 0
    for (piece,) in passes(len(lengths), 1, seed):
        if batch and tokens + lengths[piece] > budget:
            yield batch
            batch, tokens = [], 0
        batch.append(piece)
        tokens += lengths[piece]
