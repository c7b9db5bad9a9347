"""What may be kept in the end, and whether a cost fits: ``Budget(0.5)``, ``Budget(keep=0.1, of="units")``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, get_args

Of = Literal["flops", "params", "units", "latency"]


@dataclass(frozen=True)
class Budget:
    """A fraction of the dense model at fit start that may be kept.

    Args:
        keep: in (0, 1].
        of: what it is a fraction of; None for what is usual: flops for channels and ranks, units for weights.

    Raises:
        ValueError: if either is something else.

    Example:
        >>> Budget(0.29, of="units").fits(29, 100), Budget(0.29, of="units").fits(30, 100)
        (True, False)
    """

    keep: float
    of: Of | None = None

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float):
            raise ValueError(f"keep must be a number in (0, 1], got {self.keep!r} of type {type(self.keep).__name__}")
        if not 0 < self.keep <= 1:  # also refuses NaN
            raise ValueError(f"keep must be in (0, 1], the fraction of the dense model that stays, got {self.keep!r}")
        if self.of is not None and self.of not in get_args(Of):
            raise ValueError(f"of must be one of {', '.join(get_args(Of))}, got {self.of!r}")
        object.__setattr__(self, "keep", float(self.keep))

    @classmethod
    def of_any(cls, value: "Budget | float | Mapping[str, Any]") -> "Budget":
        """Make a budget of a fraction or of ``{"keep": ..., "of": ...}``; a budget stays as it is.

        Raises:
            ValueError: if it is none of these, or the value is no budget.
        """
        if isinstance(value, Budget):
            return value
        if not isinstance(value, Mapping):
            return cls(value)
        if "keep" not in value or value.keys() - {"keep", "of"}:
            raise ValueError(f"a budget is a fraction or {{'keep': 0.5, 'of': 'flops'}}, got {dict(value)!r}")
        return cls(value["keep"], value.get("of"))

    def resolved(self, default: Of) -> "Budget":
        """Return the same budget with ``of`` set, to ``default`` where it was left open."""
        return self if self.of is not None else replace(self, of=default)

    def at(self, progress: float) -> "Budget":
        """Return the budget that holds at ``progress`` in [0, 1] of the way: ``1 - progress * (1 - keep)`` is kept.

        Raises:
            ValueError: if progress is outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be in [0, 1], got {progress!r}")
        if progress == 1:
            return self  # 1 - (1 - keep) may differ from keep in the last bit
        there = replace(self, keep=max(self.keep, 1 - progress * (1 - self.keep)))
        # a third of the way is a third, so that counts are not lost to its last binary digit
        exact = 1 - Fraction(progress).limit_denominator(10**9) * (1 - self._written)
        vars(there)["_written"] = max(self._written, exact)
        return there

    def fits(self, kept: float, dense: float) -> bool:
        """Say whether ``kept`` of ``dense`` is within the budget.

        Integers are compared exactly with ``keep`` as it is written (29 of 100 fits 0.29, although ``0.29 * 100`` is
        below 29 in floating point); other numbers with a relative tolerance of 1e-12 for rounding. NaN never fits.
        """
        if isinstance(kept, int) and isinstance(dense, int):
            return kept * self._written.denominator <= self._written.numerator * dense
        return kept <= self.keep * dense * (1 + 1e-12)

    def limit(self, dense: int) -> int:
        """Return the largest count that fits ``dense``: the exact count for units."""
        return math.floor(self._written * dense)

    @cached_property
    def _written(self) -> Fraction:
        return Fraction(repr(self.keep))
