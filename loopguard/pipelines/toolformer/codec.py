"""Text to tokens and back: our own small tokenizer, or the one that comes with a pretrained model.

Either is a transformers tokenizer in which `<<` and `>>` are one token each, so that the rest of the loop does not know
which one it has.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loopguard.pipelines.toolformer.text import CLOSE, OPEN

if TYPE_CHECKING:
    from collections.abc import Iterable

_PAD, _BEGIN, _END, _UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
# Words with the space before them; digits one by one, since the model has to copy numbers; every sign by itself.
_PIECES = Regex(r" ?\p{L}+|\p{N}|[^\s\p{L}\p{N}]|\s")
_SIGNS = "0 1 2 3 4 5 6 7 8 9 + - * / ( ) = . $ %"


class Codec:
    """A tokenizer as the loop uses it. Encodings are remembered, since the same lines come up again and again."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.open = int(tokenizer.convert_tokens_to_ids(OPEN))
        self.close = int(tokenizer.convert_tokens_to_ids(CLOSE))
        self.end = int(tokenizer.eos_token_id)
        self.pad = self.end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.begin = self.end if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        self.encode = lru_cache(maxsize=200_000)(self._encode)
        texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
        self.ends_call = frozenset({self.end, *_where(texts, r".*[=<>].*")})
        """Tokens after which a call is over."""
        self.ends_number = frozenset(set(range(len(texts))) - set(_where(texts, r"[\d.-]+")))
        """Tokens that are no part of a number."""

    def __len__(self) -> int:
        return len(self.tokenizer)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, tokens: list[int]) -> str:
        """The text of some tokens, with `<<` and `>>` left in."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def to_json(self) -> str:
        """The whole tokenizer as text."""
        return str(self.tokenizer.backend_tokenizer.to_str())


def train(lines: Iterable[str], *, vocabulary: int) -> Codec:
    """A tokenizer of our own, learned from these lines."""
    tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_PAD, _BEGIN, _END, _UNKNOWN, OPEN, CLOSE],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*lines, *_SIGNS.split()], trainer)
    return from_json(tokenizer.to_str())


def from_json(text: str) -> Codec:
    """The codec whose `to_json` gave this."""
    return Codec(
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(text),
            pad_token=_PAD,
            bos_token=_BEGIN,
            eos_token=_END,
            unk_token=_UNKNOWN,
        )
    )


def _where(texts: list[str], pattern: str) -> list[int]:
    return [token for token, text in enumerate(texts) if re.fullmatch(pattern, text, re.ASCII | re.DOTALL)]
