"""PURE: why the API server takes no pod of a job, by what the Job controller says about it in its events."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ringps_launcher.kubernetes.fields import Object, mapping, name_of, one_line
from ringps_launcher.kubernetes.obstacles import Obstacle

_QUOTA = re.compile(
    r"exceeded quota: (?P<quota>[^,]+), requested: (?P<requested>.+), used: (?P<used>.+), "
    r"limited: (?P<limited>.+)"
)
_UNSAID = re.compile(r"failed quota: (?P<quota>[^:]+): must specify (?P<what>.+)")
_PRIORITY = re.compile(r"no PriorityClass with name (?P<name>\S+) was found")
_ACCOUNT = re.compile(r'serviceaccount "(?P<name>[^"]+)" not found')
_POD_SECURITY = re.compile(r'violates PodSecurity "(?P<level>[^"]+)": (?P<what>.+)')
_WEBHOOK = re.compile(r'admission webhook "(?P<name>[^"]+)" denied the request:? ?(?P<what>.*)')


def explain(message: str, quotas: Sequence[Object] = ()) -> Obstacle:
    """For the message of a FailedCreate event, and the namespace's ResourceQuotas as they are now."""
    said = one_line(message)
    if full := _QUOTA.search(said):
        return _over_quota(full, quotas)
    if unsaid := _UNSAID.search(said):
        return Obstacle("quota", f"quota {unsaid['quota']} wants every pod to say its {unsaid['what']}")
    if missing := _PRIORITY.search(said):
        return Obstacle(
            "admission",
            f"there is no PriorityClass {missing['name']}",
            "create it, or submit with another --priority-class",
        )
    if account := _ACCOUNT.search(said):
        return Obstacle("rights", f"there is no ServiceAccount {account['name']}", "cancel and submit anew")
    if level := _POD_SECURITY.search(said):
        return Obstacle(
            "admission",
            f"the namespace's Pod Security level {level['level']} does not allow its pods: {level['what']}",
            "`ringps doctor` checks what the namespace allows",
        )
    if webhook := _WEBHOOK.search(said):
        return Obstacle(
            "admission", f"webhook {webhook['name']} refuses its pods: {webhook['what']}".rstrip(": ")
        )
    words = re.sub(r'^Error creating: pods "[^"]*" is forbidden: ', "", said)
    return Obstacle("admission", f"its pods are refused: {words}")


def _over_quota(full: re.Match[str], quotas: Sequence[Object]) -> Obstacle:
    requested, used, limited = (_amounts(full[key]) for key in ("requested", "used", "limited"))
    name = full["quota"]
    current = next((quota for quota in quotas if name_of(quota) == name), None)
    if current is not None:  # the event may be old
        used = {**used, **_texts(mapping(current, "status", "used"))}
        limited = {**limited, **_texts(mapping(current, "status", "hard"))}
    parts = [
        f"{resource}: {used.get(resource, '?')} of {limited.get(resource, '?')} used, {asked} more wanted"
        for resource, asked in requested.items()
    ]
    return Obstacle(
        "quota",
        f"quota {name} has no room ({'; '.join(parts)})",
        "wait until other jobs end, ask for less, or have the quota raised",
    )


def _amounts(words: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in words.split(","))
    return {key.strip(): value for key, _, value in pairs}


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()}
