"""The public names of `ringps` are pinned, and cheap to import."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import ringps
from ringps import errors

FUNCTIONS = {
    "all_gather", "all_reduce", "barrier", "broadcast", "empty", "generation", "init", "joining",
    "local_rank", "rank", "reduce_scatter", "shutdown", "worker_id", "world_size",
}  # fmt: skip
CLASSES = {
    "Checkpointer", "Config", "DistributedOptimizer", "ElasticBatchSampler", "Exchange", "Recovery",
    "Retention", "Saving", "Timeouts", "TrainState",
}  # fmt: skip
ERRORS = {name for name, value in vars(errors).items() if inspect.isclass(value)}


def test_public_names_are_these() -> None:
    assert set(ringps.__all__) == FUNCTIONS | CLASSES | ERRORS | {"__version__"}
    assert ringps.__all__ == sorted(ringps.__all__)
    assert dir(ringps) == ringps.__all__


@pytest.mark.parametrize("name", ringps.__all__)
def test_each_is_there_and_documented(name: str) -> None:
    value = getattr(ringps, name)
    if name in FUNCTIONS:
        assert inspect.isfunction(value)
    elif name in CLASSES | ERRORS:
        assert inspect.isclass(value)
    if name != "__version__":
        assert value.__doc__
        assert value.__name__ == name


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(ringps.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(imports) == set(ringps.__all__) - {"__version__"}
    homes = {name: ringps._HOMES.get(name, "ringps.collectives.functions") for name in imports}
    assert imports == homes


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ringps' has no attribute 'allreduce'"):
        ringps.allreduce  # type: ignore[attr-defined]  # noqa: B018


def test_version_is_that_of_the_installed_package() -> None:
    assert metadata.version("ringps") == ringps.__version__


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("ringps", ["torch", "zmq", "numpy", "msgpack"]),
        ("ringps.worker_env", ["torch", "zmq", "numpy", "msgpack"]),
        ("ringps.membership", ["torch", "numpy"]),
        ("ringps_launcher.cli", ["torch", "zmq", "numpy"]),
        ("ringps_launcher.supervise", ["torch", "numpy"]),
    ],
)
def test_import_stays_cheap(module: str, heavy: list[str]) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not set(heavy) & set(done.stdout.split())
