"""What ringps's tests run on, and users' own may: a ring inside one process, and faults on purpose.

Belongs here: things that stand in for machines, processes and time, and things that break them. Nothing in
the library imports it.
"""

from ringps.testing.faults import arm, disarm
from ringps.testing.memory_ring import MemoryRing, run_ring
from ringps.testing.plan import Fault, FaultPlan, Moment

__all__ = ["Fault", "FaultPlan", "MemoryRing", "Moment", "arm", "disarm", "run_ring"]
