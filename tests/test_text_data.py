"""text_data.py: a corpus on the disk, its split, its pieces, and their order."""

import itertools
import random

import numpy as np
import pytest

from minir1 import text_data
from minir1.seed import hashed
from minir1.text_data import batches, bound, pieces, read, rows, split, write
from minir1.tokenizer import EOS, PAD, train_bpe, word_level

BPE = train_bpe(["the cat sat on the mat, naïve café 你好 def f(x): return x\n"] * 9, 320)
TEXTS = [("a" * n + " the café 你好\r\n") * (1 + n % 3) for n in range(30)]


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "tokens", ((f"document {n}", text) for n, text in enumerate(TEXTS)), BPE)


def document(corpus, d):
    return corpus.tokens[corpus.starts[d] : corpus.starts[d + 1]].tolist()


def test_a_document_is_a_start_token_its_text_and_the_end_token(corpus, tmp_path):
    assert isinstance(corpus.tokens, np.memmap) and corpus.tokens.dtype == np.uint16
    for d, text in enumerate(TEXTS):
        assert document(corpus, d) == [BPE.eos, *BPE.encode(text), BPE.eos]
        assert corpus.sizes[d] == len(text.encode()) and corpus.hashes[d] == hashed(text)
    again = read(tmp_path / "tokens")
    assert all(np.array_equal(a, b) for a, b in zip(corpus, again))
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_chunks_make_no_difference(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(text_data, "CHUNK", 50)
    other = write(tmp_path / "other", (("", text) for text in TEXTS), BPE)
    assert all(np.array_equal(a, b) for a, b in zip(corpus, other))


def test_special_tokens_in_a_text_are_text_and_tags_are_tokens(tmp_path):
    text = f"a{EOS}b{PAD}<think>c</think>"
    corpus = write(tmp_path / "tokens", [("", "first"), ("", text), ("", "last")], BPE)
    tokens = document(corpus, 1)
    assert [t for t in tokens if t < 6] == [BPE.eos, BPE.id("<think>"), BPE.id("</think>"), BPE.eos]
    assert BPE.decode(tokens[1:-1]) == text
    assert document(corpus, 2) == [BPE.eos, *BPE.encode("last"), BPE.eos]


def test_a_bos_token_starts_a_document(tmp_path):
    tokenizer = train_bpe(["abc"], 262)
    tokenizer.bos_token = PAD
    assert document(write(tmp_path / "tokens", [("", "a")], tokenizer), 0) == [tokenizer.pad, *BPE.encode("a"), BPE.eos]


def test_large_vocabularies_have_four_bytes_a_token(tmp_path):
    tokenizer = word_level([], 70_000)
    corpus = write(tmp_path / "tokens", [("", "69999 3")], tokenizer)
    assert corpus.tokens.dtype == np.uint32 and tokenizer.decode(document(corpus, 0)[1:-1]) == "69999 3"
    assert max(document(corpus, 0)) > 2**16


def test_an_error_leaves_nothing_behind(tmp_path):
    words = word_level(["make "], 24)
    unknown = [("here", "make 24"), ("there", "é")]
    for texts, message in (([], "there is no document"), (unknown, "^there: the tokenizer has no tokens for a part")):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "runs" / "a" / "tokens", texts, words)
        assert not list(tmp_path.iterdir())
    write(tmp_path / "tokens", [("", "make 24")], words)
    with pytest.raises(ValueError):
        write(tmp_path / "tokens", [], words)
    assert len(read(tmp_path / "tokens").sizes) == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    """Not even its files, by those of the same name; a corpus is, and what lies beside it stays."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    write(folder, [("", "first")], BPE)
    (folder / "notes.txt").write_text("precious")
    assert len(write(folder, [("", "first"), ("", "second")], BPE).sizes) == len(read(folder).sizes) == 2
    (folder / "about.json").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=f"^{folder} is there and holds no about.json, so it is no corpus"):
        write(folder, [("", "third")], BPE)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and "notes.txt" in before


def test_a_share_that_leaves_nothing_to_train_on_replaces_nothing(corpus, tmp_path):
    with pytest.raises(ValueError, match="held_out = 1.0 of 1 documents leaves none to train on"):
        write(tmp_path / "tokens", [("", "other")], BPE, 1.0)
    assert np.array_equal(read(tmp_path / "tokens").hashes, corpus.hashes)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npz", "about.json"])
def test_what_has_changed_is_not_read(name, corpus, tmp_path):
    path = tmp_path / "tokens" / name
    content = path.read_bytes()
    for changed in (content[:-2], content[:50] + bytes([content[50] ^ 1]) + content[51:]):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"{tmp_path}/tokens(/about.json is damaged| cannot be read)"):
            read(tmp_path / "tokens")
    path.unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}/tokens"):
        read(tmp_path / "tokens")


# ---- what is held out --------------------------------------------------------------------------


def test_a_document_is_held_out_by_its_text_alone(corpus, tmp_path):
    train, held_out = split(corpus, 0.3)
    chosen = {TEXTS[d] for d in held_out}
    assert chosen == {text for text in TEXTS if hashed(text) <= 0.3} and 0 < len(chosen) < len(TEXTS)
    assert sorted([*train, *held_out]) == list(range(len(TEXTS)))
    more = TEXTS[::-1] + ["something else"]
    other = write(tmp_path / "other", (("", text) for text in more), BPE)
    assert {more[d] for d in split(other, 0.3)[1]} - {"something else"} == chosen


def test_at_least_one_document_is_held_out_and_one_is_trained(corpus, tmp_path):
    (first,) = split(corpus, 1e-9)[1]
    assert corpus.hashes[first] == corpus.hashes.min() == bound(corpus, 1e-9)
    assert len(split(corpus, 0.0)[0]) == len(TEXTS) and bound(corpus, 0.0) < 0
    for share, texts in ((1.0, TEXTS), (0.01, ["one document"])):
        one = write(tmp_path / "one", (("", text) for text in texts), BPE)
        with pytest.raises(ValueError, match=f"held_out = {share} of {len(texts)} documents leaves none to train on"):
            split(one, share)


# ---- pieces and their order --------------------------------------------------------------------


def test_pieces_by_hand(tmp_path):
    """A document of seven tokens, of which six are predicted, then one of three."""
    corpus = write(tmp_path / "tokens", [("", "!$%&#"), ("", "a")], train_bpe(["abc"], 262))
    assert corpus.starts.tolist() == [0, 7, 10]
    for window, expected in (
        (2, [[0, 3], [2, 5], [4, 7], [7, 10]]),
        (4, [[0, 5], [4, 7], [7, 10]]),
        (5, [[0, 6], [5, 7], [7, 10]]),
        (6, [[0, 7], [7, 10]]),
        (99, [[0, 7], [7, 10]]),
    ):
        assert pieces(corpus, np.array([0, 1]), window).tolist() == expected
    assert pieces(corpus, np.array([1]), 2).tolist() == [[7, 10]]
    assert pieces(corpus, np.array([], int), 2).tolist() == []


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
def test_every_token_but_the_start_token_is_predicted_once(corpus, window):
    chosen = np.array([3, 4, 11, 29])
    found = pieces(corpus, chosen, window)
    predicted = [position for begin, end in found for position in range(begin + 1, end)]
    assert predicted == [p for d in chosen for p in range(corpus.starts[d] + 1, corpus.starts[d + 1])]
    assert (found[:, 1] - found[:, 0]).max() <= window + 1 and (found[:, 1] - found[:, 0]).min() >= 2
    assert rows(corpus, found[:2]) == [corpus.tokens[begin:end].tolist() for begin, end in found[:2]]


def test_each_pass_takes_every_piece_once_in_its_own_order():
    rng = random.Random(0)
    lengths = [rng.randrange(2, 40) for _ in range(50)]
    first = list(itertools.islice(batches(lengths, 60, 0), 60))
    assert all(sum(lengths[i] for i in batch) <= 60 for batch in first)
    order = [i for batch in first for i in batch]
    passes = [order[n : n + 50] for n in range(0, 100, 50)]
    assert all(sorted(one) == list(range(50)) for one in passes) and passes[0] != passes[1]
    assert all(sum(lengths[i] for i in a) + lengths[b[0]] > 60 for a, b in zip(first, first[1:]))  # none is half empty
    assert list(itertools.islice(batches(lengths, 60, 0), 20, 60)) == first[20:]
    assert list(itertools.islice(batches(lengths, 60, 1), 60)) != first
    assert all(len(batch) == 1 for batch in itertools.islice(batches(lengths, 1, 0), 60))
