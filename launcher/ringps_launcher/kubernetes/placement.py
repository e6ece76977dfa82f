"""PURE: why the scheduler finds no node for a pod, in plain words.

Its message counts nodes by what speaks against them: `0/5 nodes are available: 2 Insufficient cpu, 3 node(s)
had untolerated taint(s). preemption: 0/5 nodes are available: ...`. What the nodes themselves say (their
taints, how large they are) is added where we may look at them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction

from ringps_launcher.kubernetes import quantities
from ringps_launcher.kubernetes.fields import Object, mapping, mappings, one_line
from ringps_launcher.kubernetes.obstacles import Obstacle

GANG_INCOMPLETE = "it waits for the other pods of its gang"
GANG_ADVICE = "if that lasts, see why the others are missing (quota?)"

_HEAD = re.compile(r"0/(?P<total>\d+) nodes are available: ?")
_ITEM = re.compile(r"(?P<count>\d+) (?P<text>.+)")
_NEXT_ITEM = re.compile(r", (?=\d+ )")
_GANG = re.compile(r"minCount \((?P<wanted>\d+)\) (?:cannot be satisfied|is not yet satisfied)")
_FITTING = re.compile(r"(?P<scheduled>\d+) scheduled, (?P<remaining>\d+) remaining")
_VICTIMS = re.compile(r"placement for pod on node (?P<node>\S+?), preempting (?P<victims>\d+) victims")
_CLAIM = re.compile(r'persistentvolumeclaim "(?P<claim>[^"]+)" not found')


def explain(pod: Object, message: str, nodes: Sequence[Object] | None) -> Obstacle:
    """The scheduler's message about a pod.

    Args:
        pod: it is what the message is about.
        message: of its PodScheduled condition.
        nodes: all nodes; None if we may not look at them.
    """
    if gang := _gang(message):
        return gang
    head = _HEAD.search(message)
    if "no nodes available" in message:
        return Obstacle("nodes", "the cluster has no nodes", "add nodes")
    if head is None:
        return Obstacle("scheduler", f"the scheduler says: {one_line(message)}", "")
    # What comes after concerns preemption, and counts the same nodes once more.
    first, _, second = message[head.end() :].partition(" preemption: ")
    if victims := _VICTIMS.search(second):
        count = int(victims["victims"])
        return Obstacle(
            "preempting",
            f"{count} pod{'s' if count > 1 else ''} of lower priority must first leave {victims['node']}",
            "nothing to do: they have their grace period to stop",
        )
    total = int(head["total"])
    items = _items(first)
    if not items:
        return _before_any_node(first.strip().removesuffix(" not found").strip(" ."), total)
    return _by_nodes(pod, items, total, nodes)


def _gang(message: str) -> Obstacle | None:
    wanted = _GANG.search(message)
    if wanted is not None:
        fitting = _FITTING.search(message)
        found = f"; only {fitting['scheduled']} would find a node" if fitting else ""
        return Obstacle(
            "gang",
            f"all {wanted['wanted']} workers are to start together, and there is no room for them{found}",
            "wait until other jobs end, or submit it with fewer workers or without --gang",
        )
    if "gang to appear in scheduling queue" in message or "gang to be scheduled" in message:
        return Obstacle("gang", GANG_INCOMPLETE, GANG_ADVICE)
    return None


def _before_any_node(words: str, total: int) -> Obstacle:
    """Something about the pod alone keeps it from all nodes."""
    if claim := _CLAIM.search(words):
        return Obstacle(
            "volumes",
            f"there is no PersistentVolumeClaim {claim['claim']}",
            "create it, or correct --volume",
        )
    if "unbound immediate PersistentVolumeClaims" in words:
        return Obstacle(
            "volumes",
            "its PersistentVolumeClaim has no volume yet",
            "see `kubectl describe pvc`: is there a StorageClass that provides volumes?",
        )
    if total == 0:
        return Obstacle("nodes", "the cluster has no nodes", "add nodes")
    return Obstacle("other", words or "the scheduler gives no reason", "")


def _by_nodes(
    pod: Object, items: Sequence[tuple[int, str]], total: int, nodes: Sequence[Object] | None
) -> Obstacle:
    causes = [_cause(pod, count, text, nodes) for count, text in items]
    # Nodes that would do if they were larger or emptier say more than those that are meant for others.
    order = ("volumes", "resources", "nodes", "taints", "other")
    causes.sort(key=lambda cause: order.index(cause.kind))
    words = ", ".join(cause.words for cause in causes)
    advice = "; ".join(dict.fromkeys(cause.advice for cause in causes if cause.advice))
    of = "the only node" if total == 1 else f"none of the {total} nodes"
    return Obstacle(causes[0].kind, f"{of} {'does not fit' if total == 1 else 'fits'}: {words}", advice)


def _cause(pod: Object, count: int, text: str, nodes: Sequence[Object] | None) -> Obstacle:
    if text.startswith("Insufficient "):
        return _insufficient(pod, count, text.removeprefix("Insufficient "), nodes)
    if text == "Too many pods":
        return Obstacle("resources", f"{_run(count)} as many pods as they may", "add nodes")
    if "taint" in text:
        return _tainted(pod, count, text, nodes)
    if "were unschedulable" in text:
        return Obstacle("nodes", f"{count} {_is(count)} cordoned", "")
    if "node affinity/selector" in text or "requested node name" in text:
        return Obstacle(
            "nodes", f"{count} {_do(count)} not match --node-selector", _selector_advice(pod, nodes)
        )
    if "topology spread" in text:
        return Obstacle("nodes", f"{count} would break its topology spread constraints", "")
    if "pod affinity rules" in text or "anti-affinity" in text:
        return Obstacle("nodes", f"{count} would break affinity rules between pods", "")
    if "volume node affinity conflict" in text or "volume zone" in text:
        return Obstacle("volumes", f"its volume cannot be reached from {count}", "")
    if "volume" in text.lower():
        return Obstacle("volumes", f"{count} {text.removeprefix('node(s) ')}", "")
    return Obstacle("other", f"{count} {text.removeprefix('node(s) ')}", "")


def _insufficient(pod: Object, count: int, resource: str, nodes: Sequence[Object] | None) -> Obstacle:
    wanted = _wanted(pod, resource)
    what = f"{quantity_text(wanted)} {resource}" if wanted else resource
    words = f"{count} {_do(count)} not have {what} free"
    if nodes is None or not nodes:
        return Obstacle("resources", words, "wait until other jobs end, ask for less, or add nodes")
    largest = max(_allocatable(node, resource) for node in nodes)
    if not largest:
        option = " (--gpu-resource), and whether its device plugin runs" if "/" in resource else ""
        return Obstacle("resources", words, f"no node offers {resource}: check its name{option}")
    if wanted > largest:
        return Obstacle(
            "resources",
            words,
            f"no node is that large, the largest has {quantity_text(largest)} {resource}: ask for less",
        )
    return Obstacle("resources", words, "wait until other jobs end, or submit with a higher --priority-class")


def _tainted(pod: Object, count: int, text: str, nodes: Sequence[Object] | None) -> Obstacle:
    named = re.search(r"taint \{(?P<taint>[^}]*)\}", text)
    taints = [named["taint"].strip(": ")] if named else _untolerated(pod, nodes or ())
    listed = f" ({', '.join(taints)})" if taints else ""
    advice = ""
    own = [taint for taint in taints if not taint.startswith("node.kubernetes.io/")]
    if own:
        advice = f"if it may run there: --toleration {own[0]}"
    elif taints:
        advice = "nodes that are not ready must come back, or be replaced"
    return Obstacle("taints", f"{count} {_has(count)} taints that it does not tolerate{listed}", advice)


def _selector_advice(pod: Object, nodes: Sequence[Object] | None) -> str:
    selector = mapping(pod, "spec", "nodeSelector")
    for key, value in selector.items():
        if nodes and not any(mapping(n, "metadata", "labels").get(key) == value for n in nodes):
            return f"no node has the label {key}={value}"
    return ""


def _untolerated(pod: Object, nodes: Iterable[Object]) -> list[str]:
    """Taints that keep the pod away, as --toleration takes them."""
    tolerations = mappings(pod, "spec", "tolerations")
    found = []
    for node in nodes:
        for taint in mappings(node, "spec", "taints"):
            if taint.get("effect") == "PreferNoSchedule" or taint.get("key") == _CORDONED:
                continue
            if not any(_tolerates(toleration, taint) for toleration in tolerations):
                value = f"={taint['value']}" if taint.get("value") else ""
                found.append(f"{taint.get('key')}{value}:{taint.get('effect')}")
    return list(dict.fromkeys(found))


_CORDONED = "node.kubernetes.io/unschedulable"


def _tolerates(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") not in (None, "", taint.get("effect")):
        return False
    if toleration.get("key") not in (None, "", taint.get("key")):
        return False
    return toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", "")


def _items(words: str) -> list[tuple[int, str]]:
    matches = [_ITEM.fullmatch(part.strip(" .")) for part in _NEXT_ITEM.split(words.strip())]
    return [(int(match["count"]), match["text"]) for match in matches if match]


def _wanted(pod: Object, resource: str) -> Fraction:
    total = Fraction(0)
    for container in mappings(pod, "spec", "containers"):
        resources = mapping(container, "resources")
        given = {**mapping(resources, "limits"), **mapping(resources, "requests")}
        total += amount(given.get(resource))
    return total


def _allocatable(node: Object, resource: str) -> Fraction:
    return amount(mapping(node, "status", "allocatable").get(resource))


def amount(quantity: object) -> Fraction:
    """What a quantity in an object stands for; 0 if it is none."""
    try:
        return quantities.parse(str(quantity))
    except ValueError:
        return Fraction(0)


def quantity_text(value: Fraction) -> str:
    """A number as Kubernetes writes quantities: `2`, `500m`, `8Gi`."""
    for power, suffix in enumerate(("Mi", "Gi", "Ti"), 2):
        unit = Fraction(1024) ** power
        if value >= unit and (value / unit).denominator == 1 and value / unit < 1024:
            return f"{value / unit}{suffix}"
    if value.denominator == 1:
        return str(value)
    milli = value * 1000
    return f"{milli}m" if milli.denominator == 1 else f"{float(value):.3g}"


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


def _do(count: int) -> str:
    return "does" if count == 1 else "do"


def _has(count: int) -> str:
    return "has" if count == 1 else "have"


def _run(count: int) -> str:
    return "1 runs" if count == 1 else f"{count} run"
