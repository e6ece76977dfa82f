"""What does communication add to a training step, compared with PyTorch's DistributedDataParallel?

    python benchmarks/train.py -n 2,4                   # starts the workers itself
    ringps run -n 2 benchmarks/train.py                 # what it starts

Every worker trains several copies of a model, one thread each, which take turns from one step to the
next: without communication, under DDP over gloo (as it is by default, and with `gradient_as_bucket_view`)
and under ringps. A turn starts behind a barrier and takes as long as its slowest rank. What communication
adds is the median step less the median step without. Parameters must be bitwise equal on all ranks
in the end, and the losses those of DDP.

Memory is looked at in runs of its own, with one copy of the model in each process: the peak beyond plain
PyTorch, as a multiple of the size of the gradients.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed

import memory
import plots
import report
import ringps
import variants
import workers
from models import WORKLOADS, Workload
from ringps import worker_env
from variants import Variant


def measure(workload: Workload, transport: str, limits: workers.Limits) -> list[report.Row]:
    """A row per variant; the same on all ranks."""
    batches = variants.batches(workload, ringps.rank())
    own_name = f"ringps-{transport}"
    names = (report.WITHOUT, report.DDP, variants.DDP_VIEW, own_name)
    torch.manual_seed(0)
    model = workload.build()
    copies = {name: variants.make(name, workload, copy.deepcopy(model)) for name in names}

    def turn_of(variant: Variant) -> Callable[[], float]:
        def turn() -> float:
            batch = batches[len(variant.losses) % len(batches)]
            ringps.barrier()
            return variant.step(batch)

        return turn

    # The first step learns the order of the gradients, and the second may be the first in that order.
    times_s = workers.take_turns([turn_of(variant) for variant in copies.values()], 3, limits)
    for name in names[1:]:
        variants.check_equal(copies[name])
    variants.check_losses(copies[own_name], copies[report.DDP])
    gradient_bytes, parameters = _size(copies[own_name])
    rows = [
        report.row(
            bench="train",
            backend=name,
            op="train_step",
            size_bytes=gradient_bytes,
            dtype="float32",
            world_size=ringps.world_size(),
            times_s=times,
            facts={"transport": transport, "model": workload.name, "parameters": parameters},
        )
        for name, times in zip(names, times_s, strict=True)
    ]
    return [_with(one, added_us=report.added_us(one, rows)) for one in rows]


def work(options: argparse.Namespace) -> list[report.Row]:
    """Measure every model, as one of the workers; rank 0 gets the rows."""
    torch.set_num_threads(1)
    ringps.init()
    torch.distributed.init_process_group("gloo")
    rows = []
    for name in options.models:
        found = measure(WORKLOADS[name], options.transport[0], workers.limits(options))
        rows += found
        gc.collect()  # a model and its hooks refer to each other
        if ringps.rank() == 0:
            times = ", ".join(f"{row.backend} {row.time_us / 1e3:.1f} ms" for row in found)
            print(f"{name}: {times}", file=sys.stderr, flush=True)
    torch.distributed.destroy_process_group()
    leads = ringps.rank() == 0
    ringps.shutdown()
    return rows if leads else []


def with_memory(rows: list[report.Row], model: str, transport: str) -> list[report.Row]:
    """The rows, with `extra_memory_gradients` in those of ringps for this model and transport."""
    done = []
    plain: dict[int, float] = {}
    for one in rows:
        if one.env["model"] == model and one.backend == f"ringps-{transport}":
            n = one.world_size
            if n not in plain:
                plain[n] = memory.mean_peak_bytes(report.WITHOUT, model, n, transport)
            peak_bytes = memory.mean_peak_bytes(one.backend, model, n, transport)
            extra = (peak_bytes - plain[n]) / one.bytes
            print(
                f"{model}, {n} workers, {one.backend}: {extra:.2f} times the gradients in extra memory",
                file=sys.stderr,
                flush=True,
            )
            one = _with(one, extra_memory_gradients=round(extra, 3))
        done.append(one)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps: ringps, DDP, and no communication.")
    workers.add_options(parser, transports=["auto"], seconds=8.0, min_repeats=5, max_repeats=100)
    parser.add_argument("--models", type=_models, default=["gpt", "mlp"], help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument(
        "--memory-model", default="mlp", metavar="MODEL", help="whose memory to look at (none: of no model)"
    )
    options = parser.parse_args()
    if options.plot:
        report.load_pyplot()  # not after minutes of measuring

    models = f"--models={','.join(options.models)}"
    rows = workers.collect(parser, options, __file__, work, [models])
    if worker_env.read() is None:
        for transport in options.transport:
            rows = with_memory(rows, options.memory_model, transport)
    if not rows:
        return
    if not options.quiet:
        print(report.steps(rows).text(), flush=True)
    if options.json:
        report.write_json(options.json, rows)
    if options.plot:
        plots.save(plots.added_time(rows), options.plot)


def _size(variant: Variant) -> tuple[int, int]:
    """Bytes of gradients, and number of parameters."""
    parameters = list(variant.model.parameters())
    return sum(one.nbytes for one in parameters), sum(one.numel() for one in parameters)


def _with(one: report.Row, **facts: object) -> report.Row:
    return replace(one, env={**one.env, **facts})


def _models(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no model {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    return names


if __name__ == "__main__":
    main()
