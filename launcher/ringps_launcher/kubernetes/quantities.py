"""PURE: Kubernetes quantities, such as `500m` or `2Gi`, as exact numbers.

The format: https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
"""

from __future__ import annotations

import re
from fractions import Fraction

_SUFFIXES = {
    "": Fraction(1),
    **{suffix: Fraction(10) ** power for suffix, power in zip("num", (-9, -6, -3), strict=True)},
    **{suffix: Fraction(1000) ** power for power, suffix in enumerate("kMGTPE", 1)},
    **{f"{suffix}i": Fraction(1024) ** power for power, suffix in enumerate("KMGTPE", 1)},
}
_FORM = re.compile(
    r"(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+))(?:[eE](?P<power>[+-]?\d{1,2})|(?P<suffix>[numkMGTPE]|[KMGTPE]i)?)",
    re.ASCII,
)


def parse(text: str) -> Fraction:
    """The number that `text` stands for: cores, bytes, or whatever the resource counts.

    Raises:
        ValueError: it is no quantity.
    """
    form = _FORM.fullmatch(text)
    if form is None:
        raise ValueError(f"{text!r} is no Kubernetes quantity such as 500m, 2 or 1.5Gi")
    power = int(form["power"] or 0)
    return Fraction(form["number"]) * Fraction(10) ** power * _SUFFIXES[form["suffix"] or ""]


def count(text: str) -> Fraction:
    """A quantity above zero.

    Raises:
        ValueError: it is no quantity, or not above zero.
    """
    value = parse(text)
    if value <= 0:
        raise ValueError(f"{text!r} must be above zero")
    return value
