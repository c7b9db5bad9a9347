"""Prove a cut: hold the cut network against the uncut one with the removed coordinates at zero.

Outputs have to agree, and with them the *witnesses*: what a network that chooses (a detector, say) chooses by. What
may differ with good reason is made the same beforehand (`lightning_prune.replay`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.errors import UnsafeCut
from lightning_prune.graph.trace import Calls, output_tensors, run, undisturbed
from lightning_prune.replay import Aligned, Notes, Record, Replay

_ROUNDING = 5e-6  # float32 stayed below 1.1e-6 on ten architectures; what lies above is looked at in double precision
_HOPELESS = 0.05  # relative difference of float32 that no rounding explains
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_NEARLY_ZERO = 1e-12  # in place of zero, where the network divides by the length of a weight


@dataclass(frozen=True)
class Proof:
    """What was seen when a cut was tried.

    Attributes:
        worst: largest difference of an output or of a witness, relative to its largest entry; 0 if nothing was
            compared.
        inexact: where the code computes with a size that the cut changed (``y / y.shape[1]``), so that the cut network
            differs from the zeroed one by that number.
        compared: False on the meta device, where only shapes could be.
    """

    worst: float = 0.0
    inexact: tuple[str, ...] = ()
    compared: bool = True


class Trial(Protocol):
    """A cut that can be applied and taken back."""

    @property
    def model(self) -> nn.Module:
        """What is cut."""

    def trial_values(self) -> AbstractContextManager[None]:
        """Inside, what is constant has random values, the same ones zeroed and cut."""

    def zero(self, nearly: float = 0.0) -> None:
        """Put removed coordinates at zero, or nearly so."""

    def apply(self) -> None:
        """Cut."""

    def undo(self) -> None:
        """Put everything back, after `zero` or `apply`."""

    def gone(self) -> Mapping[int, Tensor]:
        """Identity of a tensor of one dimension -> the indices of it that go."""

    def again(self) -> Trial:
        """Return the same cut of the model as it is now."""


def prove(trial: Trial, example_inputs: Any, training: bool = True) -> Proof:
    """Apply a cut that was seen to be right: it runs, and computes what the zeroed network computes.

    An ordinary model runs twice, zeroed and cut; twice more in double precision if the difference may be rounding.

    Args:
        trial: not yet applied; applied on return.
        example_inputs: what to run on. Where it is constant, noise is added: zeros would tell no channel from another.
        training: also run the cut network in train mode.

    Returns:
        How close it came.

    Raises:
        UnsafeCut: and then nothing has changed.
    """
    model = trial.model
    try:
        with undisturbed(model):
            if any(p.is_meta for p in model.parameters()):
                proof = _same_shapes(trial, example_inputs)
            else:
                proof = _same_values(trial, example_inputs)
            trial.apply()
        if training:
            with undisturbed(model):
                model.train()
                run(model, example_inputs, 2)
    except UnsafeCut:
        trial.undo()
        raise
    except Exception as error:
        trial.undo()
        raise UnsafeCut(f"the cut model does not run: {type(error).__name__}: {error}") from error
    except BaseException:
        trial.undo()
        raise
    return proof


def difference(trial: Trial, example_inputs: Any) -> float:
    """Largest relative difference between the outputs of the zeroed and of the cut network, both as they are.

    Statistics, choices and derived numbers are each network's own, so this is what a user sees. Outputs that have
    another shape in the cut network (it found more boxes, say) are left out.

    Args:
        trial: not applied; not applied on return.
        example_inputs: what to run on.

    Returns:
        At least 0; NaN if no output could be compared.
    """
    with undisturbed(trial.model):
        try:
            with trial.trial_values():
                seen, inputs = _zeroed(trial, example_inputs, replay=False)
                got = _cut(trial, inputs)
        finally:
            trial.undo()
    pairs = [(a, b) for a, b in zip(seen.outputs, got, strict=False) if a.shape == b.shape and a.numel()]
    return max((_distance(a, b) for a, b in pairs), default=math.nan)


def _same_shapes(trial: Trial, example_inputs: Any) -> Proof:
    expected = _outputs(trial.model, example_inputs)
    trial.apply()
    _check_shapes(expected, _outputs(trial.model, example_inputs))
    trial.undo()
    return Proof(compared=False)


def _same_values(trial: Trial, example_inputs: Any) -> Proof:
    """Compare in the model's own precision; in double precision what may be rounding there, or an error as small."""
    found = _compared(trial, example_inputs)
    tensors = [t for t in (*trial.model.parameters(), *trial.model.buffers()) if t.is_floating_point()]
    coarsest = max((torch.finfo(t.dtype).eps for t in tensors), default=0.0)
    own = coarsest <= torch.finfo(torch.float64).eps
    if own or found.worst <= _ROUNDING or (coarsest <= torch.finfo(torch.float32).eps and found.worst > _HOPELESS):
        return found.proof(_tolerance(tensors))
    double = _in_double(trial, tensors, example_inputs)
    return found.proof(_tolerance(tensors)) if double is None else double.proof(_TOLERANCE[torch.float64])


def _tolerance(tensors: Sequence[Tensor]) -> float:
    return max((_TOLERANCE.get(t.dtype, 1e-4) for t in tensors), default=1e-4)


def _in_double(trial: Trial, tensors: Sequence[Tensor], example_inputs: Any) -> _Found | None:
    """The comparison once more in double precision; None if the model's code does not run in it."""
    own = [t.data for t in tensors]
    twin = None
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        twin = trial.again()
        return _compared(twin, example_inputs)
    except Exception:  # it holds a dtype in its code, or the device has no double precision
        return None
    finally:
        if twin is not None:
            twin.undo()
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data = data


@dataclass
class _Found:
    """How far apart two networks were, and where most."""

    worst: float = 0.0
    where: str = ""
    inexact: tuple[str, ...] = ()

    def see(self, distance: float, where: str) -> None:
        if not distance <= self.worst:
            self.worst, self.where = distance, where

    def proof(self, allowed: float) -> Proof:
        if not self.worst <= allowed:
            raise UnsafeCut(
                f"the cut model computes something else: relative difference {self.worst:.2g}{self.where}, "
                f"allowed {allowed:.2g}"
            )
        return Proof(self.worst, self.inexact)


def _compared(trial: Trial, example_inputs: Any) -> _Found:
    """Run the zeroed and the cut network side by side; the trial is not applied on return."""
    with trial.trial_values():
        seen, inputs = _zeroed(trial, example_inputs)
        if not seen.has_nan:
            return _found(trial, inputs, seen)
    seen, inputs = _zeroed(trial, example_inputs)  # a constant may have stood for something that has to be positive
    if seen.has_nan:
        raise UnsafeCut("the network computes NaN on its example input, so no cut of it can be proved")
    return _found(trial, inputs, seen)


def _found(trial: Trial, inputs: Any, seen: _Zeroed) -> _Found:
    replay = Replay(trial.model, seen.notes)
    got = _cut(trial, inputs, replay)
    _check_shapes(seen.outputs, got)
    found = _Found(inexact=tuple(dict.fromkeys(replay.inexact)))
    largest = 0.0
    for a, b in zip(seen.outputs, got, strict=True):
        if a.numel():
            found.see(_distance(a, b), "")
            largest = max(largest, _largest(a))
    for a, b, what in replay.witnesses:
        eps = torch.finfo(a.dtype).eps  # a witness may be nothing but rounding of what the network computes with
        at_least = largest * eps / (_TOLERANCE[a.dtype] if a.dtype == torch.float64 else _ROUNDING)
        found.see(_distance(a, b, at_least), f" in what {what} chooses by")
    if seen.notes.is_dead or largest == 0:  # the outputs say nothing of what lies before the layer that is dead
        for place, lengths in seen.notes.lengths.items():
            for a, b in zip(lengths, replay.notes.lengths.get(place, []), strict=False):
                found.see(_distance(a, b), f" in the length of what {place[0] or 'the model'} computes")
    return found


def _largest(tensor: Tensor) -> float:
    size = tensor.abs()
    return float(torch.where(torch.isfinite(size), size, 0).max())


def _distance(a: Tensor, b: Tensor, at_least: float = 0.0) -> float:
    """Largest difference relative to the largest entry of ``a``; infinite where only one of them is finite."""
    if not a.numel():
        return 0.0
    if torch.finfo(a.dtype).bits < 32:
        a, b = a.float(), b.float()
    finite = torch.isfinite(a)
    if not bool(finite.all()):
        if not torch.equal(finite, torch.isfinite(b)):
            return math.inf
        same = torch.equal(torch.nan_to_num(a[~finite]), torch.nan_to_num(b[~finite]))
        a, b = a[finite], b[finite]
        if not same or not a.numel():
            return 0.0 if same else math.inf
    scale = max(float(a.abs().max()), at_least)
    return float((a - b).abs().max()) / (scale if scale > 0 else 1.0)


def _check_shapes(expected: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    shapes = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in got]
    if shapes[0] != shapes[1]:
        raise UnsafeCut(f"outputs change shape, {shapes[0]} to {shapes[1]}")


@dataclass
class _Zeroed:
    """What the zeroed network computed."""

    outputs: list[Tensor]
    notes: Notes

    @property
    def has_nan(self) -> bool:
        return any(bool(torch.isnan(t).any()) for t in self.outputs)


def _zeroed(trial: Trial, example_inputs: Any, replay: bool = True) -> tuple[_Zeroed, Any]:
    """Outputs and notes of the zeroed network, and what it ran on; the trial is taken back on return."""

    def attempt(inputs: Any, nearly: float = 0.0) -> _Zeroed:
        trial.zero(nearly)
        notes = Notes()
        record = Record(trial.model, notes, trial.gone()) if replay else None
        return _Zeroed(_outputs(trial.model, inputs, record), notes)

    inputs = with_noise(example_inputs)
    try:
        try:
            seen = attempt(inputs)
        except Exception:  # not every value will do for it
            inputs = example_inputs
            seen = attempt(inputs)
        if seen.has_nan:  # weight normalisation divides by the length of a row that is zero
            seen = attempt(inputs, _NEARLY_ZERO)
    finally:
        trial.undo()
    return seen, inputs


def _cut(trial: Trial, inputs: Any, replay: Replay | None = None) -> list[Tensor]:
    trial.apply()
    try:
        return _outputs(trial.model, inputs, replay)
    finally:
        trial.undo()


def _outputs(model: nn.Module, inputs: Any, mode: Aligned | None = None) -> list[Tensor]:
    """Floating outputs in eval mode, of the same random numbers every time; no gradients."""
    model.eval()
    torch.default_generator.manual_seed(0)
    for device in {p.device for p in model.parameters() if p.device.type == "cuda"}:
        torch.cuda.default_generators[device.index or 0].manual_seed(0)
    if mode is None:
        out = run(model, inputs, 1)
    else:
        with mode.places(), mode:
            out = run(model, inputs, 1)
    return [t for t in output_tensors(out) if t.is_floating_point() or t.is_complex()]


def with_noise(example_inputs: Any) -> Any:
    """The same inputs, with noise in those that are constant: zeros or ones would tell no channel from another."""
    generator = torch.Generator().manual_seed(0)

    def noisy(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta and is_constant(value):
            return value + torch.randn(value.shape, generator=generator).to(value)
        return value

    if isinstance(example_inputs, Calls):
        return Calls(tuple((module, *tree_map(noisy, (args, kwargs))) for module, args, kwargs in example_inputs.calls))
    return tree_map(noisy, example_inputs)


def is_constant(tensor: Tensor) -> bool:
    """Whether a tensor has more than one entry, all of them equal."""
    if tensor.numel() < 2:
        return False
    first = tensor[(0,) * tensor.ndim]
    return bool(first == tensor[(-1,) * tensor.ndim]) and bool((tensor == first).all())
