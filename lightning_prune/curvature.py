"""How the loss bends: Kronecker factors of layers (K-FAC), their spectra, and the Hessian's own by power iteration.

The block of the Hessian that belongs to a layer is taken for ``A kron G``: A the second moment of what the layer reads,
bias entry included, G that of the gradient of a sample's loss by what it makes (Martens and Grosse, 2015; for
convolutions Grosse and Martens, 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.decision import Plan
from lightning_prune.errors import IncompatibleCheckpoint
from lightning_prune.graph.flow import Call
from lightning_prune.graph.groups import ChannelGraph
from lightning_prune.state import Fields
from lightning_prune.taps import Look, Seen, Watch

# Layers with factors: function -> its arguments behind input, weight and bias, and the weight's axis of outputs.
CURVATURE: Fields = {
    "factors": dict[str, dict[str, Tensor]],
    "cut": dict[str, Any],
    "skipped": int,
}
"""What `state_dict` returns of the factors of several layers."""
_CONVOLUTION = ("stride", "padding", "dilation", "groups")
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
_LAYERS: dict[str, tuple[tuple[str, ...], int]] = {
    "linear": ((), 0),
    **{f"conv{n}d": (_CONVOLUTION, 0) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": (_TRANSPOSED, 1) for n in (1, 2, 3)},
}
_EXACT = 1024  # rows of a matrix whose eigenvalues are computed all; of larger ones only the largest
_MOST_ENTRIES = 2**24  # of unfolded patches at once: 64 MiB
_BISECTIONS = 60


class Spectrum:
    """The largest eigenvalue of a positive semi-definite matrix, with and without some of its rows and columns.

    Up to 1024 rows all eigenvalues are computed and everything is exact. Of a larger matrix the top one is found by
    power iteration, and what deletions leave is bounded from below.

    Args:
        matrix: (N, N).

    Attributes:
        radius: the largest eigenvalue, float64.
    """

    radius: Tensor

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix.double()
        if len(matrix) <= _EXACT:
            values, self._vectors = torch.linalg.eigh(self._matrix)  # ascending
            self._values = values.clamp(min=0)
            self.radius = self._values[-1]
        else:
            start = torch.randn(len(matrix), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            radius, self._top = power_iteration(self._matrix.mv, start.to(matrix.device), 1000, 1e-9)
            self.radius = self._matrix.new_tensor(radius)

    def without(self, blocks: Tensor) -> Tensor:
        """The largest eigenvalue that is left when rows and columns are deleted, for many deletions at once.

        The eigenvalues of what is left above x are as many as those of the matrix above x, less the positive ones of
        the deleted block of ``(matrix - x)^-1``; the largest is found by bisection between the bounds of interlacing.
        The lower bound for a large matrix is the Rayleigh quotient of the top eigenvector without the deleted entries,
        or a diagonal entry.

        Args:
            blocks: (C, M) rows that each deletion takes.

        Returns:
            (C,) float64 between 0 and the radius; 0 where nothing is left.

        Example:
            >>> matrix = torch.tensor([[2.0, 1, 0], [1, 2, 0], [0, 0, 0.5]])
            >>> Spectrum(matrix).without(torch.tensor([[0], [2]])).round(decimals=6)
            tensor([2., 3.], dtype=torch.float64)
        """
        blocks = blocks.to(self._matrix.device)
        size, width = len(self._matrix), blocks.shape[1]
        if width >= size:
            return self._matrix.new_zeros(len(blocks))
        if size > _EXACT:
            return self._lower_bounds(blocks)
        values, rows = self._values, self._vectors[blocks]  # (N,), (C, M, N)
        high = self.radius.repeat(len(blocks))
        low = values[size - 1 - width].repeat(len(blocks))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            distance = values - middle[:, None]  # (C, N)
            distance = torch.where(distance == 0, torch.finfo(torch.float64).tiny, distance)
            resolvent = (rows / distance[:, None]) @ rows.mT  # (C, M, M)
            above = (distance > 0).sum(dim=1) - (torch.linalg.eigvalsh(resolvent) > 0).sum(dim=1)
            low, high = torch.where(above > 0, middle, low), torch.where(above > 0, high, middle)
        return high

    def _lower_bounds(self, blocks: Tensor) -> Tensor:
        gone, image = self._top[blocks], self._matrix @ self._top  # (C, M), (N,)
        left = 1 - gone.square().sum(dim=1)
        within = torch.einsum("cm,cmk,ck->c", gone, self._matrix[blocks[:, :, None], blocks[:, None, :]], gone)
        quotient = (self._top @ image - 2 * (gone * image[blocks]).sum(dim=1) + within) / left.clamp(min=1e-4)
        quotient = torch.where(left > 1e-4, quotient, 0.0)  # what is left of the vector is noise below
        diagonal = self._matrix.diagonal().repeat(len(blocks), 1).scatter_(1, blocks, 0.0).amax(dim=1)
        return torch.minimum(torch.maximum(quotient, diagonal), self.radius)

    def share_without(self, blocks: Tensor) -> Tensor:
        """(C,) in [0, 1]: what `without` leaves of the radius; 1 for a matrix of zeros."""
        if not self.radius > 0:
            return self._matrix.new_ones(len(blocks))
        return (self.without(blocks) / self.radius).clamp(max=1)


@dataclass(frozen=True)
class FactorLayer:
    """A layer that Kronecker factors are kept of.

    Attributes:
        weight, bias: names of its parameters; bias may be None.
        axis: the weight's axis of outputs; the other of the first two is that of inputs.
        area: weights between one output and one input.
        calls: where it runs.
    """

    weight: str
    bias: str | None
    axis: int
    area: int
    calls: tuple[Call, ...]

    def rows_of(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(O, F): weights or gradients of its units, the bias behind them, in the order of the factors."""
        rows = weight.movedim(self.axis, 0).flatten(1)
        return rows if bias is None else torch.cat([rows, bias[:, None]], dim=1)

    def inputs_at(self, indices: Tensor) -> Tensor:
        """(C, K) rows of A that belong to channels, from their (C, M) indices on the weight's axis of inputs."""
        places = torch.arange(self.area, device=indices.device)
        return (indices[:, :, None] * self.area + places).flatten(1)


def factor_layer(graph: ChannelGraph, weight: str) -> FactorLayer | str:
    """The layer that multiplies with a weight, if it is one with Kronecker factors; else why it is none.

    Convolutions, transposed ones and linear layers have them, but not with groups, where each filter reads little.
    """
    flow = graph.flow
    assert flow is not None
    numbers = flow.layers.get(weight, ())
    if not numbers:
        return f"{weight} does not run in eval mode"
    names = {flow.call(number).name for number in numbers}
    if strange := sorted(names - _LAYERS.keys()):
        return f"{strange[0]!r} of {weight} has no Kronecker factors"
    records = [record for number in numbers for record in flow.made[number] if record.weight == weight]
    if any(record.groups > 1 for record in records):
        return f"the convolution of {weight} works in groups, for which there are no Kronecker factors"
    (axis,) = {_LAYERS[name][1] for name in names}
    if any(flow.calls[number].sources[1:2] not in ((), (None,)) for number in numbers):
        return (
            f"{weight} is made into another tensor before the layer multiplies with it, so that factors are not its own"
        )
    biases = {record.bias for record in records}
    bias = biases.pop() if len(biases) == 1 else None
    return FactorLayer(weight, bias, axis, math.prod(graph.shapes[weight][2:]), tuple(map(flow.call, numbers)))


@dataclass(frozen=True)
class Factors:
    """Running sums from which a layer's Kronecker factors and its mean gradient come.

    Numerators and their counts fade alike, so that early averages need no correction, and further samples are averaged
    by their number.

    Attributes:
        inputs: (F, F) sum over samples and positions of a a^T, a what one position reads, 1 for the bias behind it.
        outputs: (O, O) sum of g g^T, g the gradient of one sample's loss at one position.
        gradient: (O, F) sum of gradients of the loss, bias behind the weights.
        counts: (3,) float64: samples, positions, and gradients.
    """

    inputs: Tensor
    outputs: Tensor
    gradient: Tensor
    counts: Tensor

    def faded(self, decay: float, new: Factors) -> Factors:
        """An average with a batch: ``decay`` of what there was, the rest of what is new."""
        return Factors(**{key: decay * value + (1 - decay) * getattr(new, key) for key, value in vars(self).items()})

    def plus(self, other: Factors) -> Factors:
        """The sum of two batches' sums."""
        return Factors(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def a(self) -> Tensor:
        """(F, F) float64: A, the mean over samples of the sum over positions."""
        return self.inputs.double() / self.counts[0]

    @property
    def g(self) -> Tensor:
        """(O, O) float64: G, the mean over samples and positions."""
        return self.outputs.double() / self.counts[1]

    @property
    def mean_gradient(self) -> Tensor:
        """(O, F) float64."""
        return self.gradient.double() / self.counts[2].clamp(min=torch.finfo(torch.float64).tiny)

    @classmethod
    def zeros(cls, rows: Tensor) -> Factors:
        """Nothing yet, for a layer whose weights are these (O, F) rows."""
        outputs, inputs = rows.shape
        rows = _real(rows)
        counts = torch.zeros(3, dtype=torch.float64, device=rows.device)
        return cls(rows.new_zeros(inputs, inputs), rows.new_zeros(outputs, outputs), torch.zeros_like(rows), counts)

    @property
    def finite(self) -> Tensor:
        """Whether there is no NaN or infinity in it: 0-d bool, on the device."""
        return torch.stack([torch.isfinite(value).all() for value in vars(self).values()]).all()

    def where(self, condition: Tensor, other: Factors) -> Factors:
        """These if a 0-d bool is true, else others."""
        return Factors(**{name: value.where(condition, getattr(other, name)) for name, value in vars(self).items()})

    def blanked(self, inputs: Tensor, outputs: Tensor) -> Factors:
        """Zeros in all rows but those that stay: (n,) indices of each."""
        i, o = torch.zeros_like(self.inputs[0]), torch.zeros_like(self.outputs[0])
        i[inputs.to(i.device)], o[outputs.to(o.device)] = 1, 1
        return Factors(
            self.inputs * i[:, None] * i, self.outputs * o[:, None] * o, self.gradient * o[:, None] * i, self.counts
        )

    def cut(self, inputs: Tensor, outputs: Tensor) -> Factors:
        """Only the rows that stay: (n,) indices of each."""
        i, o = inputs.to(self.inputs.device), outputs.to(self.inputs.device)
        return Factors(self.inputs[i][:, i], self.outputs[o][:, o], self.gradient[o][:, i], self.counts)

    def copy_to(self, device: torch.device) -> Factors:
        """A copy on a device."""
        return Factors(**{name: value.to(device, copy=True) for name, value in vars(self).items()})


class Capture:
    """Sums over the samples that run through layers, from which `Factors` of a batch are made.

    What runs without gradients is not looked at. Gradients are taken of ``backward`` while `open` is set.

    Args:
        layers: by the name of their weight.
        parameters: of the model, by name.

    Attributes:
        looks: for `taps.Watch`.
        open: whether gradients that arrive are those of the loss.
        scale: what the mean loss is multiplied by before its gradient is taken.
        sums: weight -> sums so far, of layers that a gradient has reached; gradients are 0, of none.
    """

    def __init__(self, layers: Mapping[str, FactorLayer], parameters: Mapping[str, Tensor]) -> None:
        self.open = False
        self.scale: Tensor | float = 1.0
        self.looks: dict[Call, list[Look]] = {}
        self.sums: dict[str, Factors] = {}
        self._counted: set[tuple[str, int]] = set()
        for layer in layers.values():
            for call in layer.calls:
                self.looks.setdefault(call, []).append(self._look_at(layer, parameters[layer.weight]))

    def _look_at(self, layer: FactorLayer, weight: Tensor) -> Look:
        def look(seen: Seen) -> None:
            out = seen.out
            if not (torch.is_grad_enabled() and out.requires_grad and weight.requires_grad):
                return
            given = dict(zip(("input", "weight", "bias"), seen.args, strict=False)) | seen.kwargs
            if given["weight"] is not weight:
                return
            version = given["input"]._version

            def add(gradient: Tensor) -> None:
                if not self.open:
                    return
                if given["input"]._version != version:
                    raise RuntimeError(
                        f"what {seen.call.module or 'the model'} reads was written to in place after it ran, so that "
                        f"the Kronecker factors of {layer.weight} cannot be had; make it work out of place, or list "
                        "the layer in ignore="
                    )
                with torch.no_grad():
                    self._add(layer, seen, gradient)

            out.register_hook(add)

        return look

    def _add(self, layer: FactorLayer, seen: Seen, gradient: Tensor) -> None:
        name, found = seen.call.name, None
        for rows in input_rows(name, seen.args, seen.kwargs):
            rows = rows if layer.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
            found = rows.T @ rows if found is None else found.addmm_(rows.T, rows)
        assert found is not None
        channels = -1 if name == "linear" else gradient.ndim - int(name[-2]) - 1
        values = _real(gradient).movedim(channels, -1).reshape(-1, gradient.shape[channels])
        values = values * (seen.batch / self.scale)  # of each sample's own loss
        samples = 0 if (layer.weight, seen.forward) in self._counted else seen.batch
        self._counted.add((layer.weight, seen.forward))
        counts = torch.zeros(3, dtype=torch.float64, device=values.device)
        counts[0], counts[1] = samples, len(values)  # filled in there: a copy would wait for what the device has to do
        outputs = values.T @ values
        new = Factors(found, outputs, outputs.new_zeros(len(outputs), len(found)), counts)
        before = self.sums.get(layer.weight)
        self.sums[layer.weight] = new if before is None else before.plus(new)


class RunningFactors:
    """Kronecker factors of a model's layers, averaged while it trains.

    Between `begin` and `update` the samples that run are looked at. Nothing of the model changes.

    Args:
        decay: of the averages, per update.

    Attributes:
        layers: those that factors are kept of, by the name of their weight.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.layers: dict[str, FactorLayer] = {}
        self._factors: dict[str, Factors] = {}  # with counts of 0 where nothing was seen, which only a device knows
        self._skipped: int | Tensor = 0
        self._cut = Plan()  # what the factors have followed
        self._capture: Capture | None = None
        self._watch: Watch | None = None
        self._parameters: dict[str, Tensor] = {}
        self._gradients: dict[str, tuple[Tensor, int]] = {}

    def know(self, graph: ChannelGraph, weights: Iterable[str]) -> None:
        """Keep factors of the layers with these weights, of those that have some."""
        found = {name: factor_layer(graph, name) for name in dict.fromkeys(weights)}
        self.layers = {name: layer for name, layer in found.items() if isinstance(layer, FactorLayer)}
        self._factors = {name: factors for name, factors in self._factors.items() if name in self.layers}

    @property
    def factors(self) -> dict[str, Factors]:
        """Factors of the layers that were seen, by the name of their weight; waits for the device."""
        return {name: found for name, found in self._factors.items() if found.counts[0] > 0}

    @property
    def skipped(self) -> int:
        """Updates of a layer that were left out, as not all was finite; waits for the device."""
        return int(self._skipped)

    @property
    def looking(self) -> bool:
        """Whether samples are looked at."""
        return self._capture is not None

    def begin(self, model: nn.Module) -> None:
        """Look at samples from now on.

        Raises:
            RuntimeError: as `taps.Watch.begin`.
        """
        self.end()
        self._parameters = dict(model.named_parameters())
        self._capture = Capture(self.layers, self._parameters)
        self._watch = Watch(model, self._capture.looks)
        self._watch.begin()

    def end(self) -> None:
        """Look no more, and forget what was not averaged yet."""
        if self._watch is not None:
            self._watch.end()
        self._watch = self._capture = None
        self._parameters = {}
        self._gradients = {}

    def expect(self, scale: Tensor | float) -> None:
        """The next gradients are of the loss, a mean over samples times a scale; others are not looked at."""
        if self._capture is not None:
            self._capture.open, self._capture.scale = True, scale

    def settle(self) -> None:
        """The backward pass is over."""
        if self._capture is not None and self._watch is not None:
            self._capture.open = False
            self._watch.settle()

    def note(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Gradients of the mean loss by parameters, the same on all processes."""
        for name, layer in self.layers.items() if self.looking else ():
            gradient = gradients.get(name)
            if gradient is None:
                continue
            shift = None
            if layer.bias is not None:
                shift = gradients.get(layer.bias)
                shift = torch.zeros_like(self._parameters[layer.bias]) if shift is None else shift
            rows = layer.rows_of(gradient, shift).detach()
            before = self._gradients.get(name)
            self._gradients[name] = (rows.clone(), 1) if before is None else (before[0] + rows, before[1] + 1)

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        """Average what was seen since `begin`, and look no more; a layer with anything not finite is left as it is.

        Args:
            total: sums a tensor over processes.
        """
        assert self._capture is not None
        seen = self._capture.sums
        for name, layer in self.layers.items():
            new = seen.get(name)
            if new is None:
                weight = self._parameters[name]
                bias = None if layer.bias is None else self._parameters[layer.bias]
                new = Factors.zeros(layer.rows_of(weight.detach(), bias if bias is None else bias.detach()))
            gradient, count = self._gradients.get(name, (new.gradient, 0))
            counts = total(new.counts)
            counts[2] = count
            new = Factors(total(new.inputs), total(new.outputs), gradient.to(new.gradient), counts)
            before = self._factors.get(name) or Factors.zeros(new.gradient)
            finite = new.finite
            self._factors[name] = before.faded(self.decay, new).where(finite & (new.counts[0] > 0), before)
            self._skipped = ~finite + self._skipped
        self.end()

    def follow(self, plan: Plan) -> bool:
        """Lose the rows of channels that were cut.

        Args:
            plan: what the model is cut to now.

        Returns:
            Whether it was cut since.
        """
        if plan is self._cut:
            return False
        for name, dims in plan.relative_to(self._cut).items():
            for held in (self._factors, {} if self._capture is None else self._capture.sums):
                if name in held:
                    held[name] = held[name].cut(*self._rows(name, dims, held[name]))
            if name in self._gradients:
                rows, count = self._gradients[name]
                inputs, outputs = self._rows(name, dims, Factors.zeros(rows))
                self._gradients[name] = rows[outputs.to(rows.device)][:, inputs.to(rows.device)], count
        self._cut = plan
        return True

    def blank(self, plan: Plan) -> None:
        """Zeros in the rows of channels that are held at zero."""
        for name, dims in plan.kept.items():
            if name in self._factors:
                found = self._factors[name]
                self._factors[name] = found.blanked(*self._rows(name, dims, found))

    def _rows(self, name: str, dims: Mapping[int, Tensor], factors: Factors) -> tuple[Tensor, Tensor]:
        """Rows of A and of G that stay, from the indices that stay on the weight's axes."""
        layer = self.layers[name]
        outputs = dims.get(layer.axis, torch.arange(len(factors.outputs)))
        inputs = torch.arange(len(factors.inputs))
        if 1 - layer.axis in dims:
            shift = inputs[-1:] if layer.bias is not None else inputs[:0]
            inputs = torch.cat([layer.inputs_at(dims[1 - layer.axis].cpu()[:, None]).flatten(), shift])
        return inputs, outputs.cpu()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and names only."""
        factors = {name: dict(vars(found.copy_to(torch.device("cpu")))) for name, found in self.factors.items()}
        return {"factors": factors, "cut": self._cut.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take up where `state_dict` was taken."""
        wanted = {field.name for field in fields(Factors)}
        for name, found in state["factors"].items():
            shape = (*found["outputs"].shape[:1], *found["inputs"].shape[:1]) if found.keys() == wanted else None
            if shape is None or found["gradient"].shape != shape or found["counts"].shape != (3,):
                raise IncompatibleCheckpoint(f"the factors of {name!r} in the checkpoint do not fit each other")
        self._factors = {name: Factors(**found).copy_to(device) for name, found in state["factors"].items()}
        self._cut = Plan.from_state_dict(state["cut"])
        self._skipped = int(state["skipped"])

    def clear(self, cut: Plan) -> None:
        """Forget all; what comes is of a model that was cut to this plan."""
        self.end()
        self._factors, self._skipped, self._cut = {}, 0, cut


def input_rows(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """What each position of a layer's output reads: (R, F) rows in the order of its filters, some samples at a time.

    Args:
        name: of the function, one of those that have factors.
        args, kwargs: what it got.
    """
    given = dict(zip(("input", "weight", "bias", *_LAYERS[name][0]), args, strict=False)) | dict(kwargs)
    x = _real(given["input"].detach())
    if name == "linear":
        yield x.reshape(-1, x.shape[-1])
        return
    kernel = tuple(given["weight"].shape[2:])
    dims = len(kernel)
    x = x if x.ndim == dims + 2 else x[None]
    stride, dilation = (_each(given.get(key, 1), dims) for key in ("stride", "dilation"))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    transposed = "transpose" in name
    if transposed:  # a convolution of what is spread out by the stride, with the kernel turned around
        stay = _each(given.get("padding", 0), dims)
        before = [r - p for r, p in zip(reach, stay, strict=True)]
        after = [b + e for b, e in zip(before, _each(given.get("output_padding", 0), dims), strict=True)]
    else:
        before, after = _paddings(given.get("padding", 0), reach)
    pads = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    entries = x[0].numel() * math.prod(kernel)
    for part in torch.split(x, max(1, _MOST_ENTRIES // max(1, entries))):
        part = F.pad(_spread(part, stride) if transposed else part, pads)
        for d in range(dims):  # windows along this axis go last
            part = part.unfold(2 + d, reach[d] + 1, 1 if transposed else stride[d])[..., :: dilation[d]]
        part = part.flip(tuple(range(-dims, 0))) if transposed else part
        yield part.movedim(1, 1 + dims).flatten(1 + dims).flatten(0, dims)  # (N, *positions, I, *kernel)


def _paddings(padding: Any, reach: Sequence[int]) -> tuple[list[int], list[int]]:
    """What is added before and after each axis."""
    if isinstance(padding, str):
        whole = reach if padding == "same" else [0] * len(reach)
        return [n // 2 for n in whole], [n - n // 2 for n in whole]
    both = list(_each(padding, len(reach)))
    return both, both


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """With stride - 1 zeros between neighbours."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    out = x.new_zeros(*x.shape[:2], *sizes)
    places: tuple[Any, ...] = (..., *[slice(None, None, s) for s in stride])
    out[places] = x
    return out


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """One number for each axis, as functions take them."""
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * dims if len(given) == 1 else given


def _real(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.float() if x.dtype.itemsize < 4 else x


def power_iteration(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 20, tolerance: float = 1e-3
) -> tuple[float, Tensor]:
    """The eigenvalue of largest magnitude of a symmetric matrix, with its sign.

    Its magnitude is the length of ``H v``, which never falls from step to step and never exceeds the spectral radius;
    its sign is that of ``v^T H v``.

    Args:
        product: v -> H v.
        start: (N,), not all zero.
        iterations: most products.
        tolerance: ends earlier once the relative change of the magnitude is below.

    Returns:
        The eigenvalue, and the unit vector it was read from.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, -3.0, 2.0]))
        >>> round(power_iteration(lambda v: matrix @ v, torch.ones(3), 100, 1e-9)[0], 4)
        -3.0
    """
    vector = start / start.norm()
    value = 0.0
    for _ in range(iterations):
        image = product(vector)
        size, along = float(image.double().norm()), float(vector.double() @ image.double())
        before, value = abs(value), math.copysign(size, along)
        if not 0 < size < math.inf or abs(size - before) <= tolerance * size:
            break
        vector = image / image.norm()
    return value, vector


def hessian_product(gradient: Sequence[Tensor | None], parameters: Sequence[Tensor], vector: Tensor) -> Tensor:
    """(N,) the exact Hessian of a loss times a vector.

    Args:
        gradient: of the loss by the parameters, with a graph (``create_graph=True``), which stays; None or without a
            graph where the Hessian is 0.
        parameters: what it was differentiated by.
        vector: (N,) for all entries of the parameters, one after the other.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gradient = torch.autograd.grad((x**3).sum(), [x], create_graph=True)  # 3 x^2
        >>> hessian_product(gradient, [x], torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
    """
    parts = torch.split(vector, [p.numel() for p in parameters])
    reached = [
        (g, v.view_as(g).to(g)) for g, v in zip(gradient, parts, strict=True) if g is not None and g.requires_grad
    ]
    if not reached:
        return torch.zeros_like(vector)
    product = torch.autograd.grad(
        [g for g, _ in reached],
        parameters,
        grad_outputs=[v for _, v in reached],
        retain_graph=True,
        allow_unused=True,
    )
    flat = [torch.zeros_like(p) if x is None else x for x, p in zip(product, parameters, strict=True)]
    return torch.cat([x.flatten() for x in flat]).to(vector)
