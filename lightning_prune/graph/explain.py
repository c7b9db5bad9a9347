"""What a channel graph has to say: what each group is worth, what is frozen and why, and what would free it.

`explain` gathers it once; ``str()`` of that is for a terminal, `Explanation.to_dict` for JSON, and
`lightning_prune.figures.graph_figure` draws it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.graph.groups import ChannelGraph, Group

_LINE = 150  # columns that a list of names may fill


@dataclass(frozen=True)
class Worth:
    """What a model saves: flops of one sample, and parameters."""

    flops: int
    params: int


@dataclass(frozen=True)
class GroupWorth:
    """A group and what it is worth.

    Attributes:
        group: the group itself.
        each: what the model saves without one of its channels.
        whole: what it saves without all of them but one.
        is_suspect: whether the model's own code may hold its size as a number; a trial cut is still to tell.
    """

    group: Group
    each: Worth
    whole: Worth
    is_suspect: bool = False


@dataclass(frozen=True)
class Frozen:
    """Layers that are frozen for the same reason, at the same line of the model's code.

    Attributes:
        names: of layers and parameters.
        reason: why, with the operator.
        modules: paths of the modules that ran the operator; empty if it was none's.
        line: of the model's own code, as ``resnet.py:93``; empty if it was none's.
        remedy: what would free them; empty if nothing is known to.
        params: elements of the parameters these layers hold.
        reads: indices of the groups that these layers read.
    """

    names: tuple[str, ...]
    reason: str
    modules: tuple[str, ...]
    line: str
    remedy: str
    params: int
    reads: tuple[int, ...]


@dataclass(frozen=True)
class PartlyFrozen:
    """A layer that makes channels of a group, and others that may not go.

    Attributes:
        name: of the layer.
        count: how many of its channels are frozen.
        channels: how many it has.
        reason: why, with the operator and where it is.
        remedy: what would free them; empty if nothing is known to.
    """

    name: str
    count: int
    channels: int
    reason: str
    remedy: str


@dataclass(frozen=True)
class Explanation:
    """What may be cut out of a model, what not, and why.

    Attributes:
        flops: of the model as it is, for one sample.
        params: of the model as it is.
        prunable_share: share of the parameters with at least one coordinate that may go.
        groups: in data-flow order.
        frozen: in the order of the graph's own list.
        partly: layers of which only some channels are frozen.
        links: (reader, made): a layer reads the one group and makes the other; indices of `groups`.
    """

    flops: int
    params: int
    prunable_share: float
    groups: tuple[GroupWorth, ...]
    frozen: tuple[Frozen, ...]
    partly: tuple[PartlyFrozen, ...]
    links: tuple[tuple[int, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it in what JSON can say; ``freezes`` is what is frozen, by reason."""
        return {
            "flops": self.flops,
            "params": self.params,
            "prunable_share": self.prunable_share,
            "groups": [
                {
                    "name": worth.group.name,
                    "channels": worth.group.size,
                    "producers": [producer.name for producer in worth.group.producers],
                    "consumers": [consumer.name for consumer in worth.group.consumers],
                    "members": _members(worth.group),
                    "exact": worth.group.exact,
                    "note": worth.group.inexact_because,
                    "each": {"flops": worth.each.flops, "params": worth.each.params},
                    "all_but_one": {"flops": worth.whole.flops, "params": worth.whole.params},
                }
                for worth in self.groups
            ],
            "freezes": [
                {
                    "names": list(frozen.names),
                    "reason": frozen.reason,
                    "modules": list(frozen.modules),
                    "line": frozen.line,
                    "remedy": frozen.remedy,
                    "params": frozen.params,
                }
                for frozen in self.frozen
            ],
            "partly": [asdict(layer) for layer in self.partly],
            "links": [[self.groups[i].group.name, self.groups[j].group.name] for i, j in self.links],
        }

    def __str__(self) -> str:
        lines = [
            f"{len(self.groups)} groups, {self.prunable_share:.1%} of {self.params:,} parameters can go in part; "
            f"{self.flops:,} flops for one sample"
        ]
        for worth in self.groups:
            group, note = worth.group, "" if worth.group.exact else f"; inexact: {worth.group.inexact_because}"
            note += "; proved when first cut: its size may be held in code" if worth.is_suspect else ""
            lines += [
                f"  {group.name}: {group.size} channels, each {worth.each.flops:,} flops and {worth.each.params:,} "
                f"parameters; cut to one: -{worth.whole.flops / max(1, self.flops):.1%} flops, "
                f"-{worth.whole.params / max(1, self.params):.1%} parameters{note}",
                "      " + listed(_members(group)),
            ]
        if self.frozen:
            lines.append("frozen:")
        for frozen in self.frozen:
            count = f" ({len(frozen.names)})" if len(frozen.names) > 1 else ""
            lines.append(f"  {listed(frozen.names)}{count}: {frozen.reason}{_place(frozen)}")
            if frozen.remedy:
                lines.append(f"      to free: {frozen.remedy}")
        if self.partly:
            lines.append("prunable in part:")
        for layer in self.partly:
            lines.append(f"  {layer.name}: {layer.count} of {layer.channels} frozen: {layer.reason}")
            if layer.remedy:
                lines.append(f"      to free: {layer.remedy}")
        return "\n".join(lines)


def explain(graph: ChannelGraph) -> Explanation:
    """Gather what there is to say about a graph: worth by arithmetic, and a remedy for each reason."""
    costs, dense = graph.costs, graph.costs.dense
    flops, params = costs.flops_and_params(dense)

    def worth(index: int, kept: int) -> Worth:
        counts = dense.copy()
        counts[index] = kept
        left = costs.flops_and_params(counts)
        return Worth(flops - left[0], params - left[1])

    groups = tuple(
        GroupWorth(group, worth(i, group.size - 1), worth(i, 1), group.name in graph.suspects)
        for i, group in enumerate(graph.groups)
    )
    partly = tuple(
        PartlyFrozen(name, part.count, graph.shapes[part.weight][part.dim], part.reason, remedy(part.reason))
        for name, part in graph.partly.items()
    )
    return Explanation(flops, params, graph.prunable_share, groups, _freezes(graph), partly, _links(graph))


def remedy(reason: str) -> str:
    """What would free a layer that is frozen for a reason; empty if the reason is not in the table.

    Example:
        >>> remedy("operator 'histc' has no rule (in head, model.py:7)")
        "give operator 'histc' a rule: lightning_prune.graph.rules.rule"
    """
    for pattern, freed in REMEDIES:
        found = re.search(pattern, reason)
        if found:
            return freed.format(*found.groups())
    return ""


def compact(names: Iterable[str]) -> list[str]:
    """Names that differ in one number joined into one, and those again; order is that of first appearance.

    What follows a bracket is left as it is.

    Example:
        >>> compact(["block.0.norm1", "head", "block.0.norm2", "block.1.norm1", "block.1.norm2", "block.3.norm"])
        ['block.{0-1}.norm{1-2}', 'head', 'block.3.norm']
    """
    rows: list[tuple[tuple[str, ...], ...]] = []  # alternatives for each part; a part with an odd index is a number
    for name in names:
        path, bracket, rest = name.partition("[")
        *parts, last = re.split(r"(\d+)", path)
        rows.append(tuple((part,) for part in (*parts, last + bracket + rest)))
    for at in reversed(range(1, max(map(len, rows), default=0), 2)):
        merged: dict[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]] = {}
        for row in rows:
            key = (*row[:at], (), *row[at + 1 :]) if at < len(row) else row
            known = merged.get(key, row)
            numbers = tuple(dict.fromkeys((*known[at], *row[at]))) if at < len(row) else ()
            merged[key] = (*row[:at], numbers, *row[at + 1 :]) if numbers else row
        rows = list(merged.values())
    return ["".join(_numbers(part) if i % 2 else part[0] for i, part in enumerate(row)) for row in rows]


def listed(names: Iterable[str], width: int = _LINE) -> str:
    """Names in compact form, as many as fit a line, and how many more there are."""
    short = compact(names)
    fitting = 1
    while fitting < len(short) and len(", ".join(short[: fitting + 1])) <= width:
        fitting += 1
    more = f", and {len(short) - fitting} more" if fitting < len(short) else ""
    return ", ".join(short[:fitting]) + more


def _numbers(numbers: Sequence[str]) -> str:
    """['0', '1', '2', '5'] -> '{0-2,5}'; a single one as it is."""
    if len(numbers) == 1:
        return numbers[0]
    runs: list[list[str]] = []
    for number in sorted(numbers, key=lambda n: (int(n), n)):
        if runs and str(int(runs[-1][-1]) + 1) == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) + "}"


def _members(group: Group) -> list[str]:
    return [f"{member.name}[{member.dim}]" for member in group.members if not member.is_buffer]


def _place(frozen: Frozen) -> str:
    parts = [listed(frozen.modules, _LINE // 2)] if frozen.modules else []
    parts += [frozen.line] if frozen.line else []
    return f" (in {', '.join(parts)})" if parts else ""


def _links(graph: ChannelGraph) -> tuple[tuple[int, int], ...]:
    made: dict[str, list[int]] = {}
    for i, group in enumerate(graph.groups):
        for producer in group.producers:
            made.setdefault(producer.weight, []).append(i)
    links = {
        (i, j)
        for i, group in enumerate(graph.groups)
        for consumer in group.consumers
        for j in made.get(consumer.weight, ())
        if i != j
    }
    return tuple(sorted(links))


# What a reason ends in: the module that ran, and the line of the model's own code.
_WHERE = re.compile(r" \(in (?P<module>[^()]*?)(?:, (?P<line>[^(), ]+:\d+))?\)$")


def _freezes(graph: ChannelGraph) -> tuple[Frozen, ...]:
    gathered: dict[tuple[str, str], tuple[list[str], dict[str, None]]] = {}
    for name, reason in graph.frozen.items():
        where = _WHERE.search(reason)
        line = (where and where["line"]) or ""
        told = reason[: where.start()] if where else reason
        if told == f"the example input did not reach '{name}'":
            told = "the example input did not reach it"
        names, modules = gathered.setdefault((told, line), ([], {}))
        names.append(name)
        if where:
            modules[where["module"]] = None
    numel: dict[str, int] = {}
    for path, parameter in graph.model.named_parameters():
        numel[path] = numel.get(path, 0) + parameter.numel()
    out = []
    for (told, line), (names, modules) in gathered.items():
        layers = {re.sub(r":\d+$", "", name) for name in names}  # a second group of a layer has a number
        held = [path for path in numel if path in layers or path.rpartition(".")[0] in layers]
        reads = [
            i
            for i, group in enumerate(graph.groups)
            if any(c.name in layers or c.weight in layers for c in group.consumers)
        ]
        params = sum(numel[path] for path in held)
        out.append(Frozen(tuple(names), told, tuple(modules), line, remedy(told), params, tuple(reads)))
    return tuple(out)


_BY_SIZE = "take the number from the tensor (x.shape[1]), -1, or an attribute of the module, so that it follows a cut"
_UNFLATTEN = "keep the dimensions apart until that operator, or do the same without flattening them"
_HEADS = "whole heads go, if the module takes sizes from attributes or has a stand-in: lightning_prune.graph.attention"

# Pattern of a reason -> what would free it; ``{0}`` is the pattern's first group. The first that matches counts.
REMEDIES: tuple[tuple[str, str], ...] = (
    (r"it is an output of the model$", "nothing has to; for a part that others read on, trace the model around it"),
    (r"operator ('.*?') has no rule", "give operator {0} a rule: lightning_prune.graph.rules.rule"),
    (r"operator '.*?' changes its shape in place", "use what returns a new tensor instead"),
    (r"operator '.*?' indexes it in a way", "index with whole dimensions, or give the operator a rule"),
    (r"has to stay as wide as it is", f"{_BY_SIZE}; for an attention module register a stand-in: "
     "lightning_prune.graph.attention.register"),
    (r"does not divide it evenly", "make a view that splits or joins whole dimensions"),
    (r"did not reach", "trace with an example_input that takes this path, or delete what is never used"),
    (r"a trial cut failed", f"read the error: the model's code may hold the size. {_BY_SIZE.capitalize()}"),
    (r"pairs it with channels that no parameter makes", "use a layer that makes these channels (a 1x1 convolution)"),
    (r"pairs it with a dimension that is not a parameter's", "make that tensor a parameter, give it size 1 there, or "
     "make it with the size of the other (x.shape)"),
    (r"is padded by \(", "use a shortcut with weights (a 1x1 convolution) in place of padding"),
    (r"is taken by its number", "nothing for what is one thing each; else slice by equal parts with chunk"),
    (r"is sliced at a number", "split by equal parts with chunk or x.shape, in place of the number"),
    (r"is split into parts of .*, by number", "hold the sizes as attributes of the module, or split with chunk"),
    (r"is rolled by a number", "nothing, unless the order of the channels does not matter: then do not roll"),
    (r"is looked up by an index that is smaller", "make the index as large as the tensor in the other dimensions"),
    (r"is looked up by index", "nothing: any index may be asked for"),
    (r"is repeated by numbers in a tensor", "repeat by one number, along a dimension"),
    (r"is a sampling position", "nothing: these are coordinates"),
    (r"chooses among its values", "nothing: which value is chosen is the result"),
    (r"whole groups of its convolution go", "nothing has to: the convolution loses whole groups"),
    (r"its group norm has one channel a group", "use nn.InstanceNorm with affine=True, which follows a cut"),
    (r"no other channel goes with what it goes with", "nothing: it is the last one"),
    (r"(normalises|reads) one (channel|value)", "nothing: there is only one"),
    (r"is read together with a single value", "give both tensors the same width"),
    (r"runs over the kernel's area", "nothing: these are places in a kernel, not channels"),
    (r"its convolution is frozen", "free the convolution, for whose reason see its own line"),
    (r"an attention head, which the softmax scale", f"nothing frees a head's width; {_HEADS}"),
    (r"an attention head, which torch lays out", f"nothing frees a head's width; {_HEADS}"),
    (r"meet another layout", _UNFLATTEN),
    (r"dimensions flattened into one", _UNFLATTEN),
    (r"'.*?' of tensors with \d+ and \d+ dimensions", "bring both tensors to the same number of dimensions first"),
    (r"an einsum of more than two tensors", "write it as einsums of two tensors each"),
    (r"('.*?') projects its states", "use {0} without proj_size"),
    (r"('.*?') runs over it", "give the operator {0} a rule, or compute it another way"),
)  # fmt: skip
