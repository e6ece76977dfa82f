"""Gradients to flat buckets, and buckets to the ring while backward still runs.

Belongs here: the layout of buckets, their memory, the hooks that notice a gradient, and the rule by
which all ranks launch the same reductions in the same order. Does not: how a reduction is done
(`collectives`), or what is done with the result (`optim`).
"""

from ringps.buckets.agreement import Entry, agree
from ringps.buckets.passes import CommitListener, SampleBook
from ringps.buckets.reducer import BucketSettings, Reducer, ReducerStatistics, describe
from ringps.buckets.ring import ReductionRing

__all__ = [
    "BucketSettings",
    "CommitListener",
    "Entry",
    "Reducer",
    "ReducerStatistics",
    "ReductionRing",
    "SampleBook",
    "agree",
    "describe",
]
