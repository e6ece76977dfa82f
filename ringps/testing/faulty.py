"""Runs a script with a fault plan: `python -m ringps.testing.faulty --plan FILE --record FILE SCRIPT ARGS...`

Under `ringps run` every worker does that:

    ringps run -n 4 -m ringps.testing.faulty --plan plan.json --record fired.jsonl train.py --steps 100
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ringps import worker_env
from ringps.testing.faults import arm
from ringps.testing.plan import FaultPlan


def main(arguments: Sequence[str]) -> None:
    """Arm this worker, and run the script as `__main__`.

    Raises:
        SystemExit: the arguments are wrong, or the plan cannot be read.
    """
    parser = argparse.ArgumentParser(prog="python -m ringps.testing.faulty")
    parser.add_argument("--plan", required=True, type=Path, help="the fault plan, as JSON")
    parser.add_argument("--record", required=True, type=Path, help="where every fault that happens is noted")
    parser.add_argument("script", help="the Python script to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(arguments)
    try:
        plan = FaultPlan.from_json(options.plan.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{options.plan}: {error}")
    env = worker_env.read()
    arm(plan, 0 if env is None else env.worker_id, options.record)
    run_script(options.script, options.arguments)


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run a script in this process as if it had been started by itself."""
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
