"""PURE: who runs where, and what each worker is told through its environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ringps.worker_env import CHECKPOINT_DIR, WorkerEnv
from ringps_launcher.job import Job


@dataclass(frozen=True, kw_only=True)
class Placement:
    """This machine's part of the whole job's plan."""

    host: str
    """Name of this machine, for messages."""

    address: str
    """IP address at which the other machines reach this one."""

    host_index: int
    """Position of this machine among the job's machines."""

    host_count: int
    """Number of machines."""

    first_worker_id: int
    """The workers here have consecutive ids from this one up."""

    world_size: int
    """Workers of the whole job."""

    master_address: str
    """Where `torch.distributed` finds rank 0."""

    master_port: int
    """A port that is free on that machine."""

    coordinator: str
    """`HOST:PORT` of the job's coordinator."""

    key_file: str
    """The job key's file on this machine."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One worker of this machine."""

    worker_id: int
    """Stable for the job."""

    rank: int
    """Position in the first generation, which is ordered by worker id."""

    local_rank: int
    """Position on this machine."""

    environ: Mapping[str, str]
    """The worker's whole environment."""

    restart: int = 0
    """0 for the first process of this worker; it grows with each one after that."""


def seats(
    job: Job, placement: Placement, *, environ: Mapping[str, str], cores: int, restart: int = 0
) -> tuple[Seat, ...]:
    """The workers to start here, in rank order.

    Args:
        job: what they run.
        placement: this machine's part.
        environ: the launcher's own environment, which the workers inherit.
        cores: CPU cores that the workers here may use between them.
        restart: 0 for the first start of the ring; later more than for any process before.
    """
    planned = (_seat(job, placement, local_rank, environ, cores) for local_rank in range(job.workers))
    return tuple(seat if restart == 0 else replacement(seat, restart) for seat in planned)


def replacement(seat: Seat, restart: int) -> Seat:
    """The same seat for another process, which is told that it is the `restart`-th one after the first."""
    environ = {**seat.environ, "TORCHELASTIC_RESTART_COUNT": str(restart)}
    return replace(seat, environ=environ, restart=restart)


def _seat(job: Job, placement: Placement, local_rank: int, environ: Mapping[str, str], cores: int) -> Seat:
    worker_id = placement.first_worker_id + local_rank
    contract = WorkerEnv(
        coordinator=placement.coordinator,
        key_file=placement.key_file,
        worker_id=worker_id,
        host=placement.host,
        address=placement.address,
        local_rank=local_rank,
        local_world_size=job.workers,
        transport=job.transport,
    )
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // job.workers)),
        "PYTHONUNBUFFERED": "1",
    }
    return Seat(
        worker_id=worker_id,
        rank=worker_id,
        local_rank=local_rank,
        environ={
            **defaults,
            **environ,
            **contract.to_environ(),
            **({} if job.checkpoint_dir is None else {CHECKPOINT_DIR: job.checkpoint_dir}),
            **_torchrun_variables(job, placement, worker_id, local_rank),
        },
    )


def _torchrun_variables(job: Job, placement: Placement, rank: int, local_rank: int) -> dict[str, str]:
    """What torchrun sets (https://docs.pytorch.org/docs/stable/elastic/run.html), so that scripts
    and libraries that look for it run under this launcher too. `TORCHELASTIC_USE_AGENT_STORE` is
    not among them: rank 0 serves the store itself.
    """
    values = {
        "RANK": rank,
        "WORLD_SIZE": placement.world_size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": job.workers,
        "GROUP_RANK": placement.host_index,
        "GROUP_WORLD_SIZE": placement.host_count,
        "ROLE_NAME": "default",
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": placement.world_size,
        "MASTER_ADDR": placement.master_address,
        "MASTER_PORT": placement.master_port,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": job.max_restarts,
        "TORCHELASTIC_RUN_ID": "ringps",
    }
    return {name: str(value) for name, value in values.items()}
