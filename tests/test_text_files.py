"""text_files.py: documents of plain text and JSON lines, as they stand in the files, however large these are."""

import gzip
import json

import pytest

from minir1 import text_files
from minir1.text_files import documents, files

HARD = "café 你好 👨‍👩‍👧 e\u0301\r\n\ttab\x00null  two\n\n\rend "


def texts(*paths, **more):
    return [text for _, text in documents(paths, **more)]


def lines(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_plain_file_is_one_document_to_the_byte(tmp_path):
    (tmp_path / "a.anything").write_bytes(HARD.encode())
    assert list(documents([tmp_path / "a.anything"])) == [(str(tmp_path / "a.anything"), HARD)]
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + HARD.encode())
    assert texts(tmp_path / "bom.txt") == [HARD]


def test_a_line_of_json_is_one_document_to_the_byte(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"text": HARD, "id": 3}, {"text": " \n"}, {"text": "b\u2028c\x85d"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n  \n")
    assert list(documents([path])) == [(f"{path}, line 1", HARD), (f"{path}, line 3", "b\u2028c\x85d")]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_both_may_be_compressed(name, tmp_path):
    content = HARD if name == "a.txt" else json.dumps({"text": HARD})
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode(), mtime=0))
    assert texts(tmp_path) == texts(tmp_path / f"{name}.gz") == [HARD]


def test_a_large_file_is_several_documents_that_end_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PART", 50)
    whole = "".join(f"line {n} is here\r\n" for n in range(40)) + "x" * 500 + "\nend"
    (tmp_path / "a.txt").write_bytes(whole.encode())
    parts = texts(tmp_path)
    assert "".join(parts) == whole and len(parts) > 10 and max(map(len, parts)) <= 100
    assert all(part.endswith("\n") for part in parts[:10])


def test_a_folder_gives_its_text_files_in_the_order_of_their_paths(tmp_path):
    for name in ("b.py", "a.txt", "c.bin", ".hidden.txt", "sub/d.MD", "sub/tests/e.py", "sub/.git/f.txt",
                 "site-packages/g.py", "sub/__pycache__/h.py"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.txt", "b.py", "sub/d.MD", "sub/tests/e.py"]
    assert texts(tmp_path, skip=("tests",)) == ["a.txt", "b.py", "sub/d.MD"]
    assert texts(tmp_path / "b.py", tmp_path, tmp_path / "c.bin", skip=("sub",)) == ["b.py", "a.txt", "c.bin"]


def test_files_that_are_not_utf8_are_left_out_and_counted(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "b.txt").write_text("fine")
    assert texts(tmp_path, quiet=True) == ["fine"] and not capsys.readouterr().out
    assert texts(tmp_path) == ["fine"]
    assert capsys.readouterr().out == f"left out 1 files that are not UTF-8, such as {tmp_path / 'a.txt'}\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', 'a.jsonl, line 2: need {"text": "…"}, got'),
        ("a.jsonl", b'["text"]\n', "line 1: need"),
        ("a.jsonl", b"text\n", "line 1 is no JSON: .*; it begins b'text"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is no JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 is no JSON: .*surrogates not allowed"),
        ("a.txt.gz", b"text", "a.txt.gz is damaged: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:-9], "a.txt.gz is damaged: Compressed file ended"),
    ],
)
def test_what_is_damaged_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        texts(tmp_path)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_paths_without_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"there is no file or folder {tmp_path}/none"):
        files([tmp_path / "none"])
    (tmp_path / "a.bin").write_text("text")
    with pytest.raises(ValueError, match=f"{tmp_path}: no file there ends in one of .txt, .md"):
        files([tmp_path])
