"""Costs before and after a prune -> dict, Markdown, JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Protocol


class Cost(Protocol):
    """What a report needs of a cost; flops are of one sample, one multiply-accumulate is one flop."""

    @property
    def flops(self) -> int:
        """Of one sample."""

    @property
    def params(self) -> int:
        """Elements of all parameters."""

    @property
    def by_layer(self) -> Mapping[str, object]:
        """Layer name -> its part, in data-flow order."""


@dataclass(frozen=True)
class Report:
    """What a prune removed, what it left alone and why, and what that saved.

    Attributes:
        before: cost of the model as it came.
        after: cost of the model as it is now.
        groups: group name -> (channels kept, channels of the dense model), in data-flow order.
        removed: parameter name -> dimension -> number of indices cut there.
        frozen: what could not be pruned -> the reason.
        rows: one mapping per event of a run, as it was logged; empty without a run.
        seconds: that scoring and cutting took.
    """

    before: Cost
    after: Cost
    groups: Mapping[str, tuple[int, int]]
    removed: Mapping[str, Mapping[int, int]]
    frozen: Mapping[str, str]
    rows: tuple[Mapping[str, object], ...] = ()
    seconds: float = 0.0

    @property
    def flops_kept(self) -> float:
        """Fraction of the flops that is left; 1.0 of none."""
        return _fraction(self.after.flops, self.before.flops)

    @property
    def params_kept(self) -> float:
        """Fraction of the parameters that is left; 1.0 of none."""
        return _fraction(self.after.params, self.before.params)

    def to_dict(self) -> dict[str, object]:
        """All of it in dicts, lists, strings and numbers, so that ``json.dumps`` takes it.

        JSON has no integer keys, so the dimensions in ``removed`` are strings.
        """
        return {
            "before": _cost_dict(self.before),
            "after": _cost_dict(self.after),
            "flops_kept": self.flops_kept,
            "params_kept": self.params_kept,
            "groups": {name: {"kept": kept, "dense": dense} for name, (kept, dense) in self.groups.items()},
            "removed": {name: {str(dim): n for dim, n in dims.items()} for name, dims in self.removed.items()},
            "frozen": dict(self.frozen),
            "rows": _plain(self.rows),
            "seconds": self.seconds,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as standard JSON: a number that is not finite, which JSON has no word for, becomes null."""
        return json.dumps(finite(self.to_dict()), indent=indent, allow_nan=False)

    def to_markdown(self) -> str:
        """Up to four tables: cost, channels per group, events, and what is frozen; empty ones are left out.

        The events leave out the columns of single groups, ``prune/channels/<group>``; `rows` has them.
        """
        cost = [
            {"": "flops", "before": self.before.flops, "after": self.after.flops, "kept": self.flops_kept},
            {"": "params", "before": self.before.params, "after": self.after.params, "kept": self.params_kept},
        ]
        groups = [
            {"group": name, "dense": dense, "kept": kept, "removed": dense - kept}
            for name, (kept, dense) in self.groups.items()
        ]
        frozen = [{"frozen": name, "reason": reason} for name, reason in self.frozen.items()]
        events = [{key: value for key, value in row.items() if key.count("/") < 2} for row in self.rows]
        return "\n\n".join(markdown_table(rows) for rows in (cost, groups, events, frozen) if rows)

    def __str__(self) -> str:
        return self.to_markdown()


def markdown_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """Lay rows out as a Markdown table that reads well as plain text too.

    Integers get thousands separators, floats four significant digits; columns of numbers are set to the right. A value
    a row does not have, or that is None, is an empty cell.

    Args:
        rows: one mapping per line.
        columns: which keys to show, in that order; all of them in order of first appearance if None.

    Returns:
        Header, rule and one line per row, without a newline at the end; the empty string if there is no column.

    Example:
        >>> print(markdown_table([{"layer": "conv1", "flops": 36864}, {"layer": "fc", "flops": 640, "kept": 0.5}]))
        | layer |  flops | kept |
        | :---- | -----: | ---: |
        | conv1 | 36,864 |      |
        | fc    |    640 |  0.5 |
    """
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return ""
    laid_out = [_column(name, [row.get(name) for row in rows]) for name in columns]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in zip(*laid_out, strict=True))


def _column(name: str, values: Sequence[object]) -> list[str]:
    """Header, rule and cells of one column, all of one width."""
    present = [value for value in values if value is not None]
    numeric = bool(present) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in present)
    cells = [_cell(text) for text in (name, *values)]
    width = max(3, *map(len, cells))
    rule = "-" * (width - 1)
    header, *body = [cell.rjust(width) if numeric else cell.ljust(width) for cell in cells]
    return [header, f"{rule}:" if numeric else f":{rule}", *body]


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        case _:
            return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _fraction(after: int, before: int) -> float:
    return after / before if before else 1.0


def _cost_dict(cost: Cost) -> dict[str, object]:
    return {"flops": cost.flops, "params": cost.params, "by_layer": _plain(cost.by_layer)}


def _plain(value: object) -> object:
    """Mappings and dataclasses as dicts with string keys, sequences as lists, what JSON does not know as its text."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    match value:
        case Mapping():
            return {str(key): _plain(inner) for key, inner in value.items()}
        case str() | bool() | int() | float() | None:
            return value
        case Sequence():
            return [_plain(inner) for inner in value]
        case _:
            return str(value)


def finite(value: object) -> object:
    """Dicts and lists with None for each number that is not finite, which JSON has no word for."""
    match value:
        case dict():
            return {key: finite(inner) for key, inner in value.items()}
        case list():
            return [finite(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value
