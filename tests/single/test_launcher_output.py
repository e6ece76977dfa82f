from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from ringps.errors import SetupError
from ringps_launcher.events import EventLog, Journal
from ringps_launcher.network import ReservedPort, address_towards, parse_address
from ringps_launcher.output import HIGH_WATER_BYTES, Logs, RawLog, Sink, Stream, open_sinks


def test_a_sink_never_blocks_and_tells_when_its_reader_is_slow() -> None:
    reader, writer = os.pipe()
    sink = Sink(writer)
    stream = Stream(0, sink, coloured=True)
    text = b"x" * 99 + b"\n"
    while not stream.stalled:
        stream.feed(text)
    assert sink.pending_bytes <= HIGH_WATER_BYTES + 104
    received = b""
    while sink.pending_bytes:
        received += os.read(reader, 1 << 20)
        sink.flush()
    os.close(writer)
    while data := os.read(reader, 1 << 20):
        received += data
    os.close(reader)
    assert set(received.splitlines()) == {b"[0] " + text[:-1]}


def test_a_sink_without_reader_is_broken() -> None:
    reader, writer = os.pipe()
    sink = Sink(writer)
    os.close(reader)
    sink.write(b"x")
    assert sink.broken and not sink.pending_bytes
    sink.write(b"x")
    os.close(writer)


def test_a_full_disk_is_remembered_but_breaks_nothing() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    sink = Sink(full)
    sink.write(b"x")
    os.close(full)
    assert not sink.broken and not sink.pending_bytes
    assert sink.lost == "No space left on device"


def test_a_sink_leaves_the_descriptor_as_it_is() -> None:
    reader, writer = os.pipe()
    Sink(writer).write(b"x")
    assert not fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_NONBLOCK
    os.close(reader)
    os.close(writer)


def test_two_descriptors_of_one_file_share_a_sink(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    again = os.dup(writer)
    other = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    out, err = open_sinks(writer, again)
    assert out is err
    out, err = open_sinks(writer, other)
    assert out is not err
    for descriptor in (reader, writer, again, other):
        os.close(descriptor)


def test_a_raw_log_says_once_that_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "rank-3.log").symlink_to("/dev/full")
    log = RawLog(str(tmp_path), 3)
    assert log.write(b"x") == f"{tmp_path}/rank-3.log is cut off here: No space left on device"
    assert log.write(b"x") is None
    log.close()


def test_a_log_directory_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="cannot write logs to"):
        RawLog(str(tmp_path / "file"), 0)


def test_events_of_several_threads_are_whole_lines(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path / "events"))

    def write() -> None:
        for _ in range(100):
            log.write({"event": "e"})

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    log.close()
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert len(events) == 400
    assert all(event["t"] > 1e9 for event in events)


def test_an_event_keeps_its_own_time(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path / "events"))
    log.write({"event": "e", "t": 1.5})
    log.close()
    assert json.loads((tmp_path / "events").read_text()) == {"event": "e", "t": 1.5}


def test_addresses() -> None:
    assert parse_address("node-a:4700") == ("node-a", 4700)
    assert parse_address("[::1]:4700") == ("::1", 4700)
    for text in ("node-a", ":4700", "node-a:", "node-a:x", "node-a:70000", "node-a:-1"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            parse_address(text)
    assert address_towards("127.0.0.1", 4700) == "127.0.0.1"
    with pytest.raises(SetupError, match="cannot reach"):
        address_towards("no.such.host.invalid", 4700)


def test_reserved_ports_differ() -> None:
    with ReservedPort() as a, ReservedPort() as b:
        assert a.number != b.number


def test_a_rank_s_log_is_opened_once_over_all_starts_of_the_ring(tmp_path: Path) -> None:
    logs = Logs(str(tmp_path))
    first = logs.open(3)
    assert first is not None and logs.open(3) is first
    assert logs.path_of(3) == str(tmp_path / "rank-3.log")
    assert logs.path_of(4) is None
    logs.close()
    none = Logs(None)
    assert (none.open(3), none.path_of(3)) == (None, None)
    none.close()


def test_a_journal_that_cannot_be_written_is_given_up_once(tmp_path: Path) -> None:
    said: list[str] = []
    journal = Journal("/dev/full", said.append)
    journal.write({"event": "a"})
    journal.write({"event": "b"})
    journal.close()
    assert said == ["/dev/full is cut off here: No space left on device"]
    path = tmp_path / "events"
    journal = Journal(str(path), said.append)
    journal.write({"event": "a", "t": 1.0})
    journal.close()
    assert path.read_text() == '{"t": 1.0, "event": "a"}\n'
    silent = Journal(None, said.append)
    silent.write({"event": "a"})
    silent.close()
    assert len(said) == 1
