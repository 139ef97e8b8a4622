"""Text to tokens and back: tokenizers are trained and kept by the `tokenizers` library, chat templates are Jinja."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

EOS, PAD, UNK = "<|endoftext|>", "<|pad|>", "<|unk|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TEMPLATE = (  # R1-Zero's: the question, then the assistant's turn (arXiv:2501.12948, table 1)
    "{% for message in messages %}"
    "{% if message.role == 'user' %}User:{{ message.content }}\nAssistant:"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special tokens and chat template, as a Hugging Face folder holds them."""

    def __init__(
        self, backend: tokenizers.Tokenizer, template: str = TEMPLATE, eos: str = EOS, pad: str = PAD, bos: str = ""
    ):
        self.backend, self.template = backend, template
        self.eos_token, self.pad_token, self.bos_token = eos, pad, bos  # bos: only for templates that write it
        self.eos, self.pad = self.id(eos), self.id(pad)

    def id(self, token: str) -> int:
        """The number of one token; ValueError if there is none."""
        number = self.backend.token_to_id(token)
        if number is None:
            raise ValueError(f"the tokenizer has no token {token!r}")
        return number

    @property
    def size(self) -> int:
        """How many tokens there are, special ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; special tokens written in it are recognised, none is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text."""
        return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[int], keep_special: bool = True) -> str:
        """The text of some tokens; without EOS and PAD if keep_special is False.

        A number that is no token (a model's vocabulary may be padded) shows as U+FFFD and does not vanish.
        """
        if not keep_special:
            tokens = [t for t in tokens if t not in (self.eos, self.pad)]
        pieces: list[list[int]] = [[]]
        for token in tokens:
            pieces.append([]) if token >= self.size else pieces[-1].append(token)
        return "\ufffd".join(self.backend.decode(piece, skip_special_tokens=False) for piece in pieces)

    def chat(self, question: str) -> str:
        """The prompt that asks one question, by the chat template."""
        return self.render([{"role": "user", "content": question}])

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat template over messages with `role` and `content`, rendered in jinja's sandbox."""

        def raise_exception(message: str):  # what Hugging Face's templates call
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = raise_exception
        return environment.from_string(self.template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            eos_token=self.eos_token,
            pad_token=self.pad_token,
            bos_token=self.bos_token,
        )

    def save(self, path: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers opens with AutoTokenizer."""
        path = Path(path)
        self.backend.save(str(path / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.template,
        }
        if self.bos_token:
            config["bos_token"] = self.bos_token
        (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read what `save` or a Hugging Face folder holds; ValueError names what is missing."""
        path = Path(path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (path / name).exists():
                raise ValueError(f"{path} holds no {name}")
        config = json.loads((path / "tokenizer_config.json").read_text())

        def text(token):  # older files write a dict
            return token["content"] if isinstance(token, dict) else token

        eos = text(config.get("eos_token"))
        if eos is None:
            raise ValueError(f"{path / 'tokenizer_config.json'} names no eos_token")
        template = config.get("chat_template") or TEMPLATE
        if (path / "chat_template.jinja").exists():  # where transformers 5 writes it
            template = (path / "chat_template.jinja").read_text()
        return cls(
            tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")),
            template=template,
            eos=eos,
            pad=text(config.get("pad_token")) or eos,
            bos=text(config.get("bos_token")) or "",
        )


def word_level(words: Iterable[str], largest_number: int) -> Tokenizer:
    """One token a word, a number 0 … largest_number, a sign. A word takes the space before and after it along.

    So `make 24 from 11,3` is `make `, `24`, ` from `, `11`, `,`, `3`. Unknown text becomes <|unk|>.
    """
    special = [EOS, PAD, UNK, *TAGS]
    entries = [*special, *(str(n) for n in range(largest_number + 1)), *"+-*=,:()\n ", *words]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(entries))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|\s?[A-Za-z]+:?\s?|\s|."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(special)
    return Tokenizer(backend)


def train_bpe(texts: Iterable[str], size: int, numbers: bool = False) -> Tokenizer:
    """Byte-level BPE learned from texts, `size` tokens in all, special ones too. With `numbers`, up to three digits
    are a piece of their own, apart from what stands beside them. ValueError where `size` has no room for the bytes."""
    special, alphabet = [EOS, PAD, *TAGS], pre_tokenizers.ByteLevel.alphabet()
    if size < len(special) + len(alphabet):
        raise ValueError(f"size = {size}: at least {len(special) + len(alphabet)}, the special tokens and the bytes")
    backend = tokenizers.Tokenizer(models.BPE())
    pieces = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not numbers)]
    if numbers:
        pattern = Regex(r"\d{1,3}| ?[A-Za-z]+|\s+|[^\sA-Za-z\d]+")
        pieces = [pre_tokenizers.Split(pattern, behavior="isolated"), *pieces]
    backend.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)
