"""Plain PyTorch: a model, its optimizers, and the only door through which they may step.

    learner   the model in training: its readings, its steps, its state
"""

from loopguard.integrations.torch.learner import TorchLearner, learner

__all__ = ["TorchLearner", "learner"]
