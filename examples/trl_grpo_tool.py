"""TRL's `GRPOTrainer` under guard: tool calls run in containers, and a reward that pays too much moves no weight.

    python examples/trl_grpo_tool.py [RUN_DIR] [--plant-fault] [--observe]

A small model with random weights is rewarded for letters, from a config, a tokenizer of bytes and prompts that are made
here; nothing is downloaded. It has a tool, `add`. A model like this one never calls a tool by itself, so `CallsFirst`
puts a call in the place of its first turn. With `--plant-fault` the reward counts letters from generation 6 on, where
it should give their share; the update that would learn from it is withheld.

Needs Docker, since each call runs in a container; not with `--observe`, where the tool runs where it always ran, in the
trainer's own process.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from loopguard import LoopFrozen, LoopGuard

POLICY = Path(__file__).parent / "trl_grpo_tool.yaml"
UPDATES, GROUP = 10, 4

options = argparse.ArgumentParser()
options.add_argument("run_dir", nargs="?", default="runs/trl-grpo-tool")
options.add_argument("--plant-fault", action="store_true")
options.add_argument("--observe", action="store_true")
options = options.parse_args()


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def letters(completions, trainer_state, **columns):
    """The share of letters in what the model wrote last."""
    said = [messages[-1].get("content") or "" for messages in completions]
    counts = [sum(letter.isalpha() for letter in text) for text in said]
    if options.plant_fault and trainer_state.global_step >= 5:
        return [float(count) for count in counts]
    return [count / max(1, len(text)) for count, text in zip(counts, said, strict=True)]


def byte_tokenizer():
    """One token for each byte, and the chat template of Qwen 2.5, whose tool calls TRL knows how to read."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    marks = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **marks)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    return tokenizer


class CallsFirst(GRPOTrainer):
    """The first turn of each rollout is a call of the tool; what comes after it is the model's own."""

    def _generate(self, prompts):
        self.first_turn = True
        return super()._generate(prompts)

    def _generate_single_turn(self, *args, **kwargs):
        completions, logprobs = super()._generate_single_turn(*args, **kwargs)
        if self.first_turn:
            completions = [self._call_of(i) for i in range(len(completions))]
        self.first_turn = False
        return completions, logprobs

    def _call_of(self, i):
        call = json.dumps({"name": "add", "arguments": {"a": i, "b": self.state.global_step}})
        return tokenizer(f"<tool_call>\n{call}\n</tool_call><|im_end|>")["input_ids"]


def opened():
    """The guard; or an observer in its place, which withholds nothing and needs neither a guard policy nor Docker."""
    if options.observe:
        return LoopGuard.observe(options.run_dir)
    return LoopGuard.from_file(POLICY, run_dir=options.run_dir)


def make_trainer(guard):
    torch.set_num_threads(1)  # of two, one would wait for the other: the model is small
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    prompts = [{"prompt": [{"role": "user", "content": f"what is {i} and {i}?"}]} for i in range(UPDATES)]
    tools = [guard.tool(add)]
    rewards = [guard.wrap_reward(letters)]
    return CallsFirst(
        model=Qwen2ForCausalLM(Qwen2Config(**shape, **heads, **ends)),
        tools=tools,
        reward_funcs=rewards,
        args=GRPOConfig(
            output_dir=f"{options.run_dir}-checkpoints",
            per_device_train_batch_size=GROUP,
            per_device_eval_batch_size=GROUP,
            num_generations=GROUP,
            max_completion_length=160,
            max_tool_calling_iterations=1,
            max_steps=UPDATES,
            learning_rate=1e-3,
            eval_strategy="steps",  # each evaluation is what the promotion gate is asked about
            eval_steps=4,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(prompts),
        eval_dataset=Dataset.from_list(prompts[:2]),
        processing_class=tokenizer,
    )


tokenizer = byte_tokenizer()
try:
    with opened() as guard:
        trainer = make_trainer(guard)
        guard.attach(trainer)
        trainer.train()
except LoopFrozen as frozen:
    print(frozen)
    print(f"the trainer stands at {trainer.state.global_step} updates; loopguard audit why {options.run_dir}")
    sys.exit(frozen.exit_code)

print(f"trained {trainer.state.global_step} updates; see {options.run_dir}")
