"""A kubelet for tests: runs the pods of a real API server as processes of this machine.

Here belongs what a node does: registering, starting and ending pods, reporting on them, serving their logs,
and resolving names for them, as truthfully as processes allow; and the faults that a node can have. What
decides is in PURE modules. Nothing here knows ringps. README.md says what it cannot prove.
"""

from tests.k8s.kubelet.fleet import Fleet, obstacle
from tests.k8s.kubelet.images import Image
from tests.k8s.kubelet.node import Node

__all__ = ["Fleet", "Image", "Node", "obstacle"]
