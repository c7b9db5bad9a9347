"""The whole decision of a prune as one frozen value: what is kept of every tensor, by channel or by entry.

A :class:`Plan` always speaks about the **dense** model, also when half of it has been cut already;
:meth:`Plan.relative_to` turns two such plans into the indices that one more cut needs. It can be compared, merged,
hashed, saved and replayed, and holds nothing but names, numbers and CPU tensors.
"""

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor

from lightning_prune.errors import IncompatibleCheckpoint

FORMAT_VERSION = 1
_SECTIONS = ("kept", "masks", "buffers", "shapes", "attributes", "groups", "ranks")
_MERGE_ADVICE = "make the second plan from what the first one keeps"
_BITS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
_LARGEST = 2**63 - 1  # what an int64 index can address

_V = TypeVar("_V")


@dataclass(frozen=True, eq=False)
class Plan:
    """What to keep of a model; every index and shape is of the dense model.

    Args:
        kept: parameter name -> {dim: (n,) sorted, unique int64 indices that stay}, at least one per dim.
        masks: parameter name -> bool tensor of the parameter's dense shape, True = keep.
        buffers: as ``kept``, for buffers (BatchNorm statistics, index tables).
        shapes: dense shape of every tensor that ``kept``, ``masks`` or ``buffers`` names; shapes of others are dropped.
        attributes: module name -> {attribute: its value after the cut}, such as
            ``{"layer1.0.conv1": {"out_channels": 12, "groups": 1}}``.
        groups: group name -> (channels kept, channels of the dense model).
        ranks: layer name -> rank kept.

    Tensors are copied to the CPU and all mappings are read-only, so that a plan never changes after it was made.

    Raises:
        ValueError: if a tensor, shape or count is not as described; the message names it.

    Example:
        >>> plan = Plan(kept={"fc.weight": {0: torch.tensor([0, 2])}}, shapes={"fc.weight": (4, 3)})
        >>> plan.current_shape("fc.weight"), plan.density
        ((2, 3), 0.5)
    """

    kept: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]] = field(default_factory=dict)
    groups: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = {*self.kept, *self.masks, *self.buffers}
        if missing := sorted(named - set(self.shapes)):
            raise ValueError(f"plan names tensor {missing[0]!r} without its dense shape; add it to shapes=")
        if twice := sorted(set(self.buffers) & {*self.kept, *self.masks}):
            raise ValueError(f"plan names {twice[0]!r} both as parameter and as buffer; it can only be one of them")
        shapes = {name: _checked_shape(name, shape) for name, shape in self.shapes.items() if name in named}
        object.__setattr__(self, "shapes", MappingProxyType(shapes))
        known: dict[tuple[int, int], Tensor] = {}  # many tensors have their indices in common
        for section in ("kept", "buffers"):
            entries: Mapping[str, Mapping[int, Tensor]] = getattr(self, section)
            checked = {
                name: MappingProxyType(
                    {dim: _checked_once(name, dim, index, shapes[name], known) for dim, index in dims.items()}
                )
                for name, dims in entries.items()
            }
            object.__setattr__(self, section, MappingProxyType(checked))
        masks = {name: _checked_mask(name, mask, shapes[name]) for name, mask in self.masks.items()}
        object.__setattr__(self, "masks", MappingProxyType(masks))
        attributes = {
            module: MappingProxyType({key: _checked_attribute(module, key, value) for key, value in values.items()})
            for module, values in self.attributes.items()
        }
        object.__setattr__(self, "attributes", MappingProxyType(attributes))
        groups = {name: _checked_group(name, counts) for name, counts in self.groups.items()}
        object.__setattr__(self, "groups", MappingProxyType(groups))
        for name, rank in self.ranks.items():
            if type(rank) is not int or rank < 1:
                raise ValueError(f"rank of layer {name!r} must be an int of at least 1, got {rank!r}")
        object.__setattr__(self, "ranks", MappingProxyType(dict(self.ranks)))

    @classmethod
    def _of_valid(
        cls,
        kept: Mapping[str, Mapping[int, Tensor]],
        buffers: Mapping[str, Mapping[int, Tensor]],
        shapes: Mapping[str, tuple[int, ...]],
        attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]],
        groups: Mapping[str, tuple[int, int]],
    ) -> "Plan":
        """Make a plan of what is known to be as `Plan` describes it, unchecked.

        Its tensors are not copied, so nobody may change them. Checking a thousand short index tensors takes longer
        than all else a plan is made of.
        """
        plan = object.__new__(cls)
        nested: tuple[tuple[str, Mapping[str, Mapping[Any, Any]]], ...]
        nested = ("kept", kept), ("buffers", buffers), ("attributes", attributes)
        for section, entries in nested:
            object.__setattr__(
                plan, section, MappingProxyType({name: MappingProxyType(dict(v)) for name, v in entries.items()})
            )
        named = {name: shape for name, shape in shapes.items() if name in kept or name in buffers}
        flat: dict[str, Mapping[str, Any]] = {"shapes": named, "groups": groups, "masks": {}, "ranks": {}}
        for section, values in flat.items():
            object.__setattr__(plan, section, MappingProxyType(dict(values)))
        return plan

    def __reduce__(self) -> tuple[Any, ...]:
        # read-only mappings cannot be pickled; a plan travels to worker processes as its parts
        return _from_parts, tuple(_plain(getattr(self, section)) for section in _SECTIONS)

    def __copy__(self) -> "Plan":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plan":
        return self

    def __eq__(self, other: object) -> bool:
        """Whether both say the same; the order in which tensors are named does not count."""
        if not isinstance(other, Plan):
            return NotImplemented
        if self is other:
            return True
        short = ("shapes", "attributes", "groups", "ranks")  # where plans differ, mostly one of these differs
        return all(getattr(self, s) == getattr(other, s) for s in short) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def digest(self) -> str:
        """Return a SHA-256 hex digest of the plan, the same in every process and on every machine."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def digests(self) -> dict[str, int]:
        """Return for each name that the plan speaks of a number of 62 bits that tells different decisions apart."""
        said: dict[str, list[bytes]] = {}
        for section in (self.kept, self.buffers):
            for name, dims in section.items():
                for dim, index in dims.items():
                    said.setdefault(name, []).append(f"{dim}:".encode() + index.numpy().tobytes())
        for name, mask in self.masks.items():
            said.setdefault(name, []).append(_packed(mask).numpy().tobytes())
        for counts in (self.groups, self.ranks):
            for name, count in counts.items():
                said.setdefault(name, []).append(repr(count).encode())
        return {
            name: int.from_bytes(hashlib.sha256(b"/".join(parts)).digest()[:8], "big") >> 2
            for name, parts in said.items()
        }

    @property
    def is_empty(self) -> bool:
        """Whether the plan names nothing at all."""
        return not any(getattr(self, section) for section in _SECTIONS)

    @property
    def density(self) -> float:
        """Entries kept / entries of the dense model, over all tensors in ``kept`` and ``masks``; 1 if there are none.

        A masked entry that is also cut counts as gone once.
        """
        names = {*self.kept, *self.masks}
        dense = sum(math.prod(self.shapes[name]) for name in names)
        return sum(self._entries_kept(name) for name in names) / dense if dense else 1.0

    def _entries_kept(self, name: str) -> int:
        if name in self.masks:
            return int(self.mask_now(name).sum())
        return math.prod(self.current_shape(name))

    def current_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that tensor ``name`` has after the cut.

        Raises:
            ValueError: if the plan does not name the tensor.
        """
        if name not in self.shapes:
            raise ValueError(f"the plan says nothing about tensor {name!r}")
        dims = self._dims(name)
        return tuple(dims[dim].shape[0] if dim in dims else size for dim, size in enumerate(self.shapes[name]))

    def mask_now(self, name: str) -> Tensor:
        """Return the mask of parameter ``name`` in the shape that the parameter has after the cut.

        Raises:
            ValueError: if the plan does not mask the parameter.
        """
        if name not in self.masks:
            raise ValueError(f"the plan has no mask for parameter {name!r}")
        mask = self.masks[name].clone()
        for dim, index in self._dims(name).items():
            mask = mask.index_select(dim, index)
        return mask

    def _dims(self, name: str) -> Mapping[int, Tensor]:
        return self.kept.get(name) or self.buffers.get(name) or {}

    def relative_to(self, previous: "Plan") -> dict[str, dict[int, Tensor]]:
        """Say where what this plan keeps lies inside what an earlier plan has kept.

        Args:
            previous: the plan that the tensors have been cut to; ``Plan()`` for the dense model.

        Returns:
            By parameter or buffer name, where something goes only: ``{dim: (n,) positions}`` for ``index_select`` on
            the tensor as it is now.

        Raises:
            ValueError: if this plan keeps an index that the earlier one has removed, or the dense shapes differ; the
                message names the tensor.
        """
        known = vars(self).get("_last_relative")  # a cut asks more than once, and it takes a while
        if known is None or known[0]() is not previous:
            known = self._remember_relative(previous, self._positions(previous))
        return {name: dict(dims) for name, dims in known[1].items()}

    def _remember_relative(self, previous: "Plan", positions: dict[str, dict[int, Tensor]]) -> tuple[Any, ...]:
        """Note what `relative_to` finds, for the time that the earlier plan is held elsewhere."""
        vars(self)["_last_relative"] = ref(previous), positions
        found: tuple[Any, ...] = vars(self)["_last_relative"]
        return found

    def _positions(self, previous: "Plan") -> dict[str, dict[int, Tensor]]:
        _check_same_shapes(previous, self)
        positions: dict[str, dict[int, Tensor]] = {}
        known: dict[tuple[int, int, int], tuple[int | None, Tensor | None]] = {}  # many dims share their indices
        for name in dict.fromkeys([*self.kept, *self.buffers, *previous.kept, *previous.buffers]):
            now, then = self._dims(name), previous._dims(name)
            for dim in sorted({*now, *then}):
                index, within, size = now.get(dim), then.get(dim), (self.shapes.get(name) or previous.shapes[name])[dim]
                same = id(index), id(within), size
                if same not in known:
                    known[same] = _first_missing(index, within, size), _places(index, within, size)
                lost, places = known[same]
                if lost is not None:
                    raise ValueError(
                        f"plan keeps index {lost} of dim {dim} of {name!r}, which an earlier cut has removed; "
                        "a later plan of a run can only keep less"
                    )
                if places is not None:
                    positions.setdefault(name, {})[dim] = places
        return positions

    def merge(self, other: "Plan") -> "Plan":
        """Keep only what both plans keep; both speak about the same dense model.

        Kept indices are intersected, masks are joined by AND. Counts that cannot be intersected (module attributes,
        groups, ranks) are taken from the plan that keeps less, which has to be clear: where a module has attributes,
        one plan's indices contain the other's.

        Raises:
            ValueError: if dense shapes or group sizes differ, if nothing would be left of a dim, or if it is not clear
                which plan keeps less of a tensor; the message names the tensor or group.
        """
        _check_same_shapes(self, other)
        both = _Pair(self, other)
        masks = {**self.masks, **other.masks}
        for name in self.masks.keys() & other.masks.keys():
            masks[name] = self.masks[name] & other.masks[name]
        ranks = {**self.ranks, **other.ranks}
        for name in self.ranks.keys() & other.ranks.keys():
            ranks[name] = min(self.ranks[name], other.ranks[name])
        return Plan(
            kept=_intersection(self.kept, other.kept),
            masks=masks,
            buffers=_intersection(self.buffers, other.buffers),
            shapes={**self.shapes, **other.shapes},
            attributes=both.attributes(),
            groups=both.groups(),
            ranks=ranks,
        )

    def summary(self) -> str:
        """Return a short text: channels kept per group, density per mask, rank per layer."""
        lines = [f"{len(self.kept)} parameters cut, {len(self.masks)} masked, density {self.density:.4f}"]
        rows = {
            "channels": {name: f"{count} / {of}" for name, (count, of) in self.groups.items()},
            "mask density": {name: f"{_mean(self.mask_now(name)):.4f}" for name in self.masks},
            "rank": {name: str(rank) for name, rank in self.ranks.items()},
        }
        for title, section in rows.items():
            if section:
                width = max(len(name) for name in section)
                lines += [f"{title}:", *(f"  {name:<{width}}  {text}" for name, text in section.items())]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as numbers, strings, lists and dicts for JSON; masks are base64 of packed bits."""
        return self._encoded(
            Tensor.tolist, lambda mask: base64.b64encode(bytes(_packed(mask).tolist())).decode("ascii")
        )

    @classmethod
    def from_dict(cls, data: object) -> "Plan":
        """Make the plan that :meth:`to_dict` described.

        Raises:
            IncompatibleCheckpoint: if ``data`` is not such a description; it may come from anywhere, and sizes and
                indices are checked before memory is taken for them.
        """
        return _decoded(data, _indices_of_list, _mask_of_text)

    def state_dict(self) -> dict[str, Any]:
        """Return the plan as tensors, numbers, strings, lists and dicts, which ``torch.load(weights_only=True)`` reads.

        Indices are int64 tensors, masks are uint8 tensors of packed bits. Equal indices are one tensor, which a file
        then holds once: writing and reading one takes as long for eight numbers as for a thousand.
        """
        made: dict[bytes, Tensor] = {}

        def copied(index: Tensor) -> Tensor:
            content = index.numpy().tobytes()
            if content not in made:
                made[content] = index.clone()
            return made[content]

        return self._encoded(copied, _packed)

    @classmethod
    def from_state_dict(cls, state: object) -> "Plan":
        """Make the plan that :meth:`state_dict` described.

        Raises:
            IncompatibleCheckpoint: as :meth:`from_dict`.
        """
        return _decoded(state, _indices_of_tensor, _mask_of_tensor)

    def _encoded(self, encode: Callable[[Tensor], Any], encode_mask: Callable[[Tensor], Any]) -> dict[str, Any]:
        def indices(entries: Mapping[str, Mapping[int, Tensor]]) -> dict[str, dict[str, Any]]:
            return {name: {str(dim): encode(index) for dim, index in dims.items()} for name, dims in entries.items()}

        return {
            "version": FORMAT_VERSION,
            "kept": indices(self.kept),
            "masks": {name: encode_mask(mask) for name, mask in self.masks.items()},
            "buffers": indices(self.buffers),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "attributes": {
                module: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
                for module, values in self.attributes.items()
            },
            "groups": {name: list(counts) for name, counts in self.groups.items()},
            "ranks": dict(self.ranks),
        }

    def save(self, path: str | Path) -> None:
        """Write the plan to ``path`` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan that :meth:`save` wrote.

        Raises:
            IncompatibleCheckpoint: if the file holds no plan.
            OSError: if the file cannot be read.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_bytes()))
        except (ValueError, RecursionError) as error:
            raise IncompatibleCheckpoint(f"{str(path)!r} is not a plan in JSON: {error}") from error
        except IncompatibleCheckpoint as error:
            raise IncompatibleCheckpoint(f"{str(path)!r}: {error}") from error


class _Pair:
    """Two plans about to be merged, and the answer to which of them keeps less of what."""

    def __init__(self, first: Plan, second: Plan) -> None:
        self.first, self.second = first, second
        self.crossing: dict[str, int] = {}  # tensor -> dim of which each plan keeps something the other removes
        self.less_in: tuple[dict[str, int], dict[str, int]] = ({}, {})  # tensor -> dim of which one plan keeps less
        for name in {*first.kept, *first.buffers, *second.kept, *second.buffers}:
            for dim in {*first._dims(name), *second._dims(name)}:
                self._compare(name, dim)

    def _compare(self, name: str, dim: int) -> None:
        shape = self.first.shapes.get(name) or self.second.shapes[name]
        a, b = self.first._dims(name).get(dim), self.second._dims(name).get(dim)
        first_keeps_less = _first_missing(b, a, shape[dim]) is not None
        second_keeps_less = _first_missing(a, b, shape[dim]) is not None
        if first_keeps_less and second_keeps_less:
            self.crossing[name] = dim
        if first_keeps_less:
            self.less_in[0][name] = dim
        if second_keeps_less:
            self.less_in[1][name] = dim

    def attributes(self) -> dict[str, dict[str, int | tuple[int, ...]]]:
        first, second = self.first.attributes, self.second.attributes
        merged = {module: {**first.get(module, {}), **second.get(module, {})} for module in {**first, **second}}
        for name in sorted(self.crossing):
            if module := next((m for m in _modules_of(name) if m in merged), None):
                raise self._unclear(name, f"attributes of module {module!r}")
        first_less, second_less = ({m: name for name in less for m in _modules_of(name)} for less in self.less_in)
        for module in first.keys() & second.keys():
            for key in first[module].keys() & second[module].keys():
                if first[module][key] == second[module][key] or module not in first_less:
                    continue
                if module in second_less:
                    raise ValueError(
                        f"cannot merge plans: one keeps less of {first_less[module]!r}, the other less of "
                        f"{second_less[module]!r}, and they differ in {key!r} of module {module!r}: "
                        f"{first[module][key]} and {second[module][key]}; {_MERGE_ADVICE}"
                    )
                merged[module][key] = first[module][key]
        return merged

    def _unclear(self, tensor: str, what: str) -> ValueError:
        return ValueError(
            f"cannot merge plans: each keeps indices of dim {self.crossing[tensor]} of {tensor!r} that the other "
            f"removes, so the {what} cannot be told; {_MERGE_ADVICE}"
        )

    def groups(self) -> dict[str, tuple[int, int]]:
        merged = {**self.first.groups, **self.second.groups}
        for name in self.first.groups.keys() & self.second.groups.keys():
            (kept, dense), (other_kept, other_dense) = self.first.groups[name], self.second.groups[name]
            if dense != other_dense:
                raise ValueError(
                    f"cannot merge plans: group {name!r} has {dense} channels in one, {other_dense} in the other"
                )
            if self.crossing:
                raise self._unclear(min(self.crossing), f"count of group {name!r}")
            merged[name] = (min(kept, other_kept), dense)
        return merged


def _modules_of(tensor: str) -> list[str]:
    """Return the module of a tensor and the modules around it, inner ones first: ``a.b.weight`` -> a.b, a, root."""
    parts = tensor.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _first_missing(index: Tensor | None, within: Tensor | None, size: int) -> int | None:
    """Return the first of ``index`` that is not in ``within``; None for either stands for all of ``range(size)``."""
    if within is None:
        return None
    if index is None:
        gaps = (within != torch.arange(len(within))).nonzero()
        first = int(gaps[0]) if len(gaps) else len(within)
        return first if first < size else None
    missing = index[~torch.isin(index, within)]
    return int(missing[0]) if len(missing) else None


def _places(index: Tensor | None, within: Tensor | None, size: int) -> Tensor | None:
    """Return where each of ``index`` is in ``within``, or in ``range(size)`` if that is None; None if none goes."""
    if index is None or index.shape[0] == (size if within is None else within.shape[0]):
        return None
    return index.clone() if within is None else torch.searchsorted(within, index)


def _intersection(
    first: Mapping[str, Mapping[int, Tensor]], second: Mapping[str, Mapping[int, Tensor]]
) -> dict[str, dict[int, Tensor]]:
    merged = {name: {**first.get(name, {}), **second.get(name, {})} for name in {**first, **second}}
    for name in first.keys() & second.keys():
        for dim in first[name].keys() & second[name].keys():
            merged[name][dim] = first[name][dim][torch.isin(first[name][dim], second[name][dim])]
    return merged


def _check_same_shapes(first: Plan, second: Plan) -> None:
    for name in sorted(first.shapes.keys() & second.shapes.keys()):
        if first.shapes[name] != second.shapes[name]:
            raise ValueError(
                f"the plans are of different models: {name!r} has dense shape {first.shapes[name]} in one and "
                f"{second.shapes[name]} in the other"
            )


def _checked_shape(name: str, shape: object) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"dense shape of {name!r} must be a tuple of ints of at least 0, got {shape!r}")
    if math.prod(max(size, 1) for size in shape) > _LARGEST:
        raise ValueError(f"dense shape {shape} of {name!r} is larger than any tensor")
    return tuple(shape)


def _checked_once(
    name: str, dim: int, index: Tensor, shape: tuple[int, ...], known: dict[tuple[int, int], Tensor]
) -> Tensor:
    """What `_checked_indices` returns, the same for the same tensor in a dimension of the same size."""
    key = id(index), shape[dim] if type(dim) is int and 0 <= dim < len(shape) else -1
    if key not in known:
        known[key] = _checked_indices(name, dim, index, shape)
    return known[key]


def _checked_indices(name: str, dim: object, index: object, shape: tuple[int, ...]) -> Tensor:
    if type(dim) is not int or not 0 <= dim < len(shape):
        raise ValueError(f"{name!r} has shape {shape} and no dim {dim!r}; dims are counted from 0")
    where = f"kept indices of dim {dim} of {name!r}"
    if not isinstance(index, Tensor) or index.dtype != torch.long or index.ndim != 1:
        raise ValueError(f"{where} must be a 1-D int64 tensor, got {_described(index)}")
    if not 1 <= len(index) <= shape[dim]:
        raise ValueError(f"{where}: got {len(index)} indices of {shape[dim]}; keep at least one and at most all")
    _check_dense(where, index)
    index = index.detach().to("cpu", copy=True)
    if index[0] < 0 or index[-1] >= shape[dim] or not bool((index[1:] > index[:-1]).all()):
        raise ValueError(f"{where} must be sorted, unique and in [0, {shape[dim]})")
    return index


def _checked_mask(name: str, mask: object, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise ValueError(f"mask of {name!r} must be a bool tensor of its dense shape {shape}, got {_described(mask)}")
    _check_dense(f"mask of {name!r}", mask)
    return mask.detach().to("cpu", copy=True).contiguous()


def _check_dense(where: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"{where} must be an ordinary dense tensor, got layout {tensor.layout} on {tensor.device}")


def _checked_attribute(module: str, key: str, value: object) -> int | tuple[int, ...]:
    if type(value) is int:
        return value
    if isinstance(value, tuple) and all(type(item) is int for item in value):
        return tuple(value)
    raise ValueError(f"attribute {key!r} of module {module!r} must be an int or a tuple of ints, got {value!r}")


def _checked_group(name: str, counts: object) -> tuple[int, int]:
    if isinstance(counts, tuple) and len(counts) == 2 and all(type(count) is int for count in counts):
        kept, dense = counts
        if 1 <= kept <= dense:
            return kept, dense
    raise ValueError(
        f"group {name!r} must say (channels kept, channels of the dense model), at least one kept, got {counts!r}"
    )


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def _mean(mask: Tensor) -> float:
    return float(mask.double().mean()) if mask.numel() else 1.0


def _plain(value: Any) -> Any:
    """Copy nested read-only mappings into dicts."""
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _from_parts(*parts: Any) -> Plan:
    return Plan(**dict(zip(_SECTIONS, parts, strict=True)))


def _packed(mask: Tensor) -> Tensor:
    """uint8, eight entries a byte, the first in the highest bit."""
    flat = mask.flatten().to(torch.uint8)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).reshape(-1, 8)
    return (padded * _BITS).sum(dim=1, dtype=torch.uint8)


def _decoded(
    data: object, indices: Callable[[str, object, int], Tensor], mask: Callable[[str, object, tuple[int, ...]], Tensor]
) -> Plan:
    """Make a plan of what a stranger may have written; ``indices`` and ``mask`` read the two kinds of tensors."""
    try:
        sections = _sections(data)
        shapes = {
            name: _checked_shape(name, tuple(_list(f"shape of {name!r}", shape)))
            for name, shape in _entries("shapes", sections["shapes"], object).items()
        }

        def kept(section: str) -> dict[str, dict[int, Tensor]]:
            return {
                name: {
                    int(dim): indices(f"{section}[{name!r}][{dim}]", value, _size(name, dim, shapes))
                    for dim, value in _entries(f"{section}[{name!r}]", dims, object).items()
                }
                for name, dims in _entries(section, sections[section], object).items()
            }

        return Plan(
            kept=kept("kept"),
            masks={
                name: mask(f"masks[{name!r}]", value, _shape(name, shapes))
                for name, value in _entries("masks", sections["masks"], object).items()
            },
            buffers=kept("buffers"),
            shapes=shapes,
            attributes={
                module: {
                    key: tuple(value) if isinstance(value, list) else value
                    for key, value in _entries(f"attributes[{module!r}]", values, int | list).items()
                }
                for module, values in _entries("attributes", sections["attributes"], object).items()
            },
            groups={
                name: _checked_group(name, tuple(counts))
                for name, counts in _entries("groups", sections["groups"], list).items()
            },
            ranks=_entries("ranks", sections["ranks"], int),
        )
    except ValueError as error:
        raise IncompatibleCheckpoint(f"this is not the state of a plan: {error}") from error


def _sections(data: object) -> dict[str, object]:
    sections = _entries("a plan", data, object)
    version = sections.pop("version", None)
    if type(version) is not int or version != FORMAT_VERSION:  # its type first: to compare a tensor takes memory
        got = repr(version) if isinstance(version, int | str | float | None) else type(version).__name__
        raise ValueError(f"wanted format version {FORMAT_VERSION}, got {got:.40}")
    if set(sections) != set(_SECTIONS):
        odd = min(set(sections) ^ set(_SECTIONS))
        raise ValueError(f"section {odd!r:.80} is {'unknown' if odd in sections else 'missing'}")
    return sections


def _entries(where: str, value: object, kind: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or any(not isinstance(key, str) for key in value):
        raise ValueError(f"{where} must be a mapping from names, got {type(value).__name__}")
    for key, item in value.items():
        if not isinstance(item, kind):
            raise ValueError(f"{where}: {key!r:.80} is of the wrong type, {type(item).__name__}")
    return dict(value)


def _list(where: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list, got {type(value).__name__}")
    return value


def _shape(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"tensor {name!r:.80} is named without its dense shape")
    return shapes[name]


def _size(name: str, dim: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    shape = _shape(name, shapes)
    if dim not in {str(known) for known in range(len(shape))}:
        raise ValueError(f"{name!r:.80} has shape {shape} and no dim {dim!r:.20}")
    return shape[int(dim)]


def _indices_of_list(where: str, value: object, size: int) -> Tensor:
    index = _list(where, value)
    if len(index) > size or any(type(i) is not int or not 0 <= i < size for i in index):
        raise ValueError(f"{where} must be a list of at most {size} ints in [0, {size})")
    return torch.tensor(index, dtype=torch.long)


def _indices_of_tensor(where: str, value: object, size: int) -> Tensor:
    return _stored(where, value, torch.long)


def _mask_of_text(where: str, value: object, shape: tuple[int, ...]) -> Tensor:
    wanted = 4 * math.ceil(math.ceil(math.prod(shape) / 8) / 3)
    if not isinstance(value, str) or len(value) != wanted:
        raise ValueError(f"{where} must be base64 text of one bit per entry of shape {shape}")
    try:
        packed = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where} is not base64: {error}") from error
    return _unpacked(where, _bytes(packed), shape)


def _mask_of_tensor(where: str, value: object, shape: tuple[int, ...]) -> Tensor:
    return _unpacked(where, _stored(where, value, torch.uint8).cpu(), shape)


def _stored(where: str, value: object, dtype: torch.dtype) -> Tensor:
    # a tensor that repeats itself by strides may claim any size: only what lies in memory entry by entry is copied on
    if not isinstance(value, Tensor) or value.dtype != dtype or value.ndim != 1:
        raise ValueError(f"{where} must be a 1-D tensor of {dtype}, got {_described(value)}")
    _check_dense(where, value)
    if not value.is_contiguous():
        raise ValueError(f"{where} must be contiguous, got strides {value.stride()}")
    return value


def _bytes(packed: bytes) -> Tensor:
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8) if packed else torch.zeros(0, dtype=torch.uint8)


def _unpacked(where: str, packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    if len(packed) != -(-count // 8):
        raise ValueError(f"{where} holds {len(packed)} bytes, but shape {shape} needs one bit per entry")
    if count % 8 and int(packed[-1]) & (0xFF >> count % 8):
        raise ValueError(f"{where} has bits set beyond the last entry of shape {shape}")
    bits = packed.unsqueeze(1).bitwise_and(_BITS).ne(0)
    return bits.flatten()[:count].reshape(shape)
