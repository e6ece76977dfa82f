"""The command `ringps`: starts a job's workers on this machine, watches over them and cleans up.

Belongs here: parsing the command line, placing and spawning workers, signals, output, exit codes.
Does not: anything that a worker needs while it trains (that is `ringps`), and torch is never
imported. What to do when something happens is decided in the PURE files (`plan` who runs where,
`restart` what follows from an exit, with `losses`, `replacement` and `outcome`); `attempt` carries it
out in one selectors loop, for one start of the ring.

Start reading at `supervise.py`.
"""
