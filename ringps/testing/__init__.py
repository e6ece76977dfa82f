"""What ringps's tests run on, and users' own may: a ring inside one process.

Belongs here: things that stand in for machines, processes and time. Nothing in the library imports
it.
"""

from ringps.testing.memory_ring import MemoryRing, run_ring

__all__ = ["MemoryRing", "run_ring"]
