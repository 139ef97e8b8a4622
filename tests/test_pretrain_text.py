"""experiments/pretrain_text.py at toy size on sources of the standard library: bits per byte by hand, resumed runs."""

import gzip
import itertools
import json
import math
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import standin
import torch
import transformers
from runs import assert_same_run, plain_metrics, result_of, stop
from toys import DENSE, MOE

from experiments import pretrain, pretrain_text
from experiments.pretrain_text import Config, measure
from minir1 import checkpoint, text_data, text_files
from minir1.log import read_metrics
from minir1.model import hf
from minir1.seed import hashed
from minir1.tokenizer import Tokenizer, train_bpe
from minir1.tokenizer_training import PRESETS, train

standin.register()  # before the first backward pass of the process
LIBRARY = Path(sysconfig.get_paths()["stdlib"])
FILES = tuple(LIBRARY / name for name in ("json/decoder.py", "json/scanner.py", "json/tool.py", "bisect.py", "this.py"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own-text")
    (folder / "data").mkdir()
    for file in FILES:
        shutil.copy(file, folder / "data")
    lines = [{"text": f"def add_{n}(x):\n    return x + {n}\n"} for n in range(20)]
    (folder / "data" / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [text for _, text in text_files.documents([folder / "data"])]
    tokenizer = train(texts, replace(PRESETS["code"], size=400))
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    small = {"steps": 6, "batch": 600, "window": 64, "eval_every": 3, "held_out": 0.3, "sample_tokens": 8, "warmup": 2}
    small |= {"sample_prompts": ("", "def add"), "microbatch": 300, "device": "cpu", "model": MOE}
    return Config(data=(folder / "data",), tokenizer=folder / "tokenizer", out=folder / "run", **small)


@pytest.fixture(scope="module")
def whole(config):
    pretrain_text.main(config)
    return config.out


def corpus_of(config, folder):
    tokenizer = Tokenizer.load(config.tokenizer)
    return text_data.write(folder, text_files.documents(config.data), tokenizer), tokenizer


# ---- bits per byte -----------------------------------------------------------------------------


def test_bits_per_byte_written_out(config, tmp_path):
    """From the logits of each piece alone; in nats per token / ln 2 · tokens / bytes; on any micro-batch."""
    corpus, tokenizer = corpus_of(config, tmp_path / "tokens")
    model = pretrain.build_model(config, tokenizer).double()
    chosen = np.array([1, 2, 6, 7])
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for d in chosen:
            row = torch.tensor(corpus.tokens[corpus.starts[d] : corpus.starts[d + 1]].astype(int))
            for begin in range(0, len(row) - 1, 64):
                piece = row[begin : begin + 65]
                logp = model(piece[None])[0].log_softmax(-1)
                nats -= sum(logp[t - 1, piece[t]].item() for t in range(1, len(piece)))
                tokens += len(piece) - 1
    size = sum(len(tokenizer.decode(text_data.rows(corpus, [span])[0][1:-1]).encode())
               for span in zip(corpus.starts[chosen], corpus.starts[chosen + 1]))  # fmt: skip
    assert tokens == int((corpus.starts[chosen + 1] - corpus.starts[chosen]).sum()) - 4
    for microbatch in (1, 100, 10**6):
        result = measure(model, corpus, chosen, replace(config, microbatch=microbatch))
        assert result["eval/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
        assert result["eval/nats_per_token"] == pytest.approx(nats / tokens, rel=1e-6)
        assert result["eval/bits_per_byte"] == pytest.approx(
            result["eval/nats_per_token"] / math.log(2) * tokens / size, rel=1e-9
        )
    assert measure(model, corpus, np.array([], int), config) == {}


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(config, tmp_path):
    """log2 V · tokens / bytes; where each byte is a token, there is one more token per document, the end."""
    for tokenizer in (Tokenizer.load(config.tokenizer), train_bpe(["a"], 262)):
        corpus = text_data.write(tmp_path / "tokens", text_files.documents(config.data), tokenizer)
        model = pretrain.build_model(config, tokenizer)
        torch.nn.init.zeros_(model.head.weight)
        documents = np.arange(len(corpus.sizes))
        tokens, size = len(corpus.tokens) - len(documents), corpus.sizes.sum()
        have = measure(model, corpus, documents, config)["eval/bits_per_byte"]
        assert have == pytest.approx(math.log2(model.config.vocab) * tokens / size, rel=1e-5)
        assert tokenizer.size == 400 or tokens == size + len(documents)


def test_documents_do_not_see_each_other(config, tmp_path):
    """In training and in measuring: the loss of a batch is the mean over its pieces alone."""
    corpus, tokenizer = corpus_of(config, tmp_path / "tokens")
    model = pretrain.build_model(config, tokenizer).double()
    documents = np.arange(4)
    sums = [measure(model, corpus, documents[d : d + 1], config) for d in documents]
    bits = sum(one["eval/bits_per_byte"] * corpus.sizes[d] for d, one in enumerate(sums))
    assert measure(model, corpus, documents, config)["eval/bits_per_byte"] == pytest.approx(
        bits / corpus.sizes[:4].sum(), rel=1e-6
    )
    rows = text_data.rows(corpus, text_data.pieces(corpus, documents, 64))
    tokens = sum(len(row) - 1 for row in rows)
    have = pretrain.loss_backward(model, rows, replace(config, balance_loss=0.0))[0]
    assert have == pytest.approx(bits * math.log(2) / tokens, rel=1e-6)


def test_the_yardstick_is_gzip_of_the_held_out_documents(config, whole):
    texts = [text for _, text in text_files.documents(config.data) if hashed(text) <= 0.3]
    assert len(texts) == result_of(whole)["documents/held_out"] > 2
    joined = "".join(texts).encode()
    assert result_of(whole)["gzip/bits_per_byte"] == 8 * len(gzip.compress(joined, 9, mtime=0)) / len(joined)
    assert result_of(whole)["bytes/held_out"] == len(joined)


# ---- a run -------------------------------------------------------------------------------------


def test_a_run_is_a_folder_with_bits_per_byte_samples_and_a_figure(whole, config):
    first, *rows = read_metrics(whole)
    assert first["step"] == 0 and [row["step"] for row in rows] == list(range(1, 7))
    assert [row["step"] for row in rows if "eval/bits_per_byte" in row] == [3, 6]
    assert {"train/loss", "train/lr", "train/grad_norm", "train/max_violation", "perf/train_tok_s"} <= rows[0].keys()
    result = result_of(whole)
    assert result["before/bits_per_byte"] == first["eval/bits_per_byte"] > result["after/bits_per_byte"]
    assert result["after/bits_per_byte"] == rows[-1]["eval/bits_per_byte"]
    assert result["documents/trained"] + result["documents/held_out"] == 25
    for when in ("before", "after"):
        assert len(result[f"{when}/samples"]) == 2 and result[f"{when}/samples"][1].startswith("def add")
    assert result["before/samples"] != result["after/samples"]
    assert (whole / "figures" / "bits_per_byte.png").stat().st_size > 10_000


def test_the_base_is_a_checkpoint_that_transformers_opens(whole, config):
    path = checkpoint.latest(whole / "checkpoint")
    model, tokenizer = hf.load(path)
    corpus = text_data.read(whole / "tokens")
    held_out = text_data.split(corpus, 0.3)[1]
    expected = read_metrics(whole)[-1]["eval/bits_per_byte"]
    assert measure(model, corpus, held_out, config)["eval/bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert pretrain_text.samples(model, tokenizer, config) == result_of(whole)["after/samples"]
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    assert theirs("def add_3(x):\r\n")["input_ids"] == tokenizer.encode("def add_3(x):\r\n")


def test_each_pass_trains_every_document_once_but_those_held_out(config, tmp_path, monkeypatch):
    trained, real = [], pretrain_text.loss_backward

    def loss_backward(model, rows, config):
        trained.extend(map(tuple, rows))
        return real(model, rows, config)

    monkeypatch.setattr(pretrain_text, "loss_backward", loss_backward)
    pretrain_text.main(replace(config, steps=20, eval_every=20, batch=3000, microbatch=3000, out=tmp_path / "run"))
    corpus = text_data.read(tmp_path / "run" / "tokens")
    train, held_out = text_data.split(corpus, 0.3)
    pieces = [tuple(row) for row in text_data.rows(corpus, text_data.pieces(corpus, train, 64))]
    assert set(trained) == set(pieces) and len(trained) > 2 * len(pieces)
    assert sorted(trained[: len(pieces)]) == sorted(pieces)
    assert not set(trained) & set(map(tuple, text_data.rows(corpus, text_data.pieces(corpus, held_out, 64))))


def test_a_dense_model_with_multi_token_prediction_has_its_losses(config, tmp_path):
    shape = replace(MOE, mtp_depth=1)
    pretrain_text.main(replace(config, model=shape, steps=1, out=tmp_path / "mtp"))
    assert read_metrics(tmp_path / "mtp")[-1]["train/mtp_loss"] > 3
    pretrain_text.main(replace(config, model=DENSE, steps=1, out=tmp_path / "dense"))
    assert "train/max_violation" not in read_metrics(tmp_path / "dense")[-1]


def test_without_held_out_documents_all_are_trained(config, tmp_path):
    assert pretrain_text.main(replace(config, held_out=0.0, steps=1, out=tmp_path / "run")) == {}
    result = result_of(tmp_path / "run")
    assert result["documents/trained"] == 25 and "gzip/bits_per_byte" not in result and result["after/samples"]
    assert all("eval/bits_per_byte" not in row for row in read_metrics(tmp_path / "run"))


@pytest.mark.parametrize("count", [2, 5])
def test_a_stopped_run_resumes_to_the_same_bits(whole, config, tmp_path, monkeypatch, count):
    again = replace(config, out=tmp_path / "run")
    stop(monkeypatch, "pretrain_text", again, "experiments.pretrain_text", "clip_gradients", count)
    pretrain_text.main(replace(again, resume=True))
    assert_same_run(again.out, whole)


def test_a_run_resumes_without_its_text_but_not_from_changed_tokens(whole, config, tmp_path, monkeypatch):
    again = replace(config, out=tmp_path / "run", resume=True)
    shutil.copytree(whole, again.out)
    monkeypatch.setattr(text_files, "documents", None)  # neither the text nor the tokenizer's folder is read again
    monkeypatch.setattr(pretrain_text, "loss_backward", None)
    away = config.tokenizer.rename(config.tokenizer.with_name("away"))
    try:
        pretrain_text.main(again)
    finally:
        away.rename(config.tokenizer)
    assert_same_run(again.out, whole)
    content = bytearray((again.out / "tokens" / "tokens.bin").read_bytes())
    content[100] ^= 1
    (again.out / "tokens" / "tokens.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"{again.out}/tokens cannot be read: tokens.bin has changed"):
        pretrain_text.main(again)
    with pytest.raises(ValueError, match="window: 64 then, 32 now"):
        pretrain_text.main(replace(again, window=32))


def test_a_run_on_another_device_is_that_of_the_cpu(config, tmp_path):
    for device in ("cpu", "standin"):
        pretrain_text.main(replace(config, steps=1, device=device, out=tmp_path / device))
    assert plain_metrics(tmp_path / "cpu") == plain_metrics(tmp_path / "standin")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": (Path("none"),)}, "there is no file or folder none"),
        ({"tokenizer": Path("none")}, "none holds no tokenizer.json"),
        ({"model": replace(MOE, shared_experts=0)}, "no Hugging Face class for shared_experts = 0"),
        ({"dense": True}, "--model.* is the shape of the MLA"),
        ({"device": "gpu"}, "device = 'gpu'"),
        ({"wandb": "on"}, "wandb is 'on'"),
        ({"held_out": 1.0}, "held_out = 1.0 of 25 documents leaves none to train on"),
    ],
)
def test_a_refused_start_leaves_nothing_behind(config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        pretrain_text.main(replace(config, out=tmp_path / "runs" / "a", **changes))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_user_stays(config, tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match=f"{tmp_path}/tokens is there and holds no about.json"):
        pretrain_text.main(replace(config, out=tmp_path))
    assert [path.name for path in tmp_path.rglob("*")] == ["tokens", "notes.txt"]


def test_a_folder_in_use_is_refused_before_anything_is_read(whole, config, monkeypatch):
    monkeypatch.setattr(text_files, "documents", None)
    with pytest.raises(ValueError, match="already holds a run: continue it with --resume"):
        pretrain_text.main(config)


def test_the_table_has_the_yardstick_between_before_and_after():
    values = {"after": 1.6, "before": 4.0, "gzip": 2.0}
    rows = pretrain_text.table_rows({f"{when}/bits_per_byte": bits for when, bits in values.items()})
    assert [row[1:] for row in rows] == [["4.000", "2.00"], ["2.000", "4.00"], ["1.600", "5.00"]]
    assert pretrain_text.table_rows({}) == []


def test_the_page_shows_the_samples_as_indented_text(whole):
    result = result_of(whole) | {"before/samples": ["a\x00\n\n\t```\nb  "], "after/samples": ["c", "<!-- end -->"]}
    table, facts, *parts = pretrain_text.page(result).split("\n\n")
    assert table.startswith("|  | bits per byte |") and table.count("\n") == 4 and "documents of" in facts
    assert parts == [
        "Samples before training:", "    a\ufffd", "            ```\n    b", "<!-- -->",
        "Samples after training:", "    c", "<!-- -->", "    <! -- end -->", "<!-- -->",
    ]  # fmt: skip


def test_batches_are_a_function_of_the_seed(config, tmp_path):
    corpus, _ = corpus_of(config, tmp_path / "tokens")
    lengths = np.diff(text_data.pieces(corpus, np.arange(25), 64))[:, 0].tolist()
    orders = [list(itertools.islice(text_data.batches(lengths, 600, seed), 9)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
