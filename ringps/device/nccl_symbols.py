"""The names in NCCL's C library: where it is found, its functions, structures and codes.

Names and numbers are those of nccl.h, checked against 2.30.7.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from ringps.errors import SetupError

SUCCESS, IN_PROGRESS = 0, 7
UNIQUE_ID_BYTES = 128
_SONAME = "libnccl.so.2"

DTYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.bool: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
OPS = {"sum": 0, "prod": 1, "max": 2, "min": 3, "mean": 4}

_UNDEFINED = -(2**31)
_CONFIG_MAGIC = 0xCAFEBEEF
_CONFIG_VERSION = 21801


class UniqueId(ctypes.Structure):
    """ncclUniqueId; NCCL takes it by value."""

    # Not c_char, whose value ends at the first zero.
    _fields_ = (("internal", ctypes.c_ubyte * UNIQUE_ID_BYTES),)


class CommConfig(ctypes.Structure):
    """ncclConfig_t of NCCL 2.18, which every later version takes: it goes by `size` and `version`.

    `traffic_class` came in 2.25 and lies where 2.18 has padding; it is
    here so that no version reads what happens to be there.
    """

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
        ("traffic_class", ctypes.c_int),
    )

    @classmethod
    def non_blocking(cls) -> CommConfig:
        """All as NCCL chooses, but that no call waits for other members."""
        config = cls(ctypes.sizeof(cls), _CONFIG_MAGIC, _CONFIG_VERSION, 0)
        for name in ("cga_cluster_size", "min_ctas", "max_ctas", "split_share", "traffic_class"):
            setattr(config, name, _UNDEFINED)
        return config


_COMM, _BUFFER, _STREAM = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
_PROTOTYPES: dict[str, tuple[type, tuple[Any, ...]]] = {
    "ncclGetVersion": (ctypes.c_int, (ctypes.POINTER(ctypes.c_int),)),
    "ncclGetUniqueId": (ctypes.c_int, (ctypes.POINTER(UniqueId),)),
    "ncclGetErrorString": (ctypes.c_char_p, (ctypes.c_int,)),
    "ncclGetLastError": (ctypes.c_char_p, (_COMM,)),
    "ncclCommInitRankConfig": (
        ctypes.c_int,
        (ctypes.POINTER(_COMM), ctypes.c_int, UniqueId, ctypes.c_int, ctypes.POINTER(CommConfig)),
    ),
    "ncclCommGetAsyncError": (ctypes.c_int, (_COMM, ctypes.POINTER(ctypes.c_int))),
    "ncclCommAbort": (ctypes.c_int, (_COMM,)),
    "ncclCommFinalize": (ctypes.c_int, (_COMM,)),
    "ncclCommDestroy": (ctypes.c_int, (_COMM,)),
    "ncclAllReduce": (
        ctypes.c_int,
        (_BUFFER, _BUFFER, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _COMM, _STREAM),
    ),
    "ncclReduceScatter": (
        ctypes.c_int,
        (_BUFFER, _BUFFER, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _COMM, _STREAM),
    ),
    "ncclAllGather": (ctypes.c_int, (_BUFFER, _BUFFER, ctypes.c_size_t, ctypes.c_int, _COMM, _STREAM)),
    "ncclBroadcast": (
        ctypes.c_int,
        (_BUFFER, _BUFFER, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _COMM, _STREAM),
    ),
}


def load(path: str | None) -> ctypes.CDLL:
    """See `ringps.device.nccl_library.Nccl.load`."""
    library = _open(path)
    for name, (result, arguments) in _PROTOTYPES.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise SetupError(
                f"{library._name} has no {name}: it is not NCCL, or one older than 2.18"
            ) from None
        function.restype, function.argtypes = result, arguments
    return library


def _open(path: str | None) -> ctypes.CDLL:
    if path is not None:
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            raise SetupError(f"cannot load NCCL: {error}") from error
    try:
        # A second copy in the process would work, but take its own memory.
        return ctypes.CDLL(_SONAME, mode=os.RTLD_NOLOAD)
    except OSError:
        pass
    for candidate in (*_of_the_wheel(), _SONAME):
        try:
            return ctypes.CDLL(candidate)
        except OSError as error:
            reason = error
    raise SetupError(
        f"NCCL is not installed ({reason}); pip install nvidia-nccl-cu13, or let the system's loader find "
        f"{_SONAME}"
    ) from reason


def _of_the_wheel() -> list[str]:
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return []
    places = [] if spec is None else spec.submodule_search_locations or []
    return [str(file) for place in places if (file := Path(place) / "lib" / _SONAME).exists()]
