"""Settings: frozen, keyword-only, checked on construction; nothing here reads the environment."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

TransportName = Literal["auto", "shm", "tcp", "zmq", "nccl", "cuda_ipc"]
TRANSPORTS: tuple[TransportName, ...] = ("auto", "shm", "tcp", "zmq", "nccl", "cuda_ipc")

KIB = 1024
MIB = 1024 * KIB
MOST_DOUBLING_BYTES = 64 * KIB


def _check_positive(settings: object, but: tuple[str, ...] = ()) -> None:
    for entry in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, entry.name)
        if entry.name not in but and not value > 0:
            raise ValueError(f"{entry.name} must be greater than 0, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Every limit on waiting, in seconds."""

    connect_timeout_s: float = 10.0
    """How long a worker or launcher tries to reach the coordinator before it gives up."""

    rendezvous_timeout_s: float = 300.0
    """How long `ringps.init()` waits, once connected, for the other workers to arrive."""

    heartbeat_interval_s: float = 0.25
    """How often every worker tells the coordinator that it is alive."""

    heartbeat_timeout_s: float = 2.5
    """Silence after which the coordinator counts a worker as lost (frozen or cut off)."""

    closed_connection_s: float = 0.1
    """After a data connection closed: how long to wait for news of the process behind it before the
    coordinator is asked for another generation."""

    silent_link_s: int = 3
    """Whole seconds after which a TCP connection whose other machine answers nothing is broken."""

    reform_timeout_s: float = 3.0
    """How long the members of a new generation may take to connect to each other, once all are ready."""

    feed_timeout_s: float = 60.0
    """How long a joining worker may take to get the state from the other members, which wait for it in
    their next step; then it gives up."""

    op_timeout_s: float = 300.0
    """How long a collective may go without any progress before it is an error."""

    inquiry_timeout_s: float = 2.0
    """How long to wait for all ranks' answers when they disagree about a collective."""

    shutdown_timeout_s: float = 30.0
    """How long `ringps.shutdown()` waits for the other ranks to finish too."""

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.heartbeat_timeout_s < 2 * self.heartbeat_interval_s:
            raise ValueError(
                f"heartbeat_timeout_s ({self.heartbeat_timeout_s}) must be at least twice "
                f"heartbeat_interval_s ({self.heartbeat_interval_s}), or one late beat loses a worker"
            )


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What is watched for while training goes well. All ranks must use the same values."""

    check_parameters_every: int = 100
    """Steps between two comparisons of the ranks' parameters; 0 never compares. Each reads all parameters
    once."""

    on_divergence: Literal["heal", "stop"] = "heal"
    """Ranks hold different bits: "heal" copies those of a rank that is right, "stop" raises
    `DivergedError` on all."""

    straggler_factor: float = 1.5
    """A rank that needs so many times the others' median for its own part of a step is a straggler..."""

    straggler_steps: int = 20
    """...if that has been so, on average over about so many steps, for so many steps and five seconds."""

    def __post_init__(self) -> None:
        if self.check_parameters_every < 0:
            raise ValueError(f"check_parameters_every must be 0 or more, not {self.check_parameters_every}")
        if self.on_divergence not in ("heal", "stop"):
            raise ValueError(f'on_divergence must be "heal" or "stop", not {self.on_divergence!r}')
        if not self.straggler_factor > 1:
            raise ValueError(f"straggler_factor must be greater than 1, not {self.straggler_factor}")
        if self.straggler_steps < 1:
            raise ValueError(f"straggler_steps must be at least 1, not {self.straggler_steps}")


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """How gradients travel. All ranks must use the same values."""

    chunk_bytes: int = MIB
    """Largest pipelined piece of a tensor on the wire: it should fit into a core's cache. Small tensors
    are cut finer."""

    send_queue_chunks: int = 4
    """Chunks that may wait in each ZeroMQ socket's send and receive queue (bounds memory per link)."""

    io_threads: int = 1
    """ZeroMQ I/O threads per worker. Two let sending and receiving overlap where cores are idle; where
    none is, they take turns with the other threads and small tensors wait for them."""

    sockets_per_link: int = 0
    """TCP connections to the right neighbour, 1 to 64; frames take turns on them. Clouds limit the rate of
    each. 0 measures, when the ring forms, how many are of use."""

    socket_buffer_bytes: int = 0
    """Size of the send and receive buffer of each TCP connection; 0 leaves it to the system."""

    checked_bytes: int = 64 * KIB
    """Largest payload that travels with a checksum of its own, beside TCP's, which misses about one error in
    65,536. It costs reading it once on either side; 0 checks none. Shared memory needs none."""

    doubling_bytes: int = 64 * KIB
    """Largest tensor that is reduced by recursive doubling, in fewer but larger steps than on the ring."""

    staging_bytes: int = 4 * MIB
    """Size of the pinned buffers through which tensors on a GPU go where peers cannot reach its memory. There
    are four for each direction; so many bytes at a time are on the wire."""

    def __post_init__(self) -> None:
        _check_positive(
            self, but=("sockets_per_link", "socket_buffer_bytes", "checked_bytes", "doubling_bytes")
        )
        if not 0 <= self.sockets_per_link <= 64:
            raise ValueError(f"sockets_per_link must be 0 to 64, not {self.sockets_per_link}")
        for name in ("socket_buffer_bytes", "checked_bytes", "doubling_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, as {getattr(self, name)} is")
        if self.doubling_bytes > MOST_DOUBLING_BYTES:
            raise ValueError(
                f"doubling_bytes must be at most {MOST_DOUBLING_BYTES}, not {self.doubling_bytes}"
            )
        if self.chunk_bytes % 64:
            raise ValueError(f"chunk_bytes must be a multiple of 64, not {self.chunk_bytes}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one worker; `ringps.init(config)` takes it."""

    transport: TransportName = "auto"
    """"auto" picks the fastest that every member can use and says once which, and why. "nccl" and "cuda_ipc"
    are about tensors on GPUs, and leave all else to "auto"; with "shm", "tcp" and "zmq" such tensors are
    staged through the host's memory."""

    timeouts: Timeouts = field(default_factory=Timeouts)
    """Limits on waiting."""

    exchange: Exchange = field(default_factory=Exchange)
    """How gradients travel."""

    recovery: Recovery = field(default_factory=Recovery)
    """What is watched for while training goes well."""

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise ValueError(
                f"transport {self.transport!r} is not available in this version; "
                f"choose one of {', '.join(TRANSPORTS)}"
            )
