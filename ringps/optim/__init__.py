"""The optimizer wrapper: the one line that makes a training script data-parallel.

Belongs here: what a `torch.optim.Optimizer` does and users see. Does not: how gradients travel
(`buckets`, `collectives`).
"""

from ringps.optim.wrapper import DistributedOptimizer

__all__ = ["DistributedOptimizer"]
