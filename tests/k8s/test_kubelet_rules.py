"""What the kubelet for tests decides, without a cluster: the rules are the real one's."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

from tests.k8s.kubelet import admission, environment, images, logs, status, zone
from tests.k8s.kubelet.quantity import amount
from tests.k8s.kubelet.status import Run, View

POD: dict[str, Any] = {
    "metadata": {"name": "p", "namespace": "ns", "uid": "u", "labels": {"a": "1"}, "generation": 1},
    "spec": {"containers": [{"name": "c", "image": "i"}], "restartPolicy": "Never"},
}


def run(code: int) -> Run:
    return Run(code=code, reason="Error", started_at_s=1.0, ended_at_s=2.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(A)-$(B)", "1-$(B)"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$A $( $", "$A $( $"),
        ("", ""),
    ],
)
def test_variables_expand_as_the_kubelet_does_it(text: str, expected: str) -> None:
    assert environment.expand(text, {"A": "1"}) == expected


def test_later_variables_see_earlier_ones_and_services() -> None:
    container = {
        "env": [
            {"name": "A", "value": "$(HOST):$(B)"},
            {"name": "B", "value": "$(A)!"},
            {"name": "C", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a']"}}},
            {"name": "D", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
        ],
        "resources": {"limits": {"memory": "1500Ki"}},
    }
    facts = environment.Facts(POD, node="n", host_ip="1.1.1.1", pod_ip="2.2.2.2", allocatable={})
    found = environment.variables(
        container, image={"PATH": "/bin"}, services={"HOST": "h"}, facts=facts, lookup=lambda *_: None
    )
    assert found == {
        "PATH": "/bin",
        "HOSTNAME": "p",
        "HOST": "h",
        "A": "h:$(B)",
        "B": "h:$(B)!",
        "C": "1",
        "D": "2",
    }


def test_a_reference_to_nothing_is_an_error_unless_optional() -> None:
    facts = environment.Facts(POD, node="n", host_ip="1.1.1.1", pod_ip="2.2.2.2", allocatable={})

    def variables(**reference: Any) -> dict[str, str]:
        entry = {"name": "X", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", **reference}}}
        return environment.variables(
            {"env": [entry]}, image={}, services={}, facts=facts, lookup=lambda *_: None
        )

    assert "X" not in variables(optional=True)
    with pytest.raises(environment.ConfigError, match='secret "s" not found'):
        variables()


def test_quantities() -> None:
    assert [int(amount(text)) for text in ("2Gi", "1k", "3", "1e3")] == [2 << 30, 1000, 3, 1000]
    assert amount("500m") * 2 == 1


def test_a_pod_that_does_not_fit_is_refused() -> None:
    def pod(gpus: int) -> dict[str, Any]:
        return {
            "spec": {"containers": [{"name": "c", "resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}]}
        }

    capacity = {"pods": "2", "nvidia.com/gpu": "2", "cpu": "1"}
    assert admission.refusal(pod(1), [pod(1)], capacity) is None
    refused = admission.refusal(pod(1), [pod(2)], capacity)
    assert refused is not None and refused[0] == "OutOfnvidia.com/gpu"
    assert "requested: 1, used: 2, capacity: 2" in refused[1]
    refused = admission.refusal(pod(0), [pod(0), pod(0)], capacity)
    assert refused is not None and refused[0] == "OutOfpods"


@pytest.mark.parametrize(
    ("policy", "views", "ending", "expected"),
    [
        ("Never", [View(name="c", image="i", waiting=("ContainerCreating", ""))], False, "Pending"),
        ("Never", [View(name="c", image="i", running_since_s=1.0)], False, "Running"),
        ("Never", [View(name="c", image="i", ended=run(0))], False, "Succeeded"),
        ("Never", [View(name="c", image="i", ended=run(75))], False, "Failed"),
        ("OnFailure", [View(name="c", image="i", ended=run(1))], False, "Running"),
        ("OnFailure", [View(name="c", image="i", ended=run(1))], True, "Failed"),
        ("Always", [View(name="c", image="i", ended=run(0))], True, "Succeeded"),
        ("Never", [View(name="c", image="i", waiting=("ErrImagePull", ""))], True, "Failed"),
        (
            "Never",
            [View(name="c", image="i", ended=run(0)), View(name="d", image="i", running_since_s=1.0)],
            True,
            "Running",
        ),
    ],
)
def test_the_phase(policy: str, views: list[View], ending: bool, expected: str) -> None:
    assert status.phase(policy, views, ending=ending) == expected


def test_conditions_keep_the_time_since_when_they_hold() -> None:
    old = {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "then"}]}
    new = {"conditions": [{"type": "Ready", "status": "True"}, {"type": "Initialized", "status": "True"}]}
    status.stamp_transitions(new, old, 0.0)
    assert [c["lastTransitionTime"] for c in new["conditions"]] == ["then", "1970-01-01T00:00:00Z"]


def test_waiting_times_grow_to_ten_seconds() -> None:
    assert [status.backoff_s(n) for n in range(6)] == [1, 2, 4, 8, 10, 10]
    assert status.backoff_s(10**6) == 10


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("ringps/test:1", True),
        ("registry.example:5000/a/b_c@sha256:" + "0" * 64, True),
        ("host/Upper", False),
        ("a b", False),
        ("a:", False),
    ],
)
def test_image_names(name: str, valid: bool) -> None:
    assert images.valid_name(name) is valid


LOG = (
    b"2026-01-01T00:00:00.000000000Z stdout F one\n"
    b"2026-01-01T00:00:01.500000000Z stdout P tw\n"
    b"2026-01-01T00:00:01.500000000Z stdout F o\n"
    b"2026-01-01T00:00:02.000000000Z stderr F three\n"
)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, b"one\ntwo\nthree\n"),
        ({"tailLines": "2"}, b"two\nthree\n"),
        ({"tailLines": "0"}, b""),
        ({"tailLines": "9"}, b"one\ntwo\nthree\n"),
        ({"sinceTime": "2026-01-01T00:00:01Z"}, b"two\nthree\n"),
        ({"timestamps": "true", "tailLines": "1"}, b"2026-01-01T00:00:02.000000000Z three\n"),
        ({"limitBytes": "5"}, b"one\nt"),
    ],
)
def test_parts_of_a_log(query: dict[str, str], expected: bytes) -> None:
    assert logs.Reader(logs.wanted(query, 0.0)).first(LOG) == expected


def test_a_log_is_followed_in_any_pieces() -> None:
    for cut in range(len(LOG)):
        reader = logs.Reader(logs.wanted({}, 0.0))
        assert reader.first(LOG[:cut]) + reader.more(LOG[cut:]) == b"one\ntwo\nthree\n"


def query(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)


def service(name: str, address: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "ns"}, "spec": {"clusterIP": address}}


def slice_of(name: str, *endpoints: dict[str, Any]) -> dict[str, Any]:
    labels = {"kubernetes.io/service-name": name}
    about = {"name": name, "namespace": "ns", "labels": labels}
    return {"metadata": about, "addressType": "IPv4", "endpoints": list(endpoints)}


def test_the_zone_has_what_is_ready() -> None:
    found = zone.zone(
        [service("job", "None"), service("plain", "10.96.7.7")],
        [
            slice_of(
                "job",
                {"addresses": ["10.0.0.1"], "hostname": "job-0", "conditions": {"ready": True}},
                {"addresses": ["10.0.0.2"], "hostname": "job-1", "conditions": {"ready": False}},
                {"addresses": ["10.0.0.3"]},
            ),
            slice_of("plain", {"addresses": ["10.0.0.4"]}),
        ],
    )
    assert found == {
        "job.ns.svc.cluster.local": ["10.0.0.1", "10.0.0.3"],
        "job-0.job.ns.svc.cluster.local": ["10.0.0.1"],
        "plain.ns.svc.cluster.local": ["10.96.7.7"],
    }


def test_answers_to_queries() -> None:
    names = {"a.cluster.local": ["10.0.0.1", "10.0.0.2"]}

    def outcome(packet: bytes) -> tuple[int, list[str]]:
        response = zone.answer(packet, names)
        assert response is not None
        number, flags, _, count = struct.unpack_from(">HHHH", response)
        assert number == 7 and flags & 0x8000
        records = response[len(packet) :]
        assert len(records) == 16 * count
        return flags & 0xF, [socket.inet_ntoa(records[16 * i + 12 : 16 * i + 16]) for i in range(count)]

    assert outcome(query("A.cluster.local")) == (0, ["10.0.0.1", "10.0.0.2"])
    assert outcome(query("a.cluster.local", kind=28)) == (0, [])
    assert outcome(query("b.cluster.local")) == (3, [])
    assert outcome(query("example.com")) == (3, [])
    assert zone.answer(b"short", names) is None
    broken = zone.answer(query("a")[:-5], names)
    assert broken is not None and broken[3] & 0xF == 1
    response = zone.answer(query("a.cluster.local"), names)
    assert response is not None and zone.answer(response, names) is None
