"""Masks on weights: zero what goes, keep gradients away from it, hold it at zero.

The one engine of all methods that mask. Work per step is a few calls over all parameters at once (``torch._foreach``).
"""

from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn


class Masks:
    """Bool masks on parameters, True = keep.

    Args:
        parameters: name -> parameter; those without a mask are left alone.
        masks: name -> bool tensor of the shape that the parameter has now.

    Nothing is zeroed before :meth:`zero`, :meth:`hold` or :meth:`update` is called. Masks follow their parameters to
    another device or dtype by themselves.

    Raises:
        ValueError: if a mask has no parameter, another shape or another dtype than bool.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> masks = Masks({"weight": layer.weight}, {"weight": torch.tensor([[True, False]])})
        >>> masks.zero()
        >>> layer.weight[0, 1].item(), masks.density()
        (0.0, 0.5)
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        self._multipliers: dict[str, Tensor] = {}  # 0 or 1, as the parameter: ready to multiply with
        self._kept: dict[str, int] | None = {}  # None until it is asked for, as is what follows
        self._removed: int | None = 0
        self._set(masks)

    def _set(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if name not in self._parameters:
                raise ValueError(
                    f"mask for {name!r}, but there is no such parameter among {sorted(self._parameters)[:5]} ..."
                )
            wanted = self._parameters[name].shape
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != wanted:
                got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"mask of {name!r} must be a bool tensor of shape {tuple(wanted)}, got {got}")
        multipliers = {name: _like(mask, self._parameters[name]) for name, mask in masks.items()}
        kept = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
        self._multipliers, self._kept = multipliers, kept
        self._removed = sum(mask.numel() for mask in masks.values()) - sum(kept.values())

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Replace all masks and put zeros under the new ones; a parameter that is not named is no longer masked.

        Entries that are turned on again keep the value they have, zero as a rule.

        Raises:
            ValueError: as for the constructor; nothing has changed then.
        """
        self._set(masks)
        self.zero()

    def switch(self, masks: Mapping[str, Tensor]) -> None:
        """Replace all masks between events: the device is asked nothing, and values are left as they are.

        Args:
            masks: name -> bool mask of the shape and on the device of its parameter.
        """
        self._multipliers = {name: _like(mask, self._parameters[name]) for name, mask in masks.items()}
        self._kept = self._removed = None

    def cut(self, positions: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Follow parameters that were cut, and put zeros under the masks: name -> dim -> (n,) positions that stayed."""
        masks = self.as_it_was()
        for name, dims in positions.items():
            for dim, index in dims.items():
                if name in masks:
                    masks[name] = masks[name].index_select(dim, index.to(masks[name].device))
        self.update(masks)

    @torch.no_grad()
    def zero(self) -> None:
        """Put zeros under the masks into the weights, in place; infinities and NaN become zero as well."""
        for name, multiplier in self._aligned().items():
            parameter = self._parameters[name].mul_(multiplier).add_(0)  # five times as fast as filling; -0 is 0 then
            if not torch.isfinite(parameter.sum()):
                parameter.masked_fill_(multiplier == 0, 0)

    @torch.no_grad()
    def hold(self) -> None:
        """Put zeros under the masks once more, after an optimizer step; finite weights are taken for granted."""
        if self._removed != 0 and (multipliers := self._aligned()):
            torch._foreach_mul_([self._parameters[name] for name in multipliers], list(multipliers.values()))

    @torch.no_grad()
    def mask_gradients(self, only: Container[str] | None = None) -> None:
        """Multiply each ``.grad`` by its mask in place, where there is one.

        Args:
            only: names of the parameters whose gradients are wanted now; None for all.

        A NaN or infinite gradient gives NaN under the mask as well: a batch that has one must not be stepped on.

        Raises:
            RuntimeError: if a gradient is sparse.
        """
        if self._removed == 0:
            return
        gradients, multipliers = [], []
        for name, multiplier in self._aligned().items():
            gradient = self._parameters[name].grad
            if gradient is None or (only is not None and name not in only):
                continue
            if gradient.layout != torch.strided:
                raise RuntimeError(
                    f"parameter {name!r} has a sparse gradient, which cannot be masked; give its layer sparse=False"
                )
            gradients.append(gradient)
            multipliers.append(multiplier)
        if gradients:
            torch._foreach_mul_(gradients, multipliers)

    def as_bool(self) -> dict[str, Tensor]:
        """Return name -> bool mask, True = keep, on the device of the parameter."""
        return {name: multiplier != 0 for name, multiplier in self._aligned().items()}

    def as_it_was(self) -> dict[str, Tensor]:
        """Return name -> bool mask of the shape it was given, also where its parameter was cut since."""
        return {name: multiplier != 0 for name, multiplier in self._multipliers.items()}

    def counts(self) -> dict[str, int]:
        """Return how many entries are kept of each masked parameter."""
        if self._kept is None:
            self._kept = {name: int(multiplier.count_nonzero()) for name, multiplier in self._multipliers.items()}
        return dict(self._kept)

    def counted(self) -> dict[str, Tensor]:
        """Return what `counts` does as 0-d int64 tensors, which do not wait for the device."""
        return {name: multiplier.count_nonzero() for name, multiplier in self._multipliers.items()}

    def of(self, name: str) -> Tensor:
        """Return the bool mask of one parameter, True = keep, on its device."""
        return self._aligned()[name] != 0

    def removed(self) -> int:
        """Return how many entries are masked, over all parameters."""
        if self._removed is None:
            self._removed = sum(m.numel() for m in self._multipliers.values()) - sum(self.counts().values())
        return self._removed

    def density(self) -> float:
        """Return entries kept / all entries over the masked parameters; 1 if nothing is masked."""
        entries = sum(multiplier.numel() for multiplier in self._multipliers.values())
        return sum(self.counts().values()) / entries if entries else 1.0

    def densities(self) -> dict[str, float]:
        """Return entries kept / all entries for each masked parameter."""
        kept = self.counts()
        return {
            name: kept[name] / multiplier.numel() if multiplier.numel() else 1.0
            for name, multiplier in self._multipliers.items()
        }

    def nonzero_kept(self) -> dict[str, int]:
        """Return for each masked parameter how many of the entries it keeps are not zero."""
        return {name: int((self._parameters[name] * m).count_nonzero()) for name, m in self._aligned().items()}

    def _aligned(self) -> dict[str, Tensor]:
        """Return the multipliers, brought after their parameters to where these are now."""
        for name, multiplier in self._multipliers.items():
            parameter = self._parameters[name]
            if multiplier.shape != parameter.shape:
                raise RuntimeError(
                    f"parameter {name!r} was cut from {tuple(multiplier.shape)} to {tuple(parameter.shape)} under its "
                    "mask; call update() with the mask of the new shape"
                )
            if multiplier.device != parameter.device or multiplier.dtype != parameter.dtype:
                self._multipliers[name] = _like(multiplier, parameter)
        return self._multipliers


@torch.no_grad()
def clear_off(value: Tensor, mask: Tensor) -> None:
    """Put zeros where a bool mask is False, in place, also instead of NaN and infinities.

    Nothing is asked of the device, and it is several times as fast as filling: all bits are cleared there.

    Args:
        value: of any dtype.
        mask: of its shape, on its device; True = keep.
    """
    bits = _BITS.get(value.dtype.itemsize)
    if bits is None or value.layout != torch.strided:
        value.masked_fill_(~mask, 0)
    else:
        value.view(bits).bitwise_and_(mask.to(bits).neg_())  # -1 is all ones


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def _like(mask: Tensor, parameter: Tensor) -> Tensor:
    # the strides of the parameter too: only then can all of them be multiplied in one kernel
    return torch.empty_like(parameter, requires_grad=False).copy_(mask)
