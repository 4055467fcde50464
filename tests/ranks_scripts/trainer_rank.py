"""One rank of a Trainer under DDP on the CPU: python trainer_rank.py FOLDER MODE... Writes FOLDER/MODE-RANK.json.

quiet    guarded, and nothing is wrong
bare     the same without a guard
skip     rank 1 alone gets a loss that is not a number, in update 4; the batch is dropped
freeze   the same, and the run freezes
never    without a guard, and the batches of update 4 are not there
"""

import json
import os
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
here = Path(__file__).parent
sys.path[:0] = [str(here.parent / "integrations")]

import torch.distributed as dist
from trainer_kit import batches, make_trainer, nan, state_of
from trainer_lab import SKIP, TrainerLab

from loopguard.errors import LoopFrozen
from loopguard.integrations.torch.digest import sha256

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])


def main(mode):
    bad = {7: nan} if mode in ("skip", "freeze") else {}
    lab = TrainerLab(folder / f"{mode}-{rank}")
    lab.run_dir = folder / f"run-{mode}"
    lab.write(freeze=SKIP if mode == "skip" else "")
    trainer = make_trainer(folder / mode, batches(12, bad, without={6, 7} if mode == "never" else set()))
    told = {"error": ""}
    try:
        if mode in ("bare", "never"):
            trainer.train()
        else:
            lab.train(trainer)
    except LoopFrozen as frozen:
        told["error"] = str(frozen)
    weights, optimizer, schedule = state_of(trainer)
    told |= {"state": sha256([weights, optimizer]), "schedule": schedule, "steps": trainer.state.global_step}
    (folder / f"{mode}-{rank}.json").write_text(json.dumps(told))


for mode in sys.argv[2:]:
    (folder / f"{mode}-{rank}").mkdir()
    main(mode)
if dist.is_initialized():
    dist.destroy_process_group()
# gloo's thread may still hold the last tensors, and it aborts the process when it lets go of them while Python goes.
os._exit(0)
