"""all_reduce, reduce_scatter, all_gather, broadcast and barrier.

Belongs here: turning a call on tensors into chunks on a transport, the thread that does so, and
what happens when ranks disagree or one is gone. Does not: who the members are (`membership`), what
a gradient is (`buckets`).
"""

from ringps.collectives.communicator import Communicator, Outcome
from ringps.collectives.current import current, use
from ringps.collectives.elastic import Change, ElasticCommunicator, ElasticStatistics, Membership
from ringps.collectives.handle import Handle

__all__ = [
    "Change",
    "Communicator",
    "ElasticCommunicator",
    "ElasticStatistics",
    "Handle",
    "Membership",
    "Outcome",
    "current",
    "use",
]
