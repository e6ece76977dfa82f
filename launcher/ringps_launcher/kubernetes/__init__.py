"""A job on Kubernetes: what it is made of, and the commands and the operator that look after it.

Belongs here: the manifests of a job (`spec` what is asked for, `resources` the objects, PURE), the client of
the API server (`client`, the only module besides `operator` and `lease` that talks to it), the commands of a
user (`submit`, `control`, `show`, `logs`, `doctor`) and what the coordinator's pod does besides coordinating
(`operator`, which carries out what the PURE `reconcile` decides).
Does not: anything that training needs. Workers never talk to the API server, and go on while it is away.

The third-party package `kubernetes` is loaded only by modules that talk to the API server, and only when
such a command runs. Start reading at `resources.py`.
"""
