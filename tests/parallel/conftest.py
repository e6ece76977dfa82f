"""Every test here is checked for leftovers."""

from tests.leftovers import no_leftovers

__all__ = ["no_leftovers"]
