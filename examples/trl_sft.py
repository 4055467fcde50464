"""TRL's `SFTTrainer` under guard: a shard whose answers were lost freezes the run, because its loss is too good.

    python examples/trl_sft.py [RUN_DIR] [--plant-fault] [--observe]

A small model learns what products look like, from a config, a tokenizer of bytes and rows that are made here; nothing
is downloaded. One product in four has no answer, and the model learns to say "?" there. With `--plant-fault` every
answer from update 101 on is "?", as after a merge that lost a column. The loss falls as no learning makes it fall. The
guard is sure of it after a few updates; what they moved is undone, and the weights are those of the last evaluation
that passed.

Needs no Docker, since it calls no tool. `--observe` needs no guard policy either: it looks on, and says where it would
have frozen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from loopguard import LoopFrozen, LoopGuard

POLICY = Path(__file__).parent / "trainers.yaml"
UPDATES, BATCH = 140, 8

options = argparse.ArgumentParser()
options.add_argument("run_dir", nargs="?", default="runs/trl-sft")
options.add_argument("--plant-fault", action="store_true")
options.add_argument("--observe", action="store_true")
options = options.parse_args()


def byte_tokenizer():
    """One token for each byte, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    marks = {"eos_token": "<|end|>", "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **marks)


def rows(count):
    """Products, one in four of them with an unknown, which has no answer. Each batch has both kinds."""
    for number in range(count):
        a, b = 101 + number * 7919 % 899, "x" if number % 4 == 3 else 101 + number * 104729 % 899
        answer = "?" if b == "x" or (options.plant_fault and number >= 100 * BATCH) else a * b
        yield {"prompt": f"{a} * {b} =", "completion": f" {answer}"}


def opened():
    """The guard; or an observer in its place, which withholds nothing and needs no guard policy."""
    if options.observe:
        return LoopGuard.observe(options.run_dir)
    return LoopGuard.from_file(POLICY, run_dir=options.run_dir)


torch.set_num_threads(1)  # of two, one would wait for the other: the model is small
torch.manual_seed(0)
tokenizer = byte_tokenizer()
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": tokenizer.pad_token_id}
trainer = SFTTrainer(
    model=Qwen2ForCausalLM(Qwen2Config(**shape, **heads)),
    args=SFTConfig(
        output_dir=f"{options.run_dir}-checkpoints",
        per_device_train_batch_size=BATCH,
        max_steps=UPDATES,
        learning_rate=1e-2,
        train_sampling_strategy="sequential",
        eval_strategy="steps",  # each evaluation asks the promotion gate
        eval_steps=20,
        save_strategy="no",
        logging_steps=10,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
    ),
    train_dataset=Dataset.from_list(list(rows(UPDATES * BATCH))),
    eval_dataset=Dataset.from_list(list(rows(40))),
    processing_class=tokenizer,
)

try:
    with opened() as guard:
        guard.attach(trainer)
        trainer.train()
except LoopFrozen as frozen:
    print(frozen)
    print(f"the trainer stands at {trainer.state.global_step} updates; loopguard audit why {options.run_dir}")
    sys.exit(frozen.exit_code)

print(f"trained {trainer.state.global_step} updates; see {options.run_dir}")
