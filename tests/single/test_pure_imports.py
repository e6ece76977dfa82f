"""PURE modules compute and decide; they do no I/O, know no clock, no randomness and no threads.

A module is PURE if it is listed here or its docstring begins with "PURE:"; so does everything in a
package whose `__init__` says so.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOTS = {"ringps": Path("ringps"), "ringps_launcher": Path("launcher/ringps_launcher")}
REPOSITORY = Path(__file__).resolve().parents[2]

PURE_PACKAGES = ("ringps.ring", "ringps.wire")
PURE_MODULES = (
    "ringps.buckets.layout",
    "ringps.data.assignment",
    "ringps.membership.causes",
    "ringps.membership.detector",
    "ringps.membership.events",
    "ringps.membership.inquiry",
    "ringps.membership.plan",
    "ringps.membership.quorum",
    "ringps.membership.roster",
    "ringps.transport.tcp_handshake",
    "ringps_launcher.job",
    "ringps_launcher.lines",
    "ringps_launcher.plan",
    "ringps_launcher.restart",
)

DATA_TOOLS = {
    "__future__", "abc", "bisect", "collections", "copy", "dataclasses", "enum", "fractions", "functools",
    "hashlib", "heapq", "hmac", "itertools", "json", "math", "operator", "re", "statistics", "string",
    "struct", "textwrap", "types", "typing", "zlib",
}  # fmt: skip
VALUES = {"ringps.errors", "ringps.config", "ringps.worker_env"}
"""Not PURE modules, but what is taken from them are exceptions, settings and other plain values."""
EXCEPTIONS = {
    "ringps.wire.control": {"msgpack"},
    "ringps_launcher.outcome": {"signal"},
    "ringps_launcher.restart": {"signal"},
}
"""An encoder of bytes, and the numbers and names of signals."""
IO_BUILTINS = {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}


def modules() -> dict[str, Path]:
    """Every module of both packages, by its dotted name."""
    found = {}
    for name, root in ROOTS.items():
        for path in sorted((REPOSITORY / root).rglob("*.py")):
            parts = path.relative_to(REPOSITORY / root).with_suffix("").parts
            found[".".join([name, *parts]).removesuffix(".__init__")] = path
    return found


def says_pure(path: Path) -> bool:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    return docstring is not None and docstring.startswith("PURE:")


MODULES = modules()
PACKAGES = {
    *PURE_PACKAGES,
    *(name for name, path in MODULES.items() if path.name == "__init__.py" and says_pure(path)),
}
PURE = {
    name
    for name, path in MODULES.items()
    if name in PURE_MODULES
    or says_pure(path)
    or any(name == package or name.startswith(f"{package}.") for package in PACKAGES)
}


def offences(name: str, source: str) -> list[str]:
    """What a PURE module called `name` must not do."""
    allowed = DATA_TOOLS | EXCEPTIONS.get(name, set())
    found = []
    for node in ast.walk(ast.parse(source)):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute here"
            origin = node.module or ""
            # `from package import x`: x may be a module of its own
            imported = [
                inner if (inner := f"{origin}.{alias.name}") in MODULES else origin for alias in node.names
            ]
        elif isinstance(node, ast.Name) and node.id in IO_BUILTINS:
            found.append(f"line {node.lineno} uses {node.id}")
        for module in imported:
            fine = module in PURE | VALUES or module.partition(".")[0] in allowed
            if not fine:
                found.append(f"line {node.lineno} imports {module}")
    return found


@pytest.mark.parametrize("name", [*PURE_PACKAGES, *PURE_MODULES])
def test_listed_modules_are_there(name: str) -> None:
    assert name in MODULES, f"{name} is listed here as PURE but is gone; was it renamed?"


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_only_compute(name: str) -> None:
    found = offences(name, MODULES[name].read_text())
    assert not found, f"{name} is PURE, but {'; '.join(found)}"


@pytest.mark.parametrize(
    "line",
    [
        "import time",
        "import os.path",
        "from random import random",
        "def f():\n    import socket",
        "from ringps.transport import keys",
        "from ringps import collectives",
        "import torch, json",
        "open('x')",
        "__import__('threading')",
    ],
)
def test_the_check_notices(line: str) -> None:
    assert offences("ringps.ring.example", line)


@pytest.mark.parametrize(
    "line", ["import collections.abc", "from ringps import errors", "from ringps.ring.topology import Member"]
)
def test_the_check_allows(line: str) -> None:
    assert not offences("ringps.ring.example", line)
