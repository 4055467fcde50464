"""Tiny trainers of transformers and TRL: on a CPU, from nothing but a config, seeded, each run over in about a second.

Every trainer here reads its rows in order, has no dropout, writes no checkpoint unless asked, and uses a learning rate
that depends on the number of updates done but not on the number to come. So a run over a batch that a guard withheld
can be compared to the bit with one that never had it.

An *update* is numbered from 0 by the batches it is made of, whether or not the optimizer stepped. Three ways to plan
what happens to update k:

    batches(6, bad={3: nan})         the loss over batch 3 is multiplied by nan (make_trainer only)
    make_sft(..., spoil={3: 50.0})   the loss of update 3 is multiplied by 50 (all four)
    make_grpo(..., unstepped={3})    update 3 is computed and never applied, by other means than a guard's: the run to
                                     compare with where leaving out a batch would change what is generated later

    batches(6, without={3})          and its like: the same rows in the same order, without those of batch 3
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="these are trainers of torch models")
transformers = pytest.importorskip("transformers", reason="these are trainers of transformers and TRL")

torch.set_num_threads(1)
nan = float("nan")

VOCABULARY = 50
LENGTH = 12
BATCH = 2
"""Rows in a batch of make_trainer, make_sft and make_dpo."""

WARNINGS = [
    "ignore:.*experimental feature:UserWarning",  # tools and environments of GRPO
    "ignore:.*is_gradient_checkpointing:FutureWarning",  # TRL reads what transformers has renamed
]
"""What TRL warns of in such runs, for `pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]`."""


def tiny_gpt2() -> Any:
    """A GPT-2 of about 3,000 weights, the same in each call, without dropout."""
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64, "vocab_size": VOCABULARY}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **still))


def batches(n: int, bad: Mapping[int, float] | None = None, *, without: Collection[int] = ()) -> list[dict[str, Any]]:
    """The rows of n batches in order, less those in `without`; the loss over batch k is multiplied by bad[k]."""
    bad = bad or {}
    rows = []
    for number, ids in enumerate(_token_ids(n)):
        weight = torch.tensor(bad.get(number, 1.0))
        rows += [{"input_ids": row, "labels": row, "w": weight} for row in ids if number not in without]
    return rows


def _token_ids(n: int) -> Iterable[Any]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=draw) for _ in range(n)]


def make_trainer(
    tmp_path: pathlib.Path,
    rows: Sequence[dict[str, Any]],
    *,
    optim: str = "adamw_torch_fused",
    callbacks: Sequence[Any] = (),
    eval_rows: Sequence[dict[str, Any]] | None = None,
    spoil: Mapping[int, float] | None = None,
    unstepped: Collection[int] = (),
    model: Any = None,
    **training_arguments: Any,
) -> Any:
    """A transformers.Trainer over `rows` of `batches`, once through unless training_arguments say otherwise."""

    class Weighted(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
            weight = inputs.pop("w").max() if "w" in inputs else 1.0
            # The parent divides by the tokens of the whole update, or by the number of its batches; a factor on what
            # it returns leaves that as it is.
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
            loss = loss * weight
            return (loss, outputs) if return_outputs else loss

    arguments = _arguments(tmp_path, optim=optim) | {"remove_unused_columns": False} | training_arguments
    trainer = _planned(Weighted, spoil=spoil, unstepped=unstepped)(
        model=model or tiny_gpt2(),
        args=transformers.TrainingArguments(**arguments),
        train_dataset=list(rows),
        eval_dataset=None if eval_rows is None else list(eval_rows),
        callbacks=list(callbacks),
    )
    return _quiet(trainer)


def make_sft(
    tmp_path: pathlib.Path,
    updates: int = 6,
    *,
    without: Collection[int] = (),
    callbacks: Sequence[Any] = (),
    evaluated: bool = False,
    spoil: Mapping[int, float] | None = None,
    unstepped: Collection[int] = (),
    **training_arguments: Any,
) -> Any:
    """A trl.SFTTrainer over `updates` batches of token ids, less those in `without`."""
    trl = pytest.importorskip("trl", reason="these are trainers of TRL")
    rows = [
        {"input_ids": ids.tolist()} for k, batch in enumerate(_token_ids(updates)) for ids in batch if k not in without
    ]
    arguments = _arguments(tmp_path) | {"max_length": LENGTH, "loss_type": "nll", "bf16": False} | _SMALL
    trainer = _planned(trl.SFTTrainer, spoil=spoil, unstepped=unstepped)(
        model=tiny_gpt2(),
        args=trl.SFTConfig(**(arguments | training_arguments)),
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(rows[:BATCH]) if evaluated else None,
        processing_class=_number_tokenizer(),
        callbacks=list(callbacks),
    )
    return _quiet(trainer)


def make_dpo(
    tmp_path: pathlib.Path,
    updates: int = 6,
    *,
    without: Collection[int] = (),
    callbacks: Sequence[Any] = (),
    evaluated: bool = False,
    spoil: Mapping[int, float] | None = None,
    unstepped: Collection[int] = (),
    **training_arguments: Any,
) -> Any:
    """A trl.DPOTrainer over `updates` batches of preferences, less those in `without`."""
    trl = pytest.importorskip("trl", reason="these are trainers of TRL")
    rows = [_preference(ids) for k, batch in enumerate(_token_ids(updates)) for ids in batch if k not in without]
    arguments = _arguments(tmp_path) | {"max_length": 2 * LENGTH, "bf16": False} | _SMALL
    trainer = _planned(
        trl.DPOTrainer, spoil=spoil, unstepped=unstepped
    )(
        model=tiny_gpt2(),
        ref_model=tiny_gpt2(),  # by default it is loaded again by its name, and this one has none
        args=trl.DPOConfig(**(arguments | training_arguments)),
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(rows[:BATCH]) if evaluated else None,
        processing_class=_number_tokenizer(),
        callbacks=list(callbacks),
    )
    return _quiet(trainer)


def make_grpo(
    tmp_path: pathlib.Path,
    updates: int = 4,
    *,
    tools: Sequence[Callable[..., Any]] | None = None,
    reward: Any = None,
    environment_factory: Any = None,
    force_calls: Sequence[Mapping[str, Any] | None] = (),
    callbacks: Sequence[Any] = (),
    spoil: Mapping[int, float] | None = None,
    unstepped: Collection[int] = (),
    evaluated: bool = False,
    model: Any = None,
    **training_arguments: Any,
) -> Any:
    """A trl.GRPOTrainer with one group of four completions in each update.

    A model of random weights never calls a tool by itself. `force_calls` says what its first turn comes to instead:
    completion i of a generation is the call force_calls[i % len(force_calls)], `{"name": ..., "arguments": {...}}`, and
    what the model wrote where that is None. What it wrote is generated all the same, so that random numbers are used
    up alike whatever is forced.

    Its loss is near zero in a healthy update, because advantages add up to nothing: a factor of nan shows in the loss,
    a large one in the gradients only.
    """
    trl = pytest.importorskip("trl", reason="these are trainers of TRL")
    tokenizer = byte_tokenizer()
    rows = [{"prompt": [{"role": "user", "content": f"what is {i}+{i}?"}]} for i in range(updates)]
    arguments = _arguments(tmp_path) | {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 16 if not (tools or environment_factory) else 160,
        "max_steps": updates,
        "shuffle_dataset": False,
        "bf16": False,
    }
    arguments |= _SMALL | ({"max_tool_calling_iterations": 1} if tools or environment_factory else {})
    rolled: dict[str, Any] = {"tools": list(tools)} if tools else {}
    if environment_factory is not None:
        rolled["environment_factory"] = environment_factory
    trainer = _planned(_forcing(trl.GRPOTrainer, tokenizer, force_calls), spoil=spoil, unstepped=unstepped)(
        model=model or tiny_qwen2(tokenizer),
        reward_funcs=reward or checksum,
        args=trl.GRPOConfig(**(arguments | training_arguments)),
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(rows[:1]) if evaluated else None,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **rolled,
    )
    return _quiet(trainer)


def checksum(completions: Sequence[Any], **_: Any) -> list[float]:
    """A reward in [0, 1) that differs between the completions of a group, so that every update has a gradient."""
    return [sum(map(ord, str(one))) % 100 / 100 for one in completions]


def tiny_qwen2(tokenizer: Any) -> Any:
    """A Qwen2 that knows the bytes of `tokenizer`, the same in each call."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 4096}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape, **heads, **ends))


def byte_tokenizer() -> Any:
    """A tokenizer of bytes with the chat template of Qwen 2.5, whose tool calls TRL knows how to read."""
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    marks = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **marks)
    tokenizer.chat_template = (pathlib.Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    return tokenizer


def state_of(trainer: Any) -> list[Any]:
    """A copy of what an update may change: weights, buffers, the optimizer's state and options, the schedule."""
    return _state(trainer.model, trainer.optimizer, trainer.lr_scheduler)


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the bit: a nan equals itself, and 0.0 does not equal -0.0."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(_bytes(a), _bytes(b)))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(one, other) for one, other in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


class Diary(transformers.TrainerCallback):
    """The states around each update of one run: before[k] and after[k] of update k."""

    def __init__(self) -> None:
        self.before: list[list[Any]] = []
        self.after: list[list[Any]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.before.append(_state(given["model"], given["optimizer"], given["lr_scheduler"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.after.append(_state(given["model"], given["optimizer"], given["lr_scheduler"]))


class Unstepped(transformers.TrainerCallback):
    """Leaves out the optimizer's step, and the schedule's, in the updates named: the reference that is no guard."""

    def __init__(self, updates: Collection[int]) -> None:
        self.updates = updates
        self.number = -1

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.number += 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        out = self.number in self.updates
        for weight in given["model"].parameters():
            weight.grad = None if out else weight.grad
        given["optimizer"]._is_overflow = out  # what both look at that tick the schedule


_SMALL = {"activation_checkpointing": False}


def _arguments(tmp_path: pathlib.Path, **more: Any) -> dict[str, Any]:
    run = {"output_dir": str(tmp_path / "trainer"), "num_train_epochs": 1, "seed": 0, "use_cpu": True}
    # A schedule that looks ahead, as the default does, would tell a run of six batches from one of seven.
    rates = {"learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "inverse_sqrt"}
    rates["lr_scheduler_kwargs"] = {"timescale": 4}
    still = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1000}
    rows = {"train_sampling_strategy": "sequential", "dataloader_pin_memory": False}
    rows |= {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH}
    return run | rates | still | rows | more


def _planned(kind: Any, *, spoil: Mapping[int, float] | None, unstepped: Collection[int]) -> Any:
    """The class of a trainer whose losses are multiplied, and whose steps are left out, as planned by update."""
    plan = dict(spoil or {})

    class Planned(kind):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.micro_batches = 0
            super().__init__(*args, **kwargs)
            if unstepped:
                self.add_callback(Unstepped(frozenset(unstepped)))

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.micro_batches += 1
            return loss

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
            result = super().compute_loss(model, inputs, return_outputs=return_outputs, **options)
            factor = plan.get(self.micro_batches // self.args.gradient_accumulation_steps, 1.0)
            if factor == 1.0 or not model.training:
                return result
            return (result[0] * factor, *result[1:]) if return_outputs else result * factor

    return Planned


def _forcing(kind: Any, tokenizer: Any, calls: Sequence[Mapping[str, Any] | None]) -> Any:
    if not calls:
        return kind
    import json

    texts = [None if call is None else f"<tool_call>\n{json.dumps(call)}\n</tool_call><|im_end|>" for call in calls]
    forced = [None if text is None else list(tokenizer(text)["input_ids"]) for text in texts]

    class Forcing(kind):
        def _generate(self, prompts: Any) -> Any:
            self.first_turn = True
            return super()._generate(prompts)

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            completions, logprobs = super()._generate_single_turn(*args, **kwargs)
            if self.first_turn:
                completions = [list(forced[i % len(forced)] or ids) for i, ids in enumerate(completions)]
            self.first_turn = False
            return completions, logprobs

    return Forcing


def _quiet(trainer: Any) -> Any:
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _dataset(rows: Sequence[Mapping[str, Any]]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_list([dict(row) for row in rows])


def _number_tokenizer() -> Any:
    """A tokenizer whose words are the numbers of its tokens, so that text and token ids say the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="0", pad_token="0")


def _preference(ids: Any) -> dict[str, str]:
    words = [str(one) for one in ids.tolist()]
    third = LENGTH // 3
    prompt, chosen, rejected = words[:third], words[third : 2 * third], words[2 * third :]
    return {"prompt": " ".join(prompt), "chosen": " " + " ".join(chosen), "rejected": " " + " ".join(rejected)}


def _state(model: Any, optimizer: Any, scheduler: Any) -> list[Any]:
    return [
        [weight.detach().clone() for weight in model.state_dict().values()],
        {} if optimizer is None else _copied(optimizer.state_dict()),
        None if scheduler is None else scheduler.last_epoch,
    ]


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list | tuple) else value


def _bytes(tensor: Any) -> Any:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
