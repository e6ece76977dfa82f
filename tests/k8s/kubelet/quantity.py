"""PURE: amounts of resources as Kubernetes writes them ("500m", "2Gi")."""

from __future__ import annotations

from fractions import Fraction

_UNITS = {
    **{
        unit: Fraction(1024) ** (power + 1) for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))
    },
    **{unit: Fraction(1000) ** (power + 1) for power, unit in enumerate("kMGTPE")},
    "m": Fraction(1, 1000),
    "u": Fraction(1, 1000**2),
    "n": Fraction(1, 1000**3),
}


def amount(text: str | int) -> Fraction:
    """The number that it stands for. Raises `ValueError`."""
    text = str(text).strip()
    for unit in sorted(_UNITS, key=len, reverse=True):
        if text.endswith(unit):
            return Fraction(text.removesuffix(unit)) * _UNITS[unit]
    return Fraction(text)
