"""When to prune, and how much of the way by then.

A schedule speaks in fractions of the fit, steps or epochs; :meth:`Schedule.resolve` turns that into :class:`Event` s at
optimizer steps once the length of the fit is known. Step 0 is before the first training step, step n after n of them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from lightning_prune.errors import NoEvent

Unit = Literal["fit", "step", "epoch"]
Curve = Literal["linear", "cubic", "cosine"]


def linear(x: float) -> float:
    """Return ``x``, in [0, 1]: the same amount at each event."""
    return x


def polynomial(x: float, power: float) -> float:
    """Return ``1 - (1 - x)**power`` for x in [0, 1] (Zhu and Gupta, eq. 1): much at first, little at the end."""
    return float(1 - (1 - x) ** power)


def cubic(x: float) -> float:
    """Return ``1 - (1 - x)**3`` for x in [0, 1]."""
    return polynomial(x, 3)


def cosine(x: float) -> float:
    """Return ``(1 - cos(pi x)) / 2`` for x in [0, 1]: little at both ends."""
    return (1 - math.cos(math.pi * x)) / 2


CURVES: dict[Curve, Callable[[float], float]] = {"linear": linear, "cubic": cubic, "cosine": cosine}


@dataclass(frozen=True)
class Event:
    """One prune.

    Args:
        step: optimizer steps done before it, at least 0.
        progress: how much of the way to the budget is gone after it, in [0, 1].
    """

    step: int
    progress: float

    def __post_init__(self) -> None:
        if type(self.step) is not int or self.step < 0:
            raise ValueError(f"an event needs a step of at least 0, got {self.step!r}")
        if not 0 <= self.progress <= 1:
            raise ValueError(f"an event needs a progress in [0, 1], got {self.progress!r}")


class Schedule(ABC):
    """When to prune. A subclass says its points; where they fall in a fit is worked out here."""

    unit: Unit

    @abstractmethod
    def points(self) -> list[tuple[float, float]]:
        """Return (point in ``unit``, progress) of each event, both rising, the last progress 1."""

    def resolve(self, total_steps: int | None, steps_per_epoch: int | None) -> tuple[Event, ...]:
        """Turn the points into events; those that fall on one step become one, with the largest progress.

        A point becomes the nearest step. A fraction below 1 stays before the last step, however short the fit is.

        Args:
            total_steps: optimizer steps of the whole fit; None for a fit without an end.
            steps_per_epoch: optimizer steps of one epoch; None if unknown.

        Returns:
            Events with rising steps; progress never falls and ends at 1.

        Raises:
            NoEvent: if a point cannot be placed (a fraction of a fit without an end, an epoch of unknown length), or
                falls on or after the end of the fit, where no training step would follow.
        """
        progress_at: dict[int, float] = {}
        for point, progress in self.points():
            step = self._step(point, total_steps, steps_per_epoch)
            if total_steps is not None and step >= total_steps:
                raise NoEvent(
                    f"{self} has an event at step {step}, but the fit has {total_steps} steps "
                    "and at least one has to follow the last event; prune earlier or train longer"
                )
            progress_at[step] = max(progress, progress_at.get(step, 0.0))
        return tuple(Event(step, progress_at[step]) for step in sorted(progress_at))

    def _step(self, point: float, total_steps: int | None, steps_per_epoch: int | None) -> int:
        if self.unit == "step":
            return round(point)
        if self.unit == "epoch":
            if steps_per_epoch is None:
                raise NoEvent(f"{self} counts epochs, but an epoch has no known number of steps; use unit='step'")
            return round(point * steps_per_epoch)
        if total_steps is None:
            raise NoEvent(
                f"{self} counts fractions of the fit, but this fit has no end; use unit='step' or set max_steps"
            )
        step = round(point * total_steps)
        return min(step, max(total_steps - 1, 0)) if point < 1 else step


@dataclass(frozen=True)
class OneShot(Schedule):
    """Prune once, all the way.

    Args:
        at: when, in ``unit``.
        unit: ``"fit"``: fraction of the whole fit; ``"step"``, ``"epoch"``: a count (epochs may be fractional).
    """

    at: float = 0.5
    unit: Unit = "fit"

    def __post_init__(self) -> None:
        _check_unit(self.unit)
        _check_point("at", self.at, self.unit)

    def points(self) -> list[tuple[float, float]]:
        """Return the one point."""
        return [(self.at, 1.0)]


@dataclass(frozen=True)
class Iterative(Schedule):
    """Prune several times at equal distances; the first event prunes already.

    Event k of n, counted from 1, has progress ``curve(k / n)``.

    Args:
        start: first event, in ``unit``.
        end: last event (with ``every``: none later).
        every: distance of events in ``unit``, instead of ``events``.
        events: number of events; a single one comes at ``end``.
        unit: see :class:`OneShot`.
        curve: ``"linear"``, ``"cubic"`` or ``"cosine"``.
    """

    start: float = 0.1
    end: float = 0.7
    every: float | None = None
    events: int = 10
    unit: Unit = "fit"
    curve: Curve = "linear"

    def __post_init__(self) -> None:
        _check_span(self.start, self.end, self.events, self.every, self.unit)
        if self.curve not in CURVES:
            raise ValueError(f"curve must be one of {', '.join(CURVES)}, got {self.curve!r}")

    def points(self) -> list[tuple[float, float]]:
        """Return ``events`` points, or one every ``every``."""
        span = self.end - self.start
        if self.every is not None:
            count = 1 + _whole(span / self.every)
            places: Iterable[float] = (self.start + k * self.every for k in range(count))
        else:
            count = self.events
            places = (self.end - span * (count - k) / max(count - 1, 1) for k in range(1, count + 1))
        curve = CURVES[self.curve]
        return [(place, curve(k / count)) for k, place in enumerate(places, start=1)]


@dataclass(frozen=True)
class Gradual(Schedule):
    """Prune little by little along the curve of Zhu and Gupta, 2017 (eq. 1).

    Progress at t is ``1 - (1 - (t - start) / (end - start)) ** power``. The event at ``start`` itself would remove
    nothing, so the first one comes a distance later; the last one is always at ``end``.

    Args:
        start: where the curve begins, in ``unit``.
        end: last event.
        every: distance of events in ``unit``, instead of ``events``.
        events: number of events.
        power: of the curve; 3 in the paper.
        unit: see :class:`OneShot`.
    """

    start: float = 0.0
    end: float = 0.7
    every: float | None = None
    events: int = 20
    power: float = 3.0
    unit: Unit = "fit"

    def __post_init__(self) -> None:
        _check_span(self.start, self.end, self.events, self.every, self.unit)
        if self.start == self.end:
            raise ValueError(
                f"a gradual schedule needs start < end, got both {self.start!r}; use OneShot for one event"
            )
        _check_number("power", self.power)
        if self.power <= 0:
            raise ValueError(f"power must be above 0, got {self.power!r}")

    def points(self) -> list[tuple[float, float]]:
        """Return the points on the curve, the last one at ``end``."""
        span = self.end - self.start
        distance = self.every / span if self.every is not None else 1 / self.events
        # a last distance cut short by the end counts as an event of its own
        taus = [k * distance for k in range(1, math.ceil(1 / distance - 1e-9))]
        return [(self.start + tau * span, polynomial(tau, self.power)) for tau in taus] + [(self.end, 1.0)]


@dataclass(frozen=True)
class Updates(Schedule):
    """Do it again and again, all the way each time: for methods that revise what they chose.

    Events come at ``start`` and every ``every`` after it, before ``end``; closer together, but never more than one a
    step, where fewer than ``least`` would come.

    Args:
        every: distance of events, in ``unit``.
        unit: of ``every``: ``"step"``, ``"epoch"`` or ``"fit"``, a fraction of the whole fit.
        start: where events begin, as a fraction of the fit.
        end: where they stop, as a fraction of the fit.
        least: fewest events.
        closing: events close the distances instead: none at ``start``, one at ``end``, where that is the end of the
            fit after its last step.
    """

    every: float = 100
    unit: Unit = "step"
    start: float = 0.0
    end: float = 0.75
    least: int = 20
    closing: bool = False

    def __post_init__(self) -> None:
        _check_span(self.start, self.end, 1, self.every, "fit")
        _check_unit(self.unit)
        if self.start == self.end:
            raise ValueError(f"updates need start < end, got both {self.start!r}; use OneShot for one event")
        if type(self.least) is not int or self.least < 1:
            raise ValueError(f"least must be an int of at least 1, got {self.least!r}")
        if self.unit == "step" and self.every != round(self.every):
            raise ValueError(f"every must be a whole number of steps, got {self.every!r}")

    def points(self) -> list[tuple[float, float]]:
        """Return where events begin and stop, as fractions of the fit; how many lie between depends on its steps."""
        return [(self.start, 1.0), (self.end, 1.0)]

    def resolve(self, total_steps: int | None, steps_per_epoch: int | None) -> tuple[Event, ...]:
        """Turn the distances into events, all with progress 1.

        Raises:
            NoEvent: in a fit without an end, or of epochs of unknown length.
        """
        if total_steps is None:
            raise NoEvent(f"{self} stops at a fraction of the fit, but this fit has no end; set max_steps")
        begin, stop = round(self.start * total_steps), round(self.end * total_steps)
        if self.unit == "epoch" and steps_per_epoch is None:
            raise NoEvent(f"{self} counts epochs, but an epoch has no known number of steps; use unit='step'")
        lengths = {"step": 1, "epoch": steps_per_epoch or 0, "fit": total_steps}
        distance = max(1.0, min(self.every * lengths[self.unit], (stop - begin) / self.least))
        count = max(1, math.ceil((stop - begin) / distance - 1e-9))
        if self.closing:  # parts of a whole distance, so that its end, of an epoch say, stays an event
            whole = self.every * lengths[self.unit]
            distance = max(1.0, whole / math.ceil(whole / distance - 1e-9))
            count = max(1, math.ceil((stop - begin) / distance - 1e-9))
            steps = [begin + round(k * distance) for k in range(1, count)] + [max(stop, 1)]
        else:
            steps = [begin + round(k * distance) for k in range(count)]
        return tuple(Event(step, 1.0) for step in dict.fromkeys(steps))


@dataclass(frozen=True)
class Rounds(Schedule):
    """Prune at the end of each of several equal phases but the last, which is a whole one: rounds of train and prune.

    Event i of n, counted from 1, has progress ``i / n``. Phases are whole epochs where the fit has one for each of
    them; they differ by one epoch at most then, and none is longer than the last.

    Args:
        events: rounds, where as many fit; fewer where a phase would be too short, but always one.
        epochs: a phase is too short with fewer epochs than this,
        steps: or with fewer optimizer steps than this, where that is less.
    """

    events: int = 11
    epochs: float = 5.0
    steps: int = 1000
    unit: Unit = field(default="fit", init=False)

    def __post_init__(self) -> None:
        for name in ("events", "steps"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        _check_number("epochs", self.epochs)
        if self.epochs <= 0:
            raise ValueError(f"epochs must be above 0, got {self.epochs!r}")

    def points(self) -> list[tuple[float, float]]:
        """Return the ends of phases as fractions of a fit in which all of them fit."""
        return [(i / (self.events + 1), i / self.events) for i in range(1, self.events + 1)]

    def resolve(self, total_steps: int | None, steps_per_epoch: int | None) -> tuple[Event, ...]:
        """Turn the phases into events.

        Raises:
            NoEvent: in a fit without an end, or without a step.
        """
        if not total_steps:
            why = "has no end; set max_steps" if total_steps is None else "has no step"
            raise NoEvent(f"{self} divides the fit into phases, but this fit {why}")
        per_epoch = steps_per_epoch or total_steps
        shortest = max(1.0, min(self.epochs * per_epoch, self.steps))
        rounds = max(1, min(self.events, _whole(total_steps / shortest) - 1))
        size = per_epoch if total_steps >= (rounds + 1) * per_epoch else 1
        blocks = total_steps // size
        return tuple(Event(i * blocks // (rounds + 1) * size, i / rounds) for i in range(1, rounds + 1))


def _whole(count: float) -> int:
    """Round down, forgiving what division lost: (0.7 - 0.1) / 0.2 is 2.9999999999999996."""
    return math.floor(count + 1e-9)


def _check_unit(unit: str) -> None:
    if unit not in get_args(Unit):
        raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}, got {unit!r}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def _check_point(name: str, value: float, unit: Unit) -> None:
    _check_number(name, value)
    if unit == "fit" and not 0 <= value <= 1:
        raise ValueError(
            f"{name} must be in [0, 1], a fraction of the fit, got {value!r}; for a count give unit='step' or 'epoch'"
        )
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
    if unit == "step" and value != round(value):
        raise ValueError(f"{name} must be a whole number of steps, got {value!r}")


def _check_span(start: float, end: float, events: int, every: float | None, unit: Unit) -> None:
    _check_unit(unit)
    _check_point("start", start, unit)
    _check_point("end", end, unit)
    if start > end:
        raise ValueError(f"start must not be after end, got start {start!r} and end {end!r}")
    if type(events) is not int or events < 1:
        raise ValueError(f"events must be an int of at least 1, got {events!r}")
    if every is not None:
        _check_number("every", every)
        if every <= 0:
            raise ValueError(f"every must be above 0, got {every!r}")


def at_a_time(what: str, count: int, updates: int, at_once: int) -> Iterative:
    """So many units after every so many optimizer steps, until a count is gone.

    Args:
        what: the count's name, for the error.
        count: units in all; ``Budget(keep, of="units")`` takes the same number each time.
        updates: optimizer steps between two events.
        at_once: units an event.

    Raises:
        ValueError: if one of them is below 1.
    """
    for name, value in ((what, count), ("updates", updates), ("at_once", at_once)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    return Iterative(start=updates, end=updates * math.ceil(count / at_once), every=updates, unit="step")
