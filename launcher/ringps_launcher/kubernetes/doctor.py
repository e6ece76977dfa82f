"""`ringps doctor`: whether a cluster, and our rights in it, are what jobs need. Nothing is created."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence

from ringps_launcher.kubernetes import checks, offers
from ringps_launcher.kubernetes.checks import Patient
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import ClusterError, ForbiddenError, UnreachableError
from ringps_launcher.kubernetes.findings import FAIL, UNSEEN, Checked, Finding, as_json, is_fine, lines

Check = Callable[[Patient], Iterator[Finding]]

CHECKS: Sequence[tuple[str, Check]] = (
    ("API server", checks.api_server),
    ("rights", checks.rights),
    ("objects", checks.objects),
    ("pods", checks.pods),
    ("gang", checks.gang),
    ("priority classes", checks.priority_classes),
    ("node reader", checks.node_reader),
    ("nodes", offers.nodes),
    ("GPUs", offers.gpus),
    ("runtime class", offers.runtime_class),
    ("quota", offers.quota),
    ("storage", offers.storage),
    ("Kueue", offers.kueue),
    ("scheduler", offers.scheduler),
    ("metrics", offers.metrics),
    ("NetworkPolicy", offers.network_policy),
)
"""In this order. Without the first, the others are not tried."""


def run(options: argparse.Namespace) -> int:
    """Check, and print; 1 if anything is in the way of jobs."""
    cluster = Cluster.connect(options.context, options.namespace)
    checked = examine(
        Patient(
            cluster=cluster, gpu_resource=options.gpu_resource, queue=options.queue or "", now=time.time()
        )
    )
    print(json.dumps(as_json(checked), indent=2) if options.json else "\n".join(lines(checked)))
    return 0 if is_fine(checked) else 1


def examine(patient: Patient) -> list[Checked]:
    """All findings, in the order of the checks."""
    checked: list[Checked] = []
    for name, check in CHECKS:
        found, reached = _found(check, patient)
        checked += [(name, finding) for finding in found]
        if not reached:
            break
    return checked


def _found(check: Check, patient: Patient) -> tuple[list[Finding], bool]:
    """What the check finds, and whether the API server could be asked."""
    found: list[Finding] = []
    try:
        found.extend(check(patient))
    except ForbiddenError as error:
        found.append(Finding(UNSEEN, str(error)))
    except UnreachableError as error:
        return [*found, Finding(FAIL, str(error))], False
    except ClusterError as error:
        found.append(Finding(FAIL, str(error)))
    return found, True
