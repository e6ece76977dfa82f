"""Which rank trains which samples.

Belongs here: the order of the samples, their division among ranks, the position in an epoch, and what is
owed of steps that lost a rank.
Does not: reading samples, or who the ranks are (`membership`).
"""

from ringps.data.ledger import NO_SHARE, Row
from ringps.data.sampler import BatchShare, ElasticBatchSampler, SamplerStatistics

__all__ = ["NO_SHARE", "BatchShare", "ElasticBatchSampler", "Row", "SamplerStatistics"]
