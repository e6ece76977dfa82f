"""What the collectives need of a GPU: streams, marks in them, pinned host memory, memory that peers can open.

Belongs here: everything that talks to CUDA about time and memory. Does not: arithmetic
(`ringps.kernels.cuda`), and anything that knows of ranks. `ringps.testing.pretend` is the same without a GPU.
"""

from ringps.device.base import Accelerator, Exported, Mark, NcclLibrary, NcclRing, PeerMemory, Stream
from ringps.device.current import accelerator_of, use

__all__ = [
    "Accelerator",
    "Exported",
    "Mark",
    "NcclLibrary",
    "NcclRing",
    "PeerMemory",
    "Stream",
    "accelerator_of",
    "use",
]
