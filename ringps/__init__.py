"""Data-parallel training for PyTorch in a ring of worker processes.

The public names, nothing else. They are loaded on first use, so that `import ringps` is cheap and
the launcher never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ringps.collectives.functions import (
        all_gather,
        all_reduce,
        barrier,
        broadcast,
        empty,
        generation,
        local_rank,
        rank,
        reduce_scatter,
        worker_id,
        world_size,
    )
    from ringps.config import Config, Exchange, Timeouts
    from ringps.errors import (
        AddressInUseError,
        AuthenticationError,
        ClosedError,
        CollectiveError,
        CollectiveMismatchError,
        CollectiveTimeoutError,
        CoordinatorUnreachableError,
        FrameError,
        LayoutMismatchError,
        PeerLeftError,
        PeerLostError,
        RefusedError,
        RingBrokenError,
        RingpsError,
        SetupError,
    )
    from ringps.optim import DistributedOptimizer
    from ringps.runtime import ElasticBatchSampler, init, shutdown

__all__ = [
    "AddressInUseError",
    "AuthenticationError",
    "ClosedError",
    "CollectiveError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "Config",
    "CoordinatorUnreachableError",
    "DistributedOptimizer",
    "ElasticBatchSampler",
    "Exchange",
    "FrameError",
    "LayoutMismatchError",
    "PeerLeftError",
    "PeerLostError",
    "RefusedError",
    "RingBrokenError",
    "RingpsError",
    "SetupError",
    "Timeouts",
    "__version__",
    "all_gather",
    "all_reduce",
    "barrier",
    "broadcast",
    "empty",
    "generation",
    "init",
    "local_rank",
    "rank",
    "reduce_scatter",
    "shutdown",
    "worker_id",
    "world_size",
]

_HOMES = {
    **dict.fromkeys(("Config", "Exchange", "Timeouts"), "ringps.config"),
    **dict.fromkeys(("ElasticBatchSampler", "init", "shutdown"), "ringps.runtime"),
    "DistributedOptimizer": "ringps.optim",
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
