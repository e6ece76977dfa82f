"""Data-parallel training for PyTorch in a ring of worker processes.

The public names, nothing else. They are loaded on first use, so that `import ringps` is cheap and
the launcher never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ringps.checkpoint.retention import Retention
    from ringps.checkpoint.saving import Saving
    from ringps.collectives.functions import (
        all_gather,
        all_reduce,
        barrier,
        broadcast,
        empty,
        generation,
        joining,
        local_rank,
        rank,
        reduce_scatter,
        worker_id,
        world_size,
    )
    from ringps.config import Config, Exchange, Recovery, Timeouts
    from ringps.errors import (
        AddressInUseError,
        AuthenticationError,
        CheckpointError,
        ClosedError,
        CollectiveError,
        CollectiveMismatchError,
        CollectiveTimeoutError,
        CoordinatorUnreachableError,
        DivergedError,
        ExpelledError,
        FrameError,
        LayoutMismatchError,
        PeerLeftError,
        PeerLostError,
        RefusedError,
        RingBrokenError,
        RingChangedError,
        RingpsError,
        SetupError,
    )
    from ringps.optim import Checkpointer, DistributedOptimizer, TrainState
    from ringps.runtime import ElasticBatchSampler, init, shutdown

__all__ = [
    "AddressInUseError",
    "AuthenticationError",
    "CheckpointError",
    "Checkpointer",
    "ClosedError",
    "CollectiveError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "Config",
    "CoordinatorUnreachableError",
    "DistributedOptimizer",
    "DivergedError",
    "ElasticBatchSampler",
    "Exchange",
    "ExpelledError",
    "FrameError",
    "LayoutMismatchError",
    "PeerLeftError",
    "PeerLostError",
    "Recovery",
    "RefusedError",
    "Retention",
    "RingBrokenError",
    "RingChangedError",
    "RingpsError",
    "Saving",
    "SetupError",
    "Timeouts",
    "TrainState",
    "__version__",
    "all_gather",
    "all_reduce",
    "barrier",
    "broadcast",
    "empty",
    "generation",
    "init",
    "joining",
    "local_rank",
    "rank",
    "reduce_scatter",
    "shutdown",
    "worker_id",
    "world_size",
]

_HOMES = {
    **dict.fromkeys(("Config", "Exchange", "Recovery", "Timeouts"), "ringps.config"),
    **dict.fromkeys(("ElasticBatchSampler", "init", "shutdown"), "ringps.runtime"),
    **dict.fromkeys(("Checkpointer", "DistributedOptimizer", "TrainState"), "ringps.optim"),
    "Retention": "ringps.checkpoint.retention",
    "Saving": "ringps.checkpoint.saving",
    **{name: "ringps.errors" for name in __all__ if name.endswith("Error")},
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'ringps' has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "ringps.collectives.functions")), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
