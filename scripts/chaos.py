"""`make chaos`: train a tiny model under thousands of faults, and check that nothing was lost, or done twice.

Each campaign is a job of real processes, with a random plan of faults: kills, stops, broken and silent
connections, delays, flipped bits, departures (`ringps.testing`). A campaign that fails leaves its plan, its
logs and all that was recorded; what it prints says how to run it again.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ringps.testing.nursery import Nursery
from tests.chaos.campaign import Campaign

KILLS = {"kill": 6, "leave": 1, "stop": 1, "delay": 2}


def campaigns(options: argparse.Namespace) -> list[Campaign]:
    """Over shared memory, TCP and both in turn; every fourth one mostly of kills."""
    found: list[Campaign] = []
    left = options.faults
    for index in itertools.count():
        if left <= 0:
            return found
        count = max(min(left, options.each), 12)
        values = {
            "seed": options.seed + index,
            "count": count,
            "workers": options.workers,
            "gpu": options.gpu,
        }
        transport = options.transport or ("shm", "tcp", "both")[index % 3]
        kinds = {"kinds": dict(KILLS)} if (options.seed + index) % 4 == 1 else {}
        found.append(Campaign(transport=transport, **values, **kinds))
        left -= count
    raise AssertionError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=2000, help="how many, over all campaigns")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, help="of the first campaign")
    parser.add_argument("--each", type=int, default=250, help="most faults of one campaign")
    parser.add_argument("--workers", type=int, default=4, help="workers of each job")
    parser.add_argument("--transport", choices=("shm", "tcp", "both"), help="instead of each in turn")
    parser.add_argument("--gpu", action="store_true", help="train on a pretended GPU that all workers share")
    parser.add_argument("--keep", type=Path, help="where to leave what a failed campaign recorded")
    options = parser.parse_args()
    planned = campaigns(options)
    print(f"seed {options.seed}: {options.faults} faults in {len(planned)} campaigns", flush=True)
    begun_s = time.monotonic()
    total = 0
    with Nursery() as nursery:
        for number, campaign in enumerate(planned, 1):
            directory = Path(tempfile.mkdtemp(prefix="ringps-chaos-"))
            try:
                line = campaign.run(nursery, directory)
            except AssertionError as error:
                kept = directory
                if options.keep is not None:
                    kept = Path(shutil.copytree(directory, options.keep, dirs_exist_ok=True))
                    shutil.rmtree(directory)
                print(f"campaign {number} FAILED ({campaign.transport}, seed {campaign.seed}): {error}")
                print(f"its plan, logs and records are in {kept}; to run it again:")
                again = f"--faults {campaign.count} --each {campaign.count} --seed {campaign.seed}"
                again += f" --workers {campaign.workers} --transport {campaign.transport}"
                print(f'  make chaos ARGS="{again}"')
                return 1
            shutil.rmtree(directory)
            total += campaign.count
            print(f"campaign {number} of {len(planned)}: {line}", flush=True)
    seconds = time.monotonic() - begun_s
    print(f"{total} faults in {seconds:.0f} s: all happened, nothing hung, nothing was lost or done twice")
    return 0


if __name__ == "__main__":
    sys.exit(main())
