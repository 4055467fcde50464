"""The model that learns to call: a small Llama from nothing, or a pretrained one from a folder; its loss; its samples.

Letters in tensor names: B examples, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

from loopguard.errors import UsageError
from loopguard.pipelines.toolformer.codec import Codec
from loopguard.pipelines.toolformer.text import CLOSE, OPEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from loopguard.pipelines.toolformer.settings import Settings

_BATCH = 128
"""Examples that are generated or scored at once."""
_RAMP_UPDATES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Tokens, and how much each counts in the loss."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Examples side by side, padded on the right."""

    tokens_BT: torch.Tensor
    weights_BT: torch.Tensor
    mask_BT: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a model has to know of its codec."""

    size: int
    pad: int
    begin: int
    end: int


def from_nothing(vocabulary: Vocabulary, settings: Settings) -> torch.nn.Module:
    """A small Llama with random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=settings.hidden,
        intermediate_size=settings.feedforward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=256,
        pad_token_id=vocabulary.pad,
        bos_token_id=vocabulary.begin,
        eos_token_id=vocabulary.end,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)  # type: ignore[no-any-return]


def trained(model: torch.nn.Module, settings: Settings) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer of a model and its schedule."""

    def rate(updates: int) -> float:
        """The learning rate after so many updates, as a share of the highest one."""
        lowest, total = settings.cycle_rate, settings.warmup_updates
        descent = lowest + (1 - lowest) * 2 * (1 - updates / total)
        return max(lowest, min(1.0, (updates + 1) / _RAMP_UPDATES, descent))

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def from_folder(folder: Path) -> tuple[Codec, torch.nn.Module]:
    """A pretrained model and its tokenizer, which learns `<<` and `>>`. Raises UsageError where there is none."""
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"--model {folder}: no config.json there; expected a folder that save_pretrained of a transformers "
            "model and its tokenizer wrote"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, attn_implementation="sdpa", dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = str(error).strip().partition("\n")[0]
        raise UsageError(f"--model {folder}: not a causal language model with its tokenizer: {what}") from error
    if tokenizer.eos_token_id is None:
        raise UsageError(f"--model {folder}: its tokenizer has no end-of-text token, which the loop needs to pad with")
    tokenizer.add_tokens([OPEN, CLOSE])
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return Codec(tokenizer), model


def collate(examples: Sequence[Example], *, pad: int) -> Batch:
    """Put examples side by side."""
    width = max(len(example.tokens) for example in examples)
    tokens = [[*example.tokens, *[pad] * (width - len(example.tokens))] for example in examples]
    weights = [[*example.weights, *[0.0] * (width - len(example.weights))] for example in examples]
    lengths = torch.tensor([len(example.tokens) for example in examples])
    return Batch(
        tokens_BT=torch.tensor(tokens),
        weights_BT=torch.tensor(weights),
        mask_BT=(torch.arange(width) < lengths[:, None]).long(),
    )


def logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """What the model expects at each token, from the tokens before it: BTV, one shorter than the batch."""
    out = model(input_ids=batch.tokens_BT, attention_mask=batch.mask_BT, use_cache=False)
    return out.logits[:, :-1]  # type: ignore[no-any-return]


def token_losses(logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Nats for each token but the first: BT."""
    targets_BT = batch.tokens_BT[:, 1:]
    losses = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
    return losses.view(targets_BT.shape)


def weighted_mean(losses_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The training loss."""
    weights = batch.weights_BT[:, 1:]
    return (losses_BT * weights).sum() / weights.sum()


@torch.inference_mode()
def score(model: torch.nn.Module, examples: Sequence[Example], *, pad: int) -> list[tuple[float, float]]:
    """For each example the weighted sum of its losses, and the sum of the weights."""
    model.eval()
    scores: list[tuple[float, float]] = [(0.0, 0.0)] * len(examples)
    for part in _parts([len(example.tokens) for example in examples]):
        batch = collate([examples[i] for i in part], pad=pad)
        weights = batch.weights_BT[:, 1:]
        sums = (token_losses(logits(model, batch), batch) * weights).sum(1)
        for i, total, weight in zip(part, sums.tolist(), weights.sum(1).tolist(), strict=True):
            scores[i] = (total, weight)
    return scores


@torch.inference_mode()
def generate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    pad: int,
    length: int,
    stop: frozenset[int],
    temperature: float = 0.0,
    forbid: Sequence[int] = (),
    advance: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """What the model writes after each prompt, up to and with the first token in `stop`.

    Greedy at temperature 0, else sampled from torch's global generator. Prompts are padded on the left, so that all of
    a batch write at the same position, and the keys and values of what was read are kept.
    """
    model.eval()
    written: list[list[int]] = [[] for _ in prompts]
    for part in _parts([len(prompt) for prompt in prompts]):
        rows = _write([prompts[i] for i in part], model, pad, length, stop, temperature, list(forbid))
        for i, row in zip(part, rows, strict=True):
            written[i] = row
        advance(len(part))
    return written


def _write(
    prompts: Sequence[Sequence[int]],
    model: Any,
    pad: int,
    length: int,
    stop: frozenset[int],
    temperature: float,
    forbid: list[int],
) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    blanks = torch.tensor([width - len(prompt) for prompt in prompts])
    tokens = torch.tensor([[*[pad] * (width - len(prompt)), *prompt] for prompt in prompts])
    mask = (torch.arange(width) >= blanks[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    stops = torch.tensor(sorted(stop))
    rows: list[torch.Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool)
    cache = {_cache_word(model): DynamicCache()}  # filled by each call
    for _ in range(length):
        out = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, **cache)
        chosen = _choose(out.logits[:, -1], temperature, forbid)
        rows.append(torch.where(done, -1, chosen))
        done = done | torch.isin(chosen, stops)
        if done.all():
            break
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    return [[token for token in row if token >= 0] for row in torch.stack(rows, dim=1).tolist()]


def _cache_word(model: Any) -> str:
    """What a model calls its cache of keys and values: transformers has another word for it from 5.24 on."""
    words = inspect.signature(model.forward).parameters
    return "cache" if "cache" in words else "past_key_values"


def _choose(logits_BV: torch.Tensor, temperature: float, forbid: list[int]) -> torch.Tensor:
    logits_BV[:, forbid] = -torch.inf
    if temperature == 0:
        return logits_BV.argmax(-1)
    return torch.multinomial((logits_BV / temperature).softmax(-1), 1)[:, 0]


def _parts(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of like lengths, so that little is padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), _BATCH):
        yield order[start : start + _BATCH]
