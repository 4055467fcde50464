"""A `Trainer` of transformers under guard: one line, and a batch without a label moves no weight.

    python examples/transformers_trainer.py [RUN_DIR] [--plant-fault] [--observe] [--resume]

A small model learns to add two digits, from a config and rows that are made here; nothing is downloaded. With
`--plant-fault` the batch of update 31 has all its labels masked, as prompts have that were cut before their answer. Its
loss is 0/0. The trainer's own log shows a number there, because it filters what is none; the guard reads the loss where
it arises and withholds the update. `--resume` goes on from the last checkpoint.

Needs no Docker, since it calls no tool. `--observe` needs no guard policy either: it looks on, and says where it would
have frozen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from loopguard import LoopFrozen, LoopGuard

POLICY = Path(__file__).parent / "trainers.yaml"
UPDATES, BATCH, MASKED = 60, 8, -100


def row(number, *, labelled=True):
    """One sum of two digits as bytes; the loss is over the answer alone."""
    a, b = number * 7 % 10, number * 3 % 11 % 10
    prompt, answer = f"{a} + {b} =".encode(), f" {a + b:2}".encode()
    labels = [MASKED] * len(prompt) + (list(answer) if labelled else [MASKED] * len(answer))
    return {"input_ids": list(prompt + answer), "labels": labels}


def make_trainer(folder, *, plant_fault=False):
    """The trainer, with checkpoints in `folder`. A replay makes the same one: see examples/transformers_replay.py."""
    torch.set_num_threads(1)  # of two, one would wait for the other: the model is small
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 256}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=UPDATES,
        learning_rate=3e-3,
        train_sampling_strategy="sequential",
        eval_strategy="steps",  # each evaluation asks the promotion gate
        eval_steps=20,
        save_strategy="steps",
        save_steps=10,
        logging_steps=10,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    without = range(30 * BATCH, 31 * BATCH) if plant_fault else ()
    return Trainer(
        model=GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)),
        args=arguments,
        train_dataset=[row(number, labelled=number not in without) for number in range(UPDATES * BATCH)],
        eval_dataset=[row(number) for number in range(100, 132)],
    )


def main():
    options = argparse.ArgumentParser()
    options.add_argument("run_dir", nargs="?", default="runs/transformers-trainer")
    options.add_argument("--plant-fault", action="store_true")
    options.add_argument("--observe", action="store_true")
    options.add_argument("--resume", action="store_true")
    options = options.parse_args()

    def opened():
        """The guard; or an observer in its place, which withholds nothing and needs no guard policy."""
        if options.observe:
            return LoopGuard.observe(options.run_dir)
        return LoopGuard.from_file(POLICY, run_dir=options.run_dir)

    trainer = make_trainer(f"{options.run_dir}-checkpoints", plant_fault=options.plant_fault)
    try:
        with opened() as guard:
            guard.attach(trainer)
            trainer.train(resume_from_checkpoint=options.resume or None)
    except LoopFrozen as frozen:
        print(frozen)
        print(f"the trainer stands at {trainer.state.global_step} updates; loopguard audit why {options.run_dir}")
        return frozen.exit_code
    print(f"trained {trainer.state.global_step} updates; see {options.run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
