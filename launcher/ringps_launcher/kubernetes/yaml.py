"""Objects of Kubernetes as YAML, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

_PLAIN = re.compile(r"-{0,2}[A-Za-z/][-\w./:@$()]*", re.ASCII)
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
_ODD_BREAKS = re.compile("[\r\x85\u2028\u2029]")


class _Dumper(yaml.SafeDumper):
    """Without anchors, which readers of manifests do not expect."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Quoted where any reader might see something else than text: PyYAML leaves `1e3` and `y` bare, which
    kubectl takes for a number and a boolean.
    """
    if "\n" in text and not _ODD_BREAKS.search(text):
        style = "|"
    else:
        style = "" if _PLAIN.fullmatch(text) and text.lower() not in _WORDS else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(manifests: Iterable[Mapping[str, Any]]) -> str:
    """Documents in their order, keys in theirs; the same objects give the same text."""
    return "".join(
        "---\n" + yaml.dump(dict(manifest), Dumper=_Dumper, sort_keys=False, width=2**20, allow_unicode=True)
        for manifest in manifests
    )


def from_yaml(text: str) -> list[dict[str, Any]]:
    """The documents in `text`, but for empty ones.

    Raises:
        ValueError: it is not YAML, or a document is not an object.
    """
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        raise ValueError(f"this is not YAML{where}: {getattr(error, 'problem', None) or error}") from None
    for number, document in enumerate(documents, 1):
        if not isinstance(document, dict):
            raise ValueError(f"document {number} is not a Kubernetes object")
    return documents
