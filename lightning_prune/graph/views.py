"""What a method sees of a layer: its slice of weights, norms and gradients, channels in the group's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_prune.graph.flow import Activation
from lightning_prune.graph.groups import ChannelGraph, Consumer, Group, Producer, gates_of


class ConsumerView:
    """A layer that reads a group's channels.

    Args:
        consumer: which axis and indices of which weight.
        parameters: qualified name -> parameter.
    """

    def __init__(self, consumer: Consumer, parameters: Mapping[str, Tensor]) -> None:
        self.name = consumer.name
        self._consumer = consumer
        self._weight = parameters[consumer.weight]

    @property
    def columns(self) -> Tensor:
        """(C, F): all weights of the layer that read each channel."""
        weight, dim, indices = self._weight, self._consumer.dim, self._consumer.indices
        return _rows(weight, dim, indices, _places(indices, weight, dim))


class LayerView:
    """One producer of a group, as scores read it.

    Attributes:
        name: module path of the layer.
        group: the group whose channels it makes.
        measured: (C,) mean over the batches since the last event of what the method's `measure` returned, joined over
            the group's producers; None for a method that measures nothing.
        weight_name: qualified name of the weight.
        kept: name -> (C,) tensors of this group that live from event to event; what goes with a channel goes here too.
    """

    def __init__(
        self,
        group: Group,
        producer: Producer,
        parameters: Mapping[str, Tensor],
        graph: ChannelGraph | None = None,
    ) -> None:
        self.name = producer.name
        self.group = group
        self.measured: Tensor | None = None
        self.kept: dict[str, Tensor] = {}
        self.weight_name = producer.weight
        self._producer = producer
        self._graph = graph
        self._parameters = parameters

    @cached_property
    def activation(self) -> Activation:
        """What its channels go through behind its norm, or behind the layer itself."""
        assert self._graph is not None
        return self._graph.activation(self._producer)

    @cached_property
    def weight(self) -> Tensor:
        """The layer's whole weight."""
        return self._parameters[self._producer.weight]

    @property
    def bias(self) -> Tensor | None:
        """(C,), or None."""
        return self._entry(self._producer.bias, self._producer.indices)

    @property
    def filters(self) -> Tensor:
        """(C, F): the weights that make each channel."""
        return self._rows(self.weight, self._producer.dim, self._producer.indices)

    def filters_of(self, weight: Tensor) -> Tensor:
        """(C, F): `filters`, out of another tensor of the weight's shape."""
        return self._rows(weight, self._producer.dim, self._producer.indices)

    @property
    def filter_grads(self) -> Tensor | None:
        """(C, F) gradients of `filters`; None before the first backward."""
        if self.weight.grad is None:
            return None
        return self._rows(self.weight.grad, self._producer.dim, self._producer.indices)

    @property
    def gamma(self) -> Tensor | None:
        """(C,) scale of the norm that follows directly, or None."""
        return self._entry(self._producer.norms[0].gamma, self._producer.norms[0].indices) if self._follows else None

    @property
    def beta(self) -> Tensor | None:
        """(C,) shift of the norm that follows directly, or None."""
        return self._entry(self._producer.norms[0].beta, self._producer.norms[0].indices) if self._follows else None

    @property
    def consumers(self) -> list[ConsumerView]:
        """The layers that read the group's channels."""
        return [ConsumerView(c, self._parameters) for c in self.group.consumers]

    @property
    def has_norm(self) -> bool:
        """Whether norms with a scale gate these channels: the one that follows, else those of all readers."""
        return self._producer.gated or bool(self._producer.norms)

    @property
    def gate_names(self) -> list[str]:
        """Names of the scales of the norms that gate these channels."""
        return [norm.gamma for norm in self._producer.norms]

    @property
    def scale_free(self) -> bool:
        """Whether a norm without a scale follows: the loss does not depend on the length of these filters."""
        return self._producer.scale_free

    @property
    def _follows(self) -> bool:
        return self._producer.gated and bool(self._producer.norms)

    @property
    def gate_gradient(self) -> Tensor | None:
        """(C,) this layer's part of dE/dz of a gate z = 1 on each channel, from parameter gradients alone.

        Behind a norm it is gamma dE/dgamma + beta dE/dbeta, else the sum of w dE/dw over filter and bias: both exact.
        The parts of a group's producers add up to the gradient of one gate, which sits where
        `ChannelGraph.gate_parameters` says; what is there behind none of them directly, such as a norm before the
        layers that read, is the first one's.

        Returns:
            None where a gradient is missing.
        """
        total: Tensor | None = None
        for parameter, dim, rows in self._gated:
            if parameter.grad is None:
                return None
            term = self._products(parameter.detach(), parameter.grad, dim, rows)
            total = term if total is None else total + term
        return torch.zeros(self.group.size, device=self.weight.device) if total is None else total

    def _products(self, left: Tensor, right: Tensor, dim: int, rows: Tensor | None) -> Tensor:
        """(C,) for each channel the sum of products of its entries."""
        if left.ndim == 1 and rows is None:
            return (left * right).reshape(self.group.size, -1).sum(dim=1)
        left, right = left.movedim(dim, 0), right.movedim(dim, 0)
        if rows is not None:
            left, right = left.index_select(0, rows), right.index_select(0, rows)
        size = self.group.size
        return torch.einsum(
            "cf,cf->c", left.reshape(size, -1), right.reshape(size, -1)
        )  # without a copy of all products

    @cached_property
    def _gated(self) -> list[tuple[Tensor, int, Tensor | None]]:
        """Parameters of its gates, their axis, and the indices of all channels on it; None for all in order."""
        own = {self._producer.weight, *(norm.gamma for norm in self._producer.norms if self._producer.gated)}
        first = self._producer is self.group.producers[0]
        others = {p.weight for p in self.group.producers} | {
            norm.gamma for p in self.group.producers for norm in p.norms if p.gated
        }
        tables = {(member.name, member.dim): member.indices for member in self.group.members}
        found = []
        for gate in gates_of(self.group) if self._graph is None else self._graph.gate_parameters(self.group):
            if gate.weight in own or (first and gate.weight not in others):
                for name, dim in ((gate.weight, gate.dim), (gate.bias, 0)):
                    if name is not None:
                        rows = gate.of(tables[name, dim]).reshape(-1)
                        parameter = self._parameters[name]
                        whole = len(rows) == parameter.shape[dim] and _is_range(rows)
                        found.append((parameter, dim, None if whole else rows.to(parameter.device)))
        return found

    @cached_property
    def _is_vector(self) -> bool:
        """Whether each of its gates has one entry a channel, in order."""
        return bool(self._gated) and all(
            parameter.shape == (self.group.size,) and rows is None for parameter, _, rows in self._gated
        )

    @property
    def weight_gradient(self) -> Tensor | None:
        """(C,) sum of w dE/dw over filter and bias; None where a gradient is missing."""
        grads = self.filter_grads
        if grads is None:
            return None
        total = (self.filters.detach() * grads).sum(dim=1)
        term = self._times_gradient(self._producer.bias, self._producer.indices)
        return total if term is None else total + term

    def _entry(self, name: str | None, indices: Tensor) -> Tensor | None:
        if name is None:
            return None
        return self._rows(self._parameters[name], 0, indices).squeeze(1)

    def _times_gradient(self, name: str | None, indices: Tensor) -> Tensor | None:
        if name is None:
            return None
        parameter = self._parameters[name]
        if parameter.grad is None:
            return None
        return self._rows(parameter.detach() * parameter.grad, 0, indices).sum(dim=1)

    def _rows(self, tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
        """As the function, for indices of the producer: copied to the device once, as a copy waits for it."""
        key = id(indices), tensor.device, tensor.shape[dim]
        if key not in self._places:
            self._places[key] = _places(indices, tensor, dim)
        return _rows(tensor, dim, indices, self._places[key])

    @cached_property
    def _places(self) -> dict[tuple[int, torch.device, int], Tensor | None]:
        return {}


@torch.no_grad()
def gate_gradients(views: Mapping[str, Sequence[LayerView]]) -> dict[str, Tensor]:
    """`LayerView.gate_gradient` of all groups, summed over the producers of each.

    Scales and shifts of norms, which most gates are, take as many operations for a hundred groups as for one.

    Returns:
        group -> (C,); layers of which a gradient is missing add nothing, and groups of only such are left out.
    """
    terms: dict[str, list[Tensor]] = {}
    vectors: list[tuple[str, Tensor, Tensor]] = []
    for name, group in views.items():
        for view in group:
            if view._is_vector:
                found = [(name, parameter, parameter.grad) for parameter, _, _ in view._gated]
                known = [(name, value, gradient) for name, value, gradient in found if gradient is not None]
                vectors += known if len(known) == len(found) else []
            elif (term := view.gate_gradient) is not None:
                terms.setdefault(name, []).append(term)
    if vectors:
        products = torch._foreach_mul([value for _, value, _ in vectors], [gradient for _, _, gradient in vectors])
        for (name, _, _), product in zip(vectors, products, strict=True):
            terms.setdefault(name, []).append(product)
    for more in range(1, max(map(len, terms.values()), default=0)):
        longer = [parts for parts in terms.values() if len(parts) > more]
        torch._foreach_add_([parts[0] for parts in longer], [parts[more] for parts in longer])
    return {name: terms[name][0] for name in views if name in terms}


def _rows(tensor: Tensor, dim: int, indices: Tensor, places: Tensor | None) -> Tensor:
    """(C, F): for each channel all entries at its (C, M) indices of a dimension; see `_places`."""
    moved = tensor.movedim(dim, 0)
    if places is not None:
        moved = moved.index_select(0, places)
    return moved.reshape(len(indices), -1)


def _places(indices: Tensor, tensor: Tensor, dim: int) -> Tensor | None:
    """(C * M,) indices of a dimension in one row, on a tensor's device; None for all of it in order."""
    flat = indices.reshape(-1)
    return None if len(flat) == tensor.shape[dim] and _is_range(flat) else flat.to(tensor.device)


def _is_range(indices: Tensor) -> bool:
    return len(indices) == 0 or bool((indices == torch.arange(len(indices))).all())
