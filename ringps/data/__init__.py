"""Which rank trains which samples.

Belongs here: the order of the samples, their division among ranks, and the position in an epoch.
Does not: reading samples, or who the ranks are (`membership`).
"""

from ringps.data.sampler import BatchShare, ElasticBatchSampler

__all__ = ["BatchShare", "ElasticBatchSampler"]
