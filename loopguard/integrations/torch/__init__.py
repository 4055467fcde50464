"""Plain PyTorch: a model, its optimizers, and the only door through which they may step.

learner     the model in training: its readings, its steps, its state
veto        one optimizer's step, withheld before it is applied; usable alone
witness     what shows that a decision was honoured
steps       the optimizers of one model, together
ranks       how the ranks of a run talk
device      decisions that stay on the device and are read one update late
optimizers  an optimizer's state, put back in place
buffers     what a forward pass writes into the model, put back
rng         the generators
settings    what else decides about the bits
digest      SHA-256 over all of it
"""

from loopguard.integrations.torch.learner import TorchLearner, learner
from loopguard.integrations.torch.settings import apply_settings
from loopguard.integrations.torch.veto import Veto

__all__ = ["TorchLearner", "Veto", "apply_settings", "learner"]
