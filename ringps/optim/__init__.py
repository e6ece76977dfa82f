"""The optimizer wrapper: the one line that makes a training script data-parallel; and its training loop.

Belongs here: what a `torch.optim.Optimizer` does and users see, what belongs to a step's commit, and what
members do between two steps, saving and restoring among it. Does not: how gradients travel (`buckets`,
`collectives`), and how a checkpoint's bytes lie in files (`checkpoint`).
"""

from ringps.optim.checkpointer import Checkpointer
from ringps.optim.state import TrainState
from ringps.optim.wrapper import DistributedOptimizer

__all__ = ["Checkpointer", "DistributedOptimizer", "TrainState"]
