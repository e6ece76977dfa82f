"""PURE: which kinds of objects we use, and where the API server keeps them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of object. `group` is "" for the core group; without a `version`, the server's preferred one."""

    group: str
    version: str
    plural: str
    namespaced: bool = True

    def path(self, version: str, namespace: str, *more: str) -> tuple[str, ...]:
        """The parts of the path of the collection (of one namespace, or of all of them where `namespace` is
        ""), or of what it has `more` of: a name, and a subresource. Empty ones are left out."""
        root = ("apis", self.group, version) if self.group else ("api", version)
        place = ("namespaces", namespace) if self.namespaced and namespace else ()
        return (*root, *place, self.plural, *filter(None, more))


KINDS = {
    "Binding": Kind("", "v1", "bindings"),
    "ConfigMap": Kind("", "v1", "configmaps"),
    "Event": Kind("", "v1", "events"),
    "LimitRange": Kind("", "v1", "limitranges"),
    "Namespace": Kind("", "v1", "namespaces", namespaced=False),
    "Node": Kind("", "v1", "nodes", namespaced=False),
    "PersistentVolume": Kind("", "v1", "persistentvolumes", namespaced=False),
    "PersistentVolumeClaim": Kind("", "v1", "persistentvolumeclaims"),
    "Pod": Kind("", "v1", "pods"),
    "ResourceQuota": Kind("", "v1", "resourcequotas"),
    "Secret": Kind("", "v1", "secrets"),
    "Service": Kind("", "v1", "services"),
    "ServiceAccount": Kind("", "v1", "serviceaccounts"),
    "Deployment": Kind("apps", "v1", "deployments"),
    "ReplicaSet": Kind("apps", "v1", "replicasets"),
    "SelfSubjectAccessReview": Kind(
        "authorization.k8s.io", "v1", "selfsubjectaccessreviews", namespaced=False
    ),
    "Job": Kind("batch", "v1", "jobs"),
    "Lease": Kind("coordination.k8s.io", "v1", "leases"),
    "EndpointSlice": Kind("discovery.k8s.io", "v1", "endpointslices"),
    "NetworkPolicy": Kind("networking.k8s.io", "v1", "networkpolicies"),
    "RuntimeClass": Kind("node.k8s.io", "v1", "runtimeclasses", namespaced=False),
    "PodDisruptionBudget": Kind("policy", "v1", "poddisruptionbudgets"),
    "ClusterRole": Kind("rbac.authorization.k8s.io", "v1", "clusterroles", namespaced=False),
    "ClusterRoleBinding": Kind("rbac.authorization.k8s.io", "v1", "clusterrolebindings", namespaced=False),
    "Role": Kind("rbac.authorization.k8s.io", "v1", "roles"),
    "RoleBinding": Kind("rbac.authorization.k8s.io", "v1", "rolebindings"),
    "PriorityClass": Kind("scheduling.k8s.io", "v1", "priorityclasses", namespaced=False),
    "PodGroup": Kind("scheduling.k8s.io", "", "podgroups"),
    "StorageClass": Kind("storage.k8s.io", "v1", "storageclasses", namespaced=False),
    "CustomResourceDefinition": Kind(
        "apiextensions.k8s.io", "v1", "customresourcedefinitions", namespaced=False
    ),
    # Kueue's; Kubernetes' own (alpha) kind of this name is not one that we use.
    "Workload": Kind("kueue.x-k8s.io", "", "workloads"),
    "LocalQueue": Kind("kueue.x-k8s.io", "", "localqueues"),
    "ClusterQueue": Kind("kueue.x-k8s.io", "", "clusterqueues", namespaced=False),
}


def kind_of(name: str) -> Kind:
    """The kind called `name`, as in `kind: Job`."""
    try:
        return KINDS[name]
    except KeyError:
        raise ValueError(f"objects of kind {name!r} are none that ringps uses") from None
