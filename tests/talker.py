"""A model whose next token depends on the last one alone, as a table says: its answers are known, and may never end."""

from pathlib import Path

import torch

from minir1.model import hf
from minir1.model.config import dense
from minir1.model.transformer import Transformer
from minir1.tokenizer import Tokenizer, word_level

SCRIPT = "<script>document.title='owned'</script>"
WORDS = ("User:", "\nAssistant:", "make ", " from ", " no\n", "hello ", SCRIPT, "你好", "👨‍👩‍👧")


def talker(follows: dict[str, str], words=WORDS, window: int = 4096) -> tuple[Transformer, Tokenizer]:
    """The model that writes follows[token] after a token, and the end after one that is not in the table.

    Its residual stream holds one number per token, its blocks add nothing to it, and its head is the table.
    """
    tokenizer = word_level(words, 100)
    size = tokenizer.size
    shape = dense(vocab=size, dim=size + size % 2, layers=1, heads=1, kv_heads=1, ffn=8, max_positions=window)
    model = Transformer(shape)
    number = lambda text: tokenizer.backend.token_to_id(text)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model.norm.weight.fill_(1.0)
        model.embedding.weight.copy_(torch.eye(size, model.config.dim))
        model.head.weight.zero_()
        for token in range(size):
            after = follows.get(tokenizer.backend.id_to_token(token), "<|endoftext|>")
            model.head.weight[number(after), token] = 3.0  # times √D: as good as certain
    return model.eval(), tokenizer


def saved(folder: Path, follows: dict[str, str], **settings) -> Path:
    """Its Hugging Face folder."""
    hf.save(*talker(follows, **settings), folder)
    return folder
