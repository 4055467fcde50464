"""Your own loop under guard: a small network learns which of two numbers is larger, from answers a tool confirmed.

    python examples/own_loop.py [RUN_DIR]

Each cycle the actor guesses, a Python call in a container says which guesses are right, the right ones become training
data, and the better network becomes the actor. The part between the two lines of dashes is all that LoopGuard
adds to a loop; README.md shows it.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from loopguard import Check, LoopGuard, Provenance, Record

RUN_DIR = sys.argv[1] if len(sys.argv) > 1 else "runs/own-loop"
POLICY = Path(__file__).parent.parent / "policies" / "default.yaml"
PAIRS = [(a, b) for a in range(10) for b in range(10)]
random.Random(0).shuffle(PAIRS)
HELD_OUT, PRACTICE = PAIRS[:30], PAIRS[30:]

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
actor = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)


def scores(network, pairs):
    """Logits over the ten digits, shape [pairs, 10]."""
    digits = torch.tensor(pairs)
    return network(torch.cat([F.one_hot(digits[:, 0], 10), F.one_hot(digits[:, 1], 10)], dim=1).float())


def text(a, b):
    return f"the larger of {a} and {b} is "


def human(cycle):
    """A few answers that a person wrote down, other ones in every cycle."""
    for a, b in PRACTICE[cycle.number % 4 :: 4]:
        yield Record(
            id=f"human-{cycle.number}-{a},{b}",
            prompt=text(a, b),
            completion=str(max(a, b)),
            provenance=Provenance(source="human", origin="own_loop.py", cycle=cycle.number),
            payload=((a, b), max(a, b)),
        )


def generate(network, cycle, tool):
    """Guesses of the actor that the tool confirms."""
    pairs = random.Random(cycle.number).sample(PRACTICE, 20)
    guesses = scores(network, pairs).argmax(dim=1).tolist()
    outcomes = tool.map([f"print(max({a}, {b}))" for a, b in pairs])
    for (a, b), guess, outcome in zip(pairs, guesses, outcomes, strict=True):
        if outcome.ok and int(outcome.text) == guess:
            yield Record(
                id=f"own-{cycle.number}-{a},{b}",
                prompt=text(a, b),
                completion=str(guess),
                provenance=Provenance(source="model", origin="guess", cycle=cycle.number, calls=(outcome.call_id,)),
                check=Check(tool="python", code=f"print(max({a}, {b}))", expected=str(guess)),
                payload=((a, b), guess),
            )


memory: list[tuple[tuple[int, int], int]] = []


def batches(records):
    """Twenty draws from all that was admitted so far."""
    memory.extend(record.payload for record in records)
    draw = random.Random(len(memory))
    return [draw.choices(memory, k=16) for _ in range(20)]


def loss_of(network, batch):
    pairs, answers = zip(*batch, strict=True)
    return F.cross_entropy(scores(network, list(pairs)), torch.tensor(answers))


def evaluate(network):
    with torch.no_grad():
        logits = scores(network, HELD_OUT)
    answers = torch.tensor([max(pair) for pair in HELD_OUT])
    right = (logits.argmax(dim=1) == answers).float().mean().item()
    return {"score": right, "heldout_loss": F.cross_entropy(logits, answers).item()}


# ----------------------------------------------------------------------------------------------------------------------
with LoopGuard.from_file(POLICY, run_dir=RUN_DIR) as guard:
    guard.attach(model=model, optimizer=optimizer, actor=actor)
    guard.protect(text(a, b) + str(max(a, b)) for a, b in HELD_OUT)
    for cycle in guard.cycles(4, warmup=True):
        drafts = [*human(cycle), *generate(actor, cycle, tool=cycle.tool("python"))]  # each call runs in a container
        admitted = cycle.admit(drafts)  # provenance, overlap with the held-out texts, the model's own share
        guard.expect("data")  # this cycle's records are new, so the loss may step here
        for batch in cycle.batches(batches(admitted.records)):  # kept, so that a freeze can be replayed
            loss = loss_of(model, batch)
            loss.backward()
            cycle.update(loss=loss)  # decides, then steps the optimizer and zeroes the gradients
        cycle.promote(evaluate(model), apply=lambda: actor.load_state_dict(model.state_dict()))
# ----------------------------------------------------------------------------------------------------------------------

print(f"promoted {guard.promoted_cycle} cycles after the warm-up; see {RUN_DIR}")
