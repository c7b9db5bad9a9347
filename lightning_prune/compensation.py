"""New values for weights that stay, to make up for channels that go: applied just before the cut, or taken back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Compensation:
    """Factors on, and shifts of, parameters and buffers, in indices of the model before the cut.

    Attributes:
        factors: name -> {dim: (size of that dimension,) factors}.
        shifts: name -> what is added, broadcast to its shape, after the factors.
    """

    factors: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    shifts: Mapping[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.factors or self.shifts)

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters and buffers that get new values."""
        return tuple(dict.fromkeys((*self.factors, *self.shifts)))

    def apply(self, model: nn.Module) -> dict[str, Tensor]:
        """Give a model, or a copy of it, the new values in place.

        Returns:
            name -> copy of the values before; `restore` puts them back.

        Raises:
            ValueError: if a factor has not the length of its dimension, or a value is not finite.
        """
        tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        new: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in self.names:
                value = tensors[name].detach().clone()
                for dim, factor in self.factors.get(name, {}).items():
                    if factor.shape != (value.shape[dim],):
                        raise ValueError(
                            f"factors on dimension {dim} of {name!r} must have shape ({value.shape[dim]},), got "
                            f"{tuple(factor.shape)}"
                        )
                    value *= factor.to(value).reshape([-1 if d == dim else 1 for d in range(value.ndim)])
                if name in self.shifts:
                    value += self.shifts[name].to(value)
                if not bool(torch.isfinite(value).all()):
                    raise ValueError(f"compensation of {name!r} is not finite")
                new[name] = value
            before = {name: tensors[name].detach().clone() for name in new}
            for name, value in new.items():
                tensors[name].copy_(value)
        return before


def restore(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Put back what `Compensation.apply` returned."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in before.items():
            tensors[name].copy_(value)
