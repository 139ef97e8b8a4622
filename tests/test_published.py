"""published.py: every form of a benchmark file, damaged ones, and which files hold a split."""

import csv
import gzip
import json
import zlib
from pathlib import Path

import pytest

from minir1.tasks.published import records, split_files, split_named

TWO = [{"q": "a\nb", "n": 1}, {"q": "é", "n": 2}]


def read(path, columns=()):
    return [record for _, record in records(path, columns)]


def put(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values)


FORMS = {
    "a.jsonl": lines(TWO),
    "b.JSONL": "\n" + lines(TWO).replace("\n", "\r\n\r\n"),
    "bom.jsonl": "\ufeff" + lines(TWO),
    "c.json": json.dumps(TWO, indent=1),
    "d.json": json.dumps({"rows": [{"row_idx": i, "row": r, "truncated_cells": []} for i, r in enumerate(TWO)]}),
    "e.json": lines(TWO),
    "utf16.json": json.dumps(TWO).encode("utf-16"),
    "f.json": json.dumps({"rows": TWO}),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_json(tmp_path, name):
    path = put(tmp_path / name, FORMS[name])
    assert read(path) == TWO
    assert read(put(tmp_path / f"{name}.gz", gzip.compress(path.read_bytes()))) == TWO


def test_one_object(tmp_path):
    assert read(put(tmp_path / "1.json", json.dumps(TWO[0], indent=2))) == TWO[:1]


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["q", "n"], ["a\nb", "1"], ['say "é"', "2"]])
    expected = [{"q": "a\nb", "n": "1"}, {"q": 'say "é"', "n": "2"}]
    assert read(path) == read(path, ("q", "n")) == expected
    assert [where for where, _ in records(path)] == [f"{path}, line 2", f"{path}, line 4"]  # the first has two lines
    assert read(put(tmp_path / "bom.csv", b"\xef\xbb\xbf" + path.read_bytes())) == expected
    bare = put(tmp_path / "bare.csv", path.read_bytes().split(b"\n", 1)[1])
    assert read(bare, ("q", "n")) == expected
    assert read(put(tmp_path / "a.csv.gz", gzip.compress(bare.read_bytes())), ("q", "n")) == expected
    assert read(put(tmp_path / "blank.csv", "q,n\n\n1,2\n\n")) == [{"q": "1", "n": "2"}]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"q": "a", "choices": ["x", "y"], "truth": {"n": [1, 2]}}] * 2
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == rows
    assert read(put(tmp_path / "b.parquet.gz", gzip.compress((tmp_path / "a.parquet").read_bytes()))) == rows
    assert [where for where, _ in records(tmp_path / "a.parquet")][1] == f"{tmp_path / 'a.parquet'}, row 2"
    for name, content in {"c.parquet": b"PAR1 nothing", "d.parquet": b"", "e.parquet": b"x" * 1000}.items():
        refused(put(tmp_path / name, content), f"{name} is no Parquet file: ")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.csv.gz"])
def test_blank_files_hold_no_records(tmp_path, name):
    for content in (b"", b" \n\n"):
        assert read(put(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)) == []
    assert read(put(tmp_path / "header.csv", "q,n\n")) == []


def test_a_huge_line(tmp_path):
    long = {"q": "x" * 3_000_000}
    assert read(put(tmp_path / "a.jsonl", lines([long, *TWO]))) == [long, *TWO]


def refused(path, what, columns=()):
    with pytest.raises(ValueError) as error:
        read(path, columns)
    assert what in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 300


GOOD = lines(TWO[:1])
DAMAGED = {
    "cut.jsonl": (GOOD + '{"q": "a', ", line 2 is no JSON: "),
    "list.jsonl": (GOOD + "\n[1]\n", ", line 3: need an object, got '[1]'"),
    "number.jsonl": ("3\n", ", line 1: need an object, got '3'"),
    "null.jsonl": (GOOD * 4 + "null", ", line 5: need an object, got 'None'"),
    "deep.jsonl": ("[" * 100_000, ", line 1 is no JSON: it is nested too deeply; it begins b'[[["),
    "half.jsonl": ('{"q": "\\ud800"}', ", line 1 is no JSON: "),
    "latin.jsonl": (GOOD.encode() + '{"q": "é"}'.encode("latin-1"), ", line 2 is no JSON: "),
    "utf16.jsonl": (GOOD.encode("utf-16"), ", line 2 is no JSON: "),
    "pretty.jsonl": (json.dumps(TWO, indent=1), ", line 1 is no JSON: "),
    "word.json": ('"q"', ": need an object or a list of objects, got 'q'"),
    "cut.json": (json.dumps(TWO, indent=1)[:-3], " is no JSON: "),
    "cut object.json": (json.dumps(TWO[0], indent=1)[:-3], " is no JSON: "),
    "lines.json": (GOOD + GOOD + "{\n", ", line 3 is no JSON: "),
    "items.json": ("[{}, 3]", ", record 2: need an object, got '3'"),
    "rows.json": ('{"rows": [3]}', ", record 1: need an object, got '3'"),
    "viewer.json": ('{"rows": [{"row": {"q": ""}, "truncated_cells": ["q"]}]}', ", record 1: the viewer truncated"),
    "short.csv": ("q,n\n1,2\n3\n", ", line 3: need 2 cells ('q, n'), got 1"),
    "long.csv": ("q,n\n1,2,3\n", ", line 2: need 2 cells ('q, n'), got 3"),
    "open.csv": ('q,n\n1,2\n"3,4\n5,6\n', ", line 3 is no CSV: unexpected end of data"),
    "quote.csv": ('q,n\n"1"2,3\n', ", line 2 is no CSV: "),
    "huge.csv": ("q,n\n" + "1" * 200_000 + ",2\n", ", line 2 is no CSV: field larger than field limit"),
    "latin.csv": ("q,n\n1,é\n".encode("latin-1"), ", line 2 is not UTF-8: "),
    "utf16.csv": ("q,n\n1,é\n".encode("utf-16"), ", line 1 is not UTF-8: "),
    "text.gz.jsonl": (gzip.compress(GOOD.encode()), ", line 1 is no JSON: "),
    "plain.jsonl.gz": (GOOD, " is damaged: Not a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(GOOD.encode() * 99)[:-20], " is damaged: "),
    "zlib.jsonl.gz": (gzip.compress(b"x" * 99)[:10] + b"\xff" * 30, " is damaged: "),
    "test.txt": (GOOD, ": a file of problems ends in .jsonl, .json, .csv, .parquet, or one of these and .gz"),
    "test": (GOOD, ": a file of problems ends in"),
    "test.gz": (gzip.compress(GOOD.encode()), ": a file of problems ends in"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(tmp_path, name):
    content, what = DAMAGED[name]
    refused(put(tmp_path / name, content), f"{name}{what}")


def test_missing_files(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("nowhere.jsonl", "folder.jsonl"):
        refused(tmp_path / name, "there is no file")
    assert zlib.error not in OSError.__mro__  # which is why it is caught by name


# ---------------------------------------------------------------- the files of a split

NAMED = {
    "train.jsonl": "train",
    "test-00000-of-00001.parquet": "test",
    "dev/algebra_dev.csv": "validation",
    "high_school_val.csv": "validation",
    "ARC-Easy-Test.jsonl": "test",
    "train/algebra/1.json": "train",
    "test/train_rows.jsonl": "train",
    "contest.jsonl": None,
    "latest.json": None,
    "Validation.JSON": "validation",
    "my tests.json": None,
    "training.jsonl.gz": "train",
    "": None,
}


@pytest.mark.parametrize("name", NAMED)
def test_the_split_that_a_path_names(name):
    assert split_named(name) == NAMED[name]


def test_files_of_a_folder(tmp_path):
    for name in (
        "test.jsonl",
        "b/test.jsonl",
        "a_test.csv",
        "train.jsonl",
        ".cache/test.jsonl",
        "__MACOSX/test.jsonl",
        "test.txt",
        "README.md",
        "test/x.json.gz",
        "._test.json",
    ):
        put(tmp_path / name, "")
    (tmp_path / "test.json").mkdir()
    files = [str(file.relative_to(tmp_path)) for file in split_files(tmp_path, "test")]
    assert files == ["a_test.csv", "b/test.jsonl", "test/x.json.gz", "test.jsonl"]
    assert [file.name for file in split_files(tmp_path, "train")] == ["train.jsonl"]
    assert [file.name for file in split_files(tmp_path, "test", kinds=(".csv",))] == ["a_test.csv"]
    with pytest.raises(ValueError, match="holds no file of the split 'validation', such as validation.jsonl"):
        split_files(tmp_path, "validation")
    put(tmp_path / "prompt.jsonl", "")
    assert [file.name for file in split_files(tmp_path, "prompt")] == ["prompt.jsonl"]  # a split of another name


def test_words_of_a_benchmark(tmp_path):
    for name in ("dev/a_dev.csv", "train.csv"):
        put(tmp_path / name, "")
    assert [file.name for file in split_files(tmp_path, "train", {"train": ("dev",)})] == ["a_dev.csv"]


def test_one_file(tmp_path):
    test, plain = put(tmp_path / "test.jsonl", ""), put(tmp_path / "math.jsonl", "")
    assert split_files(test, "test") == [test] and split_files(str(plain), "train") == [plain]
    with pytest.raises(ValueError, match="test.jsonl does not hold the split 'train': give the folder, or the file of"):
        split_files(test, "train")
    with pytest.raises(ValueError, match="there is no file or folder"):
        split_files(tmp_path / "nowhere", "test")


@pytest.mark.parametrize("other", ["test.jsonl.gz", "test.json", "test.parquet"])
def test_a_file_in_two_forms(tmp_path, other):
    put(tmp_path / "test.jsonl", ""), put(tmp_path / other, "")
    with pytest.raises(ValueError, match="holds test.js.* and test.*: remove one, or give a file"):
        split_files(tmp_path, "test")
