"""`python -m ringps_launcher` is the same command as `ringps`."""

from __future__ import annotations

from ringps_launcher.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
