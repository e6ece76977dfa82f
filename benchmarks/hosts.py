"""How much of a network link does all_reduce use, and what does the hierarchical algorithm save?

    sudo python benchmarks/hosts.py                     # Linux only

Makes "hosts" of one Linux machine: network namespaces, each joined by a veth pair to a bridge in a
namespace of its own, with both directions of every link shaped by a token bucket (`tc tbf`). A real
`ringps coordinator` and one `ringps run --join` per host run in them.

The namespaces have no names: each lasts as long as the process that holds it open, which the kernel
kills when this one ends, so nothing is left behind even by SIGKILL.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import torch

import report
import ringps
from report import KIB, MIB, Row
from ringps import worker_env

BANDWIDTH_BAR, HIERARCHY_BAR = 0.93, 0.7
ETHERNET_BYTES, TCP_IP_BYTES, MTU_BYTES = 14, 52, 1500
TCP_SHARE = (MTU_BYTES - TCP_IP_BYTES) / (MTU_BYTES + ETHERNET_BYTES)
"""Payload per byte that the shaper counts: full segments with timestamps, no acknowledgements."""
_PORT = 4700
_TRAIN_BYTES = 16 * KIB
"""Longest train of segments that the kernel handles as one. It must fit into the burst, or the shaper
takes it apart, at the price of a core per Gbit/s; its headers are counted either way."""
_KILL_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
_TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv")
_GRACE_S = 5.0


class HostsError(RuntimeError):
    """The hosts cannot be made here, or something that ran in them failed."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A link, the same in both directions."""

    rate_bit_s: float
    """Of Ethernet frames without their checksum, as `tc` counts."""

    burst_bytes: int = 32 * KIB
    """What an idle link lets through at once. It flatters by at most this much per idle time, so it is
    about as small as the kernel's timers can serve at 1 Gbit/s."""

    queue_s: float = 0.02
    """Frames that would wait for longer are dropped."""


class Point(NamedTuple):
    """A collective to be measured."""

    op: str
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.op}:{self.size_bytes}"


class Measured(NamedTuple):
    """What came of it: seconds per repetition, each that of the slowest rank."""

    point: Point
    times_s: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)


def obstacle() -> str | None:
    """Why hosts cannot be made on this machine, or None."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux to make network namespaces"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs the commands {', '.join(missing)} (iproute2, util-linux)"
    probe = "ip link add name probe-0 type bridge && ip link add name probe-1 type veth && "
    probe += "tc qdisc add dev probe-1 root tbf rate 1gbit burst 32kb latency 1ms"
    tried = subprocess.run(
        ["unshare", "--net", "sh", "-c", probe], capture_output=True, text=True, check=False
    )
    return f"this kernel refuses: {tried.stderr.strip()}" if tried.returncode else None


class Hosts:
    """Hosts 0 to count - 1 around a switch; made on `__enter__`, gone after `__exit__`.

    Raises:
        HostsError: they cannot be made.
    """

    def __init__(self, count: int, shape: Shape | None) -> None:
        """
        Args:
            count: how many.
            shape: of every host's link; None leaves links as fast as the kernel makes them.
        """
        self.count = count
        self.shape = shape
        self._stack = contextlib.ExitStack()
        self._namespaces: set[str] = set()
        self._switch = 0
        self._holders: list[int] = []

    def __enter__(self) -> Hosts:
        why = obstacle()
        if why is not None:
            raise HostsError(why)
        with contextlib.ExitStack() as stack:
            stack.callback(self._sweep)
            self._switch = self._hold(stack)
            self._ip(self._switch, "link", "add", "name", "switch", "type", "bridge")
            self._ip(self._switch, "address", "add", f"{self._address(254)}/24", "dev", "switch")
            for device in ("lo", "switch"):
                self._ip(self._switch, "link", "set", "dev", device, "up")
            for host in range(self.count):
                self._holders.append(self._hold(stack))
                self._plug(host)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def address(self, host: int) -> str:
        """IP address of a host."""
        return self._address(host + 1)

    def inside(self, host: int) -> list[str]:
        """What to put before a command so that it runs on a host and dies with this process."""
        return self._within(self._holders[host])

    def inside_switch(self) -> list[str]:
        """The same for the switch, whose address is `switch_address`: a place that links do not limit."""
        return self._within(self._switch)

    @property
    def switch_address(self) -> str:
        """IP address of the switch."""
        return self._address(254)

    def silence(self, one: int, other: int) -> None:
        """Let nothing come through between two hosts any more; neither is told, and both reach the rest."""
        for here, there in ((one, other), (other, one)):
            nobody = ("lladdr", "02:00:00:00:00:01", "nud", "permanent")
            neighbour = ("neighbour", "replace", self.address(there))
            self._ip(self._holders[here], *neighbour, *nobody, "dev", "uplink")

    def let_speak(self, one: int, other: int) -> None:
        """Undo `silence`."""
        for here, there in ((one, other), (other, one)):
            self._ip(self._holders[here], "neighbour", "delete", self.address(there), "dev", "uplink")

    def unplug(self, host: int) -> None:
        """Let nothing come from a host or to it any more; nobody is told."""
        self._ip(self._switch, "link", "set", "dev", f"port-{host}", "nomaster")

    def replug(self, host: int) -> None:
        """Undo `unplug`."""
        self._ip(self._switch, "link", "set", "dev", f"port-{host}", "master", "switch")

    def streams(self, seconds: float) -> list[float]:
        """Payload in bytes/s of plain TCP streams from each host to the next, all at the same time."""
        with contextlib.ExitStack() as stack:
            sinks = []
            for host in range(self.count):
                command = [*self.inside(host), sys.executable, "-c", _SINK, self.address(host), str(seconds)]
                sinks.append(stack.enter_context(_process(command, subprocess.PIPE)))
            for sink in sinks:
                _line(sink)
            for host in range(self.count):
                right = self.address((host + 1) % self.count)
                command = [*self.inside(host), sys.executable, "-c", _SOURCE, right]
                stack.enter_context(_process(command, subprocess.DEVNULL))
            return [float(_line(sink)) for sink in sinks]

    def measure(
        self,
        points: Sequence[Point],
        *,
        workers_per_host: int = 1,
        transport: str = "tcp",
        seconds: float = 1.0,
        settings: Mapping[str, object] | None = None,
        limit_s: float = 120.0,
    ) -> list[Measured]:
        """Time collectives of float32 over workers on all hosts.

        Args:
            points: what to time.
            workers_per_host: on each of them.
            transport: as for `ringps run --transport`.
            seconds: about how long to measure each point, but at least three repetitions.
            settings: `RINGPS_*` variables of the workers, such as `RINGPS_CHUNK_BYTES`.
            limit_s: how long all of it may take.

        Raises:
            HostsError: a command failed or did not end; says what it printed.
        """
        with tempfile.TemporaryDirectory(prefix="ringps-hosts-") as directory:
            rows = Path(directory) / "times.json"
            arguments = ["--work", ",".join(map(str, points)), "--seconds", str(seconds), "--json", str(rows)]
            self._run(Path(directory), arguments, workers_per_host, transport, settings or {}, limit_s)
            return [
                Measured(Point(op, size_bytes), times_s)
                for op, size_bytes, times_s in json.loads(rows.read_text())
            ]

    def _run(
        self,
        directory: Path,
        arguments: Sequence[str],
        workers_per_host: int,
        transport: str,
        settings: Mapping[str, object],
        limit_s: float,
    ) -> None:
        end_s = time.monotonic() + limit_s
        ringps_command = [
            "env",
            "OMP_NUM_THREADS=1",
            *(f"{name}={value}" for name, value in settings.items()),
        ]
        ringps_command += [sys.executable, "-m", "ringps_launcher"]
        key, address = directory / "key", f"{self._address(254)}:{_PORT}"
        with contextlib.ExitStack() as stack:
            command = [*self._within(self._switch), *ringps_command, "coordinator", "--bind", address]
            command += ["--key-file", str(key), "-n", str(self.count * workers_per_host)]
            running = {
                "coordinator": stack.enter_context(_process(command, subprocess.PIPE, directory / "c"))
            }
            if "listens on" not in _line(running["coordinator"]):
                raise HostsError(f"no coordinator: {(directory / 'c').read_text()}")
            for host in range(self.count):
                command = [
                    *self.inside(host),
                    *ringps_command,
                    "run",
                    "--join",
                    address,
                    "--key-file",
                    str(key),
                ]
                command += ["--address", self.address(host), "--host", f"node-{host}"]
                command += ["-n", str(workers_per_host), "--transport", transport, __file__, *arguments]
                log = directory / f"node-{host}"
                running[log.name] = stack.enter_context(_process(command, None, log))
            for name, process in running.items():
                try:
                    code = process.wait(timeout=max(0.0, end_s - time.monotonic()))
                except subprocess.TimeoutExpired:
                    code = -1
                if code:
                    logs = "\n".join(log.read_text(errors="replace") for log in directory.glob("node-*"))
                    raise HostsError(f"{name} {'did not end' if code < 0 else f'ended with {code}'}:\n{logs}")

    def _hold(self, stack: contextlib.ExitStack) -> int:
        """A new network namespace; the process that holds it."""
        command = [*_KILL_WITH_PARENT, "unshare", "--net", "sh", "-c", "echo ready; exec sleep infinity"]
        holder = stack.enter_context(_process(command, subprocess.PIPE))
        if not _line(holder):
            raise HostsError("cannot make a network namespace")
        self._namespaces.add(os.readlink(f"/proc/{holder.pid}/ns/net"))
        return holder.pid

    def _plug(self, host: int) -> None:
        holder, port = self._holders[host], f"port-{host}"
        self._ip(
            self._switch,
            *("link", "add", "name", port, "type", "veth", "peer", "name", "uplink", "netns", str(holder)),
        )
        self._ip(self._switch, "link", "set", "dev", port, "master", "switch", "up")
        self._ip(holder, "address", "add", f"{self.address(host)}/24", "dev", "uplink")
        for device in ("lo", "uplink"):
            self._ip(holder, "link", "set", "dev", device, "up")
        if self.shape is not None:
            trains = ("gso_max_size", str(_TRAIN_BYTES))
            for namespace, device in ((holder, "uplink"), (self._switch, port)):
                self._ip(namespace, "link", "set", "dev", device, *trains)
                shaper = ["rate", f"{self.shape.rate_bit_s:.0f}bit", "burst", str(self.shape.burst_bytes)]
                shaper += ["latency", f"{self.shape.queue_s * 1e6:.0f}us"]
                _command(
                    [*self._within(namespace), "tc", "qdisc", "add", "dev", device, "root", "tbf", *shaper]
                )

    def _sweep(self) -> None:
        """Kill what still runs on the hosts: workers whose launcher was killed, say."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and self._namespaces:
                with contextlib.suppress(OSError):
                    if os.readlink(entry / "ns/net") in self._namespaces:
                        os.kill(int(entry.name), signal.SIGKILL)

    def _ip(self, holder: int, *arguments: str) -> None:
        _command([*self._within(holder), "ip", *arguments])

    @staticmethod
    def _within(holder: int) -> list[str]:
        return [*_KILL_WITH_PARENT, "nsenter", f"--net=/proc/{holder}/ns/net", "--"]

    @staticmethod
    def _address(number: int) -> str:
        return f"10.78.0.{number}"


_SINK = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 4701))
print("ready", flush=True)
stream, buffer, total = server.accept()[0], bytearray(1 << 20), 0
opened = time.perf_counter()
while time.perf_counter() < opened + 0.2:  # past slow start and what the idle link lets through
    stream.recv_into(buffer)
start = last = time.perf_counter()
while last < start + float(sys.argv[2]):
    total += stream.recv_into(buffer)
    last = time.perf_counter()
print(total / (last - start), flush=True)
while stream.recv_into(buffer):  # the others measure on; the caller ends this process
    pass
"""
_SOURCE = """
import socket, sys
stream = socket.create_connection((sys.argv[1], 4701))
try:
    while True:
        stream.sendall(bytes(1 << 18))
except OSError:
    pass
"""


@contextlib.contextmanager
def _process(
    command: Sequence[str], output: int | None, log: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process, ended when the block is left: by SIGTERM, and after a grace by SIGKILL.

    Its stderr goes to `log`, and its stdout too unless `output` is a pipe.
    """
    with contextlib.ExitStack() as stack:
        file: IO[str] | None = stack.enter_context(log.open("w")) if log is not None else None
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file if output is None else output,
            stderr=file,
            text=True,
            process_group=0,  # Ctrl-C is this process's to handle
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _command(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostsError(f"{' '.join(command)}: {done.stderr.strip()}")


# What the workers do.


def work(options: argparse.Namespace) -> None:
    """Time the points, as one of the workers; rank 0 writes `--json FILE`."""
    torch.set_num_threads(1)
    ringps.init()
    found = []
    for text in options.work.split(","):
        op, _, size = text.partition(":")
        found.append((op, int(size), _times_s(Point(op, int(size)), options.seconds)))
    if ringps.rank() == 0:
        options.json.write_text(json.dumps(found))
    ringps.shutdown()


def _times_s(point: Point, seconds: float) -> list[float]:
    n, rank = ringps.world_size(), ringps.rank()
    numel = point.size_bytes // 4
    # Whole numbers below 2^24: float32 adds them exactly, in any order.
    pattern = torch.arange(numel, dtype=torch.float32) % 1021
    tensor = torch.empty(numel)
    start, stop = numel * rank // n, numel * (rank + 1) // n
    collectives: dict[str, tuple[Callable[[], object], torch.Tensor]] = {
        "all_reduce": (lambda: ringps.all_reduce(tensor), pattern * n + sum(range(n))),
        "all_gather": (lambda: ringps.all_gather(tensor, pattern[start:stop]), pattern),
    }
    collective, expected = collectives[point.op]

    def once() -> float:
        torch.add(pattern, rank, out=tensor)
        ringps.barrier()
        start_s = time.perf_counter()
        collective()
        elapsed_s = time.perf_counter() - start_s
        if not torch.equal(tensor, expected):
            raise SystemExit(f"{point}: wrong result")
        return elapsed_s

    once()
    begin_s = time.perf_counter()
    once()
    round_s = torch.tensor([time.perf_counter() - begin_s], dtype=torch.float64)
    ringps.all_reduce(round_s, "max")
    repeats = min(max(3, int(seconds / round_s.item())), 2000)
    times_s = torch.tensor([once() for _ in range(repeats)], dtype=torch.float64)
    ringps.all_reduce(times_s, "max")
    return [float(one) for one in times_s]


# What the script measures.


def measure_ring(shape: Shape, sizes_bytes: Sequence[int]) -> list[Row]:
    """The flat ring of 4 hosts with a worker each."""
    with Hosts(4, shape) as hosts:
        stream = min(hosts.streams(1.0))
        found = hosts.measure([Point("all_reduce", size) for size in sizes_bytes], seconds=1.5)
    return [_row(one, shape, 4, 1, "tcp", stream) for one in found]


def measure_hierarchy(shape: Shape, sizes_bytes: Sequence[int]) -> list[Row]:
    """2 hosts with 2 workers each: the flat ring, and what `auto` makes of it."""
    points = [Point("all_reduce", size) for size in sizes_bytes]
    rows = []
    with Hosts(2, shape) as hosts:
        stream = min(hosts.streams(1.0))
        for transport in ("tcp", "auto"):
            found = hosts.measure(points, workers_per_host=2, transport=transport, seconds=1.5)
            rows += [_row(one, shape, 2, 2, transport, stream) for one in found]
    return rows


def _row(
    one: Measured, shape: Shape, hosts: int, workers_per_host: int, transport: str, stream: float
) -> Row:
    n = hosts * workers_per_host
    carried_bytes = 2 * (n - 1) / n * one.point.size_bytes
    rate_bytes_s = carried_bytes / one.median_s
    return report.row(
        bench="hosts",
        backend=f"ringps-{transport}",
        op=one.point.op,
        size_bytes=one.point.size_bytes,
        dtype="float32",
        world_size=n,
        times_s=one.times_s,
        facts={
            "transport": transport,
            "hosts": hosts,
            "workers_per_host": workers_per_host,
            "gbit_per_s": shape.rate_bit_s / 1e9,
            "tbf_burst_bytes": shape.burst_bytes,
            "tbf_queue_s": shape.queue_s,
            "share_of_link": round(8 * rate_bytes_s / shape.rate_bit_s, 4),
            "share_of_link_attainable": round(TCP_SHARE, 4),
            "share_of_tcp_stream": round(rate_bytes_s / stream, 4),
            "tcp_stream_gbit_per_s": round(8 * stream / 1e9, 4),
        },
    )


def table(rows: Sequence[Row]) -> str:
    """A line per row. Shares above 1 are what an algorithm saves that sends less than a flat ring."""
    titles = ("hosts", "workers", "size", "backend", "time ms", "min", "max", "of link", "of a TCP stream")
    lines = []
    for one in rows:
        share, of_stream = one.env["share_of_link"], one.env["share_of_tcp_stream"]
        lines.append(
            (
                str(one.env["hosts"]),
                str(one.world_size),
                report.human_bytes(one.bytes),
                one.backend,
                *(f"{us / 1e3:.2f}" for us in (one.time_us, one.time_us_min, one.time_us_max)),
                f"{share:.1%}",
                f"{of_stream:.1%}",
            )
        )
    return report.Table(titles, lines).text()


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the measurements say about the bars, a line each."""
    largest = max(one.bytes for one in rows)
    chosen = [one for one in rows if one.bytes == largest]
    said = []
    for one in chosen:
        if one.env["workers_per_host"] == 1:
            said.append(
                f"{one.env['share_of_link']:.1%} of the link for {report.human_bytes(one.bytes)} over "
                f"{one.env['hosts']} hosts; bar {BANDWIDTH_BAR:.0%}, full segments leave {TCP_SHARE:.1%}, "
                f"plain streams get {one.env['tcp_stream_gbit_per_s']} of {one.env['gbit_per_s']} Gbit/s"
            )
    times = {one.backend: one.time_us for one in chosen if one.env["workers_per_host"] != 1}
    if {"ringps-tcp", "ringps-auto"} <= set(times):
        ratio = times["ringps-auto"] / times["ringps-tcp"]
        said.append(f"auto takes {ratio:.2f} of the flat ring's time on shared links; bar {HIERARCHY_BAR}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description="all_reduce over shaped links between network namespaces.")
    parser.add_argument("--gbit", type=float, default=1.0, help="rate of every host's link (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--work", metavar="OP:BYTES,...", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=1.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if worker_env.read() is not None:
        work(options)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shape = Shape(rate_bit_s=options.gbit * 1e9)
    try:
        rows = measure_ring(shape, [KIB, 64 * KIB, MIB, 64 * MIB])
        rows += measure_hierarchy(shape, [KIB, MIB, 64 * MIB])
    except HostsError as error:
        sys.exit(f"hosts.py: {error}")
    print(table(rows), flush=True)
    print(*verdicts(rows), sep="\n")
    print(
        f"links: tbf rate {options.gbit:g} Gbit/s each way, burst {shape.burst_bytes} bytes, "
        f"queue {shape.queue_s * 1e3:g} ms"
    )
    if options.json:
        report.write_json(options.json, rows)


if __name__ == "__main__":
    main()
