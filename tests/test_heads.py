"""heads.py: values from one pass or a separate model; scalar folders against transformers' sequence classifiers."""
import json
import time

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from minir1.model import heads, hf
from minir1.model.config import ModelConfig, dense
from minir1.model.heads import ScalarModel, ValueHead
from minir1.model.lora import add_adapters
from minir1.model.transformer import Transformer
from minir1.tasks.countdown_corpus import WORDS
from minir1.tokenizer import word_level

transformers.utils.logging.disable_progress_bar()

TOKENIZER = word_level(WORDS, largest_number=24)
SHAPE = {"vocab": 64, "dim": 32, "layers": 2, "heads": 4, "ffn": 40, "init_std": 0.17, "eos": 0, "pad": 1}
CONFIGS = {
    "DeepseekV3": ModelConfig(**SHAPE, kv_lora=12, nope=8, rope=8, v_dim=6, experts=4, expert_ffn=12, mtp_depth=1),
    "Qwen2": dense(**SHAPE, kv_heads=2, tied=True),
}
T = 12
LENGTHS = torch.tensor([T, 3, 7, 1])
REAL = torch.arange(T) < LENGTHS.unsqueeze(1)
X = torch.randint(2, 64, (4, T), generator=torch.Generator().manual_seed(0)).masked_fill(~REAL, 1)


def build(name="Qwen2", head=True, **changes):
    """A random trunk, and on it a random head."""
    torch.manual_seed(0)
    trunk = Transformer(ModelConfig(**vars(CONFIGS[name]) | changes))
    if not head:
        return trunk
    model = ScalarModel(trunk, ValueHead(32))
    torch.nn.init.normal_(model.head.weight)
    return model


# ---- numbers -----------------------------------------------------------------------------------


def test_every_value_is_zero_at_first_and_a_dot_product_later():
    head, h = ValueHead(32), torch.randn(2, 3, 32)
    assert head(h).shape == (2, 3) and head(h).abs().max() == 0
    torch.nn.init.normal_(head.weight)
    torch.testing.assert_close(head(h), h @ head.weight[0])
    assert head.bfloat16()(h.bfloat16()).dtype == torch.float32 and ValueHead(32)(h.double()).dtype == torch.float64


def test_autocast_does_not_round_values():
    model, head = build("DeepseekV3"), ValueHead(32)
    torch.nn.init.normal_(head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.trunk.hidden(X, lengths=LENGTHS)
        values, score = model.values(X, lengths=LENGTHS), model.score(X, lengths=LENGTHS)
        alone = head(hidden)
    assert values.dtype == score.dtype == alone.dtype == torch.float32
    assert torch.equal(alone, head(hidden))
    assert torch.equal(score, model.head(hidden[torch.arange(4), LENGTHS - 1]))
    assert torch.equal(values, F.pad(model.head(hidden)[:, :-1], (1, 0)) * (REAL & (torch.arange(T) > 0)))


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_entropy_and_values_come_from_one_pass(name, monkeypatch):
    model, head = build(name, head=False), ValueHead(32)
    torch.nn.init.normal_(head.weight)
    mask = REAL & (torch.arange(T) >= 2)
    want = model.logprob(X, lengths=LENGTHS, mask=mask, entropy=True)
    hidden, passes, real = model.hidden(X, lengths=LENGTHS), [], model._prefill
    monkeypatch.setattr(model, "_prefill", lambda *a, **k: passes.append(1) or real(*a, **k))
    logp, entropy, value = model.logprob(X, lengths=LENGTHS, mask=mask, entropy=True, value=head)
    assert len(passes) == 1 and torch.equal(logp, want[0]) and torch.equal(entropy, want[1])
    before = F.pad(head(hidden)[:, :-1], (1, 0))  # the state before x_t is that of x_{t-1}
    torch.testing.assert_close(value, before * mask)
    logp, value = model.logprob(X, lengths=LENGTHS, mask=mask, value=head)
    assert torch.equal(logp, want[0]) and value[~mask].abs().max() == 0
    value.sum().backward()
    assert head.weight.grad.abs().max() > 0 and model.embedding.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_separate_critic_gives_the_values_of_a_head_on_the_same_trunk(name):
    trunk, model = build(name, head=False), build(name)
    for mask in (None, REAL & (torch.arange(T) >= 2)):
        _, want = trunk.logprob(X, lengths=LENGTHS, mask=mask, value=model.head)
        torch.testing.assert_close(model.values(X, lengths=LENGTHS, mask=mask), want)
    with pytest.raises(ValueError, match=r"mask \(4, 2\)"):
        model.values(X, lengths=LENGTHS, mask=REAL[:, :2])


def test_a_value_depends_on_earlier_tokens_only_and_a_score_on_all():
    model, other = build(), X.clone()
    other[0, 5] = (X[0, 5] + 1 - 2) % 62 + 2
    a, b = (model.values(x, lengths=LENGTHS)[0] for x in (X, other))
    assert torch.equal(a[:6], b[:6]) and (a[6:] != b[6:]).all()
    assert a[0] == 0 and model.values(X, lengths=LENGTHS)[1, 3:].abs().max() == 0
    assert (model.score(X, lengths=LENGTHS) != model.score(other, lengths=LENGTHS)).tolist() == [True] + [False] * 3


def test_the_score_is_that_of_the_last_token_for_any_padding():
    model = build()
    want = torch.stack([model.head(model.trunk.hidden(X[i : i + 1, :n]))[0, -1] for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(model.score(X, lengths=LENGTHS), want)
    torch.testing.assert_close(model.score(torch.where(REAL, X, 9), lengths=LENGTHS), want)
    torch.testing.assert_close(model.score(X[:1], lengths=None), want[:1])
    with pytest.raises(ValueError, match=r"lengths = \[12, 0\]: a row without tokens"):
        model.score(X[:2], lengths=torch.tensor([12, 0]))


def test_the_trunk_loses_its_language_head_and_mtp_modules():
    names = build("DeepseekV3").state_dict().keys()
    assert not [name for name in names if name.startswith(("trunk.head", "trunk.mtp"))] and "head.weight" in names
    with pytest.raises(ValueError, match="a head of width 16 on a trunk of width 32"):
        ScalarModel(build(head=False), ValueHead(16))


# ---- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_opens_the_folder_and_scores_alike(name, tmp_path):
    model = build(name)
    heads.save(model, TOKENIZER, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["architectures"] == [f"{name}ForSequenceClassification"] and values["pad_token_id"] == 1
    assert load_file(tmp_path / "model.safetensors")["score.weight"].shape == (1, 32)
    auto = transformers.AutoModelForSequenceClassification
    theirs, info = auto.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert type(theirs).__name__ == values["architectures"][0] and theirs.config.num_labels == 1
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        have, want = model.score(X, lengths=LENGTHS), theirs(X, attention_mask=REAL.long()).logits.squeeze(1)
    assert want.std() > 0.3
    torch.testing.assert_close(have, want, rtol=0, atol=1e-5)

    back, tokenizer = heads.load(tmp_path)
    assert tokenizer.eos == TOKENIZER.eos and not back.config.tied and back.config.mtp_depth == 0
    ours, again = model.state_dict(), back.state_dict()
    assert ours.keys() == again.keys() and all(torch.equal(ours[key], again[key]) for key in ours)
    theirs.save_pretrained(tmp_path / "theirs")
    TOKENIZER.save(tmp_path / "theirs")
    again = heads.load(tmp_path / "theirs", dtype=torch.float32)[0]
    torch.testing.assert_close(again.score(X, lengths=LENGTHS), model.score(X, lengths=LENGTHS))


def test_a_compiled_scalar_model_is_saved_as_a_plain_one(tmp_path):
    model = build("DeepseekV3")
    heads.save(model, TOKENIZER, tmp_path / "plain")
    heads.save(torch.compile(model, backend="eager"), TOKENIZER, tmp_path / "whole")
    model.trunk, model.head = torch.compile(model.trunk, backend="eager"), torch.compile(model.head, backend="eager")
    heads.save(model, TOKENIZER, tmp_path / "parts")
    want = (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert all((tmp_path / name / "model.safetensors").read_bytes() == want for name in ("whole", "parts"))


def test_pad_token_id_is_none_where_it_equals_the_end_token(tmp_path):
    """Else transformers would treat the end token of a row as padding and read the state before it."""
    model = build(pad=0)
    heads.save(model, TOKENIZER, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert theirs.config.pad_token_id is None
    row = torch.cat((X[:1], torch.tensor([[0]])), 1)
    with torch.no_grad():
        torch.testing.assert_close(theirs(row).logits[0], model.score(row, lengths=None), rtol=0, atol=1e-5)


def test_the_error_names_the_function_for_each_kind_of_folder(tmp_path):
    heads.save(build(), TOKENIZER, tmp_path / "scalar")
    hf.save(build(head=False), TOKENIZER, tmp_path / "language")
    with pytest.raises(ValueError, match="holds a Qwen2ForSequenceClassification, no language model: .*heads.load"):
        hf.load(tmp_path / "scalar")
    with pytest.raises(ValueError, match="holds a Qwen2ForCausalLM, .*no scalar model; hf.load"):
        heads.load(tmp_path / "language")
    with pytest.raises(ValueError, match="holds no config.json"):
        heads.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"id2label": ["score"]}, "id2label = .*: must be dict"),
        ({"id2label": 5}, "id2label = 5: must be dict"),
        ({"id2label": None, "num_labels": "1"}, "has 1 labels"),
        ({"num_hidden_layers": 10**5}, "config.json has 100000 layers"),
        ({"vocab_size": 10**9}, "config.json has a size of 1000000000"),
        ({"architectures": 5}, "config.json names no architecture, not a"),
        ({"is_causal": False}, "is_causal = False"),
    ],
)
def test_a_wrong_config_is_refused_at_once(tmp_path, fields, message):
    heads.save(build(), TOKENIZER, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(values))
    began = time.process_time()
    with pytest.raises(ValueError, match=message):
        heads.load(tmp_path)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("labels", [{"0": "no", "1": "yes"}, None])
def test_several_labels_are_refused(tmp_path, labels):
    """Without num_labels in config.json transformers assumes two."""
    heads.save(build(), TOKENIZER, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"id2label": labels, "num_labels": 2}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has 2 labels: a scalar model has 1"):
        heads.load(tmp_path)


def test_what_no_class_of_theirs_computes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="GraniteForCausalLM has no class for sequence classification"):
        heads.save(build(embedding_scale=2.0, qkv_bias=False), TOKENIZER, tmp_path)
    model = build()
    add_adapters(model.trunk, 2, 4.0)
    with pytest.raises(ValueError, match="the model has adapters"):
        heads.save(model, TOKENIZER, tmp_path)
    assert not list(tmp_path.iterdir())
