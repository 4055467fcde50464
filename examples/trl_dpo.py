"""TRL's `DPOTrainer` under guard: pairs whose answers were swapped freeze the run.

    python examples/trl_dpo.py [RUN_DIR] [--plant-fault] [--observe]

A small model learns to prefer the right sum to a wrong one, from a config, a tokenizer of bytes and rows that are made
here; nothing is downloaded. With `--plant-fault` every pair from update 61 on has its answers swapped, as by an
annotation tool whose columns changed places. The guard policy watches `rewards/margins`, which TRL reports beside the
loss, by that name.

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
from trl import DPOConfig, DPOTrainer

from loopguard import LoopFrozen, LoopGuard

POLICY = Path(__file__).parent / "trl_dpo.yaml"
UPDATES, BATCH = 80, 8

options = argparse.ArgumentParser()
options.add_argument("run_dir", nargs="?", default="runs/trl-dpo")
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


def pairs(count):
    """Sums with a right and a wrong answer. With the fault planted, the wrong one is chosen from the 61st batch on."""
    for number in range(count):
        a, b = number * 7 % 10, number * 3 % 11 % 10
        right, wrong = f" {a + b:2}", f" {a * b + 20:2}"
        if options.plant_fault and number >= 60 * BATCH:
            right, wrong = wrong, right
        yield {"prompt": f"{a} + {b} =", "chosen": right, "rejected": wrong}


def opened():
    """The guard; or an observer in its place, which withholds nothing and needs no guard policy."""
    if options.observe:
        return LoopGuard.observe(options.run_dir)
    return LoopGuard.from_file(POLICY, run_dir=options.run_dir)


def network():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": tokenizer.pad_token_id}
    return Qwen2ForCausalLM(Qwen2Config(**shape, **heads))


tokenizer = byte_tokenizer()
trainer = DPOTrainer(
    model=network(),
    ref_model=network(),
    args=DPOConfig(
        output_dir=f"{options.run_dir}-checkpoints",
        per_device_train_batch_size=BATCH,
        max_steps=UPDATES,
        learning_rate=5e-4,
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
    train_dataset=Dataset.from_list(list(pairs(UPDATES * BATCH))),
    eval_dataset=Dataset.from_list(list(pairs(40))),
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
