"""The optimizer wrapper: the one line that makes a training script data-parallel; and its training loop.

Belongs here: what a `torch.optim.Optimizer` does and users see, what belongs to a step's commit, and what
members do between two steps. Does not: how gradients travel
(`buckets`, `collectives`).
"""

from ringps.optim.state import TrainState
from ringps.optim.wrapper import DistributedOptimizer

__all__ = ["DistributedOptimizer", "TrainState"]
