"""`ringps ls` and `ringps status`: jobs as tables for people, or as JSON for programs."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence

from ringps_launcher.kubernetes import observe
from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.report import job_report, jobs_table
from ringps_launcher.kubernetes.view import JobView, look


def ls(options: argparse.Namespace) -> int:
    """Print the jobs; the exit code."""
    cluster = Cluster.connect(options.context, options.namespace)
    now = time.time()
    views = jobs(cluster, now, all_namespaces=options.all_namespaces)
    if options.json:
        print(json.dumps([view.as_json(now) for view in views], indent=2))
        return 0
    if not views:
        place = "any namespace" if options.all_namespaces else f"namespace {cluster.namespace}"
        print(f"there are no jobs in {place}", file=sys.stderr)
        return 0
    print("\n".join(jobs_table(views, now, with_namespace=options.all_namespaces)))
    for line in dict.fromkeys(line for view in views for line in view.unseen):
        print(f"ringps: not looked at: {line}", file=sys.stderr)
    return 0


def status(options: argparse.Namespace) -> int:
    """Print all about one job; the exit code."""
    cluster = Cluster.connect(options.context, options.namespace)
    now = time.time()
    view = job(cluster, options.name, now)
    if options.json:
        print(json.dumps(view.as_json(now), indent=2))
        return 0
    print("\n".join(job_report(view, now, place=place_options(options))))
    return 0


def jobs(cluster: Cluster, now: float, *, all_namespaces: bool = False) -> list[JobView]:
    """All jobs. Why they wait is looked up only if one does."""
    snapshots = observe.every(cluster, all_namespaces=all_namespaces)
    views = [look(snapshot, now) for snapshot in snapshots]
    restless = [
        index
        for index, view in enumerate(views)
        if not view.is_over and (view.status != "running" or view.outsiders)
    ]
    if restless:
        full = observe.with_surroundings(
            cluster, [snapshots[index] for index in restless], all_namespaces=all_namespaces
        )
        for index, snapshot in zip(restless, full, strict=True):
            views[index] = look(snapshot, now)
    return views


def job(cluster: Cluster, name: str, now: float) -> JobView:
    """All about one job.

    Raises:
        NotFoundError: there is none of this name.
    """
    return look(observe.one(cluster, name), now)


def place_options(options: argparse.Namespace) -> Sequence[str]:
    """The options that the next commands need to find the same job."""
    given: list[str] = []
    if options.context:
        given += ["--context", shlex.quote(options.context)]
    if options.namespace:
        given += ["-N", options.namespace]
    return given
