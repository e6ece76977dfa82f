"""Collectives on tensors in the memory of GPUs.

Belongs here: the three ways to carry them out (NCCL, CUDA IPC, staged through the host's memory) and which
one is taken. Does not: how processes find and watch each other; that is the host's backend's business, with
which each of these collectives is announced, so that calls are compared, and the loss of a member is
noticed, as ever.
"""

from ringps.collectives.device.backend import DeviceBackend

__all__ = ["DeviceBackend"]
