"""Sums and sample counts per channel, kept over batches and joined over processes.

Two lifetimes: the *window* is what was measured since the last event; *kept* tensors (moving averages) live on from
event to event and lose the entries of channels that go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torchmetrics import Metric

from lightning_prune.errors import NonFiniteScore
from lightning_prune.state import Fields

AT_ONCE = 16
"""Batches that are added to the sums together."""
STATE: Fields = {
    "sizes": dict[str, int],
    "total": Tensor,
    "count": Tensor,
    "skipped": Tensor,
    "kept": dict[str, dict[str, Tensor]],
}
"""What `Statistics.state_dict` returns."""


def samples_in(batch: Any) -> int:
    """Number of samples in a batch: the first size of its first tensor."""
    sizes = [t.shape[0] for t in tree_flatten(batch)[0] if isinstance(t, Tensor) and t.ndim]
    return int(sizes[0]) if sizes else 1


class ChannelSums(Metric):
    """Sum of a vector over batches, and over how many finite batches each entry was summed; both join over processes.

    A batch with a NaN or infinite entry is left out whole, without asking the device.

    Args:
        size: length of the vector.
    """

    total: Tensor
    count: Tensor
    skipped: Tensor
    full_state_update = False

    def __init__(self, size: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("skipped", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, measured: Tensor | None = None, weight: int = 1) -> None:
        """Add one batch.

        Args:
            values: (size,), 0 where nothing was measured.
            measured: (size,) bool; None for all.
            weight: what it counts for: 1 for a value of the batch, the number of samples for a sum over them.
        """
        finite = torch.isfinite(values).all()
        self.total.add_(torch.where(finite, values.to(self.total.dtype), 0.0))  # setting a state anew takes longer
        self.count.add_(finite if measured is None else finite & measured, alpha=weight)
        self.skipped.add_(~finite)

    def compute(self) -> Tensor:
        """(size,) mean over the finite batches; NaN before the first."""
        return self.total / self.count


class SampleSums:
    """Sums over the samples of calibration batches, of tensors of any shape, in float64; joined over processes.

    A batch with a NaN or infinite entry is left out whole, and counted.

    Args:
        shapes: of what is summed, by name; the same on all processes.
        device: where it is summed.

    Attributes:
        samples: how many were summed, of this process.
        skipped: batches left out, of this process.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], device: torch.device) -> None:
        self.samples = 0
        self.skipped = 0
        self._device = device
        self._sums = {
            name: torch.zeros(tuple(shape), dtype=torch.float64, device=device) for name, shape in shapes.items()
        }

    def add(self, sums: Mapping[str, Tensor], samples: int) -> bool:
        """Add one batch: name -> sum over its samples, names left out are 0; returns whether it was finite."""
        if not all(bool(torch.isfinite(value).all()) for value in sums.values()):
            self.skipped += 1
            return False
        for name, value in sums.items():
            self._sums[name] += value.detach().to(self._sums[name])
        self.samples += samples
        return True

    def means(self, total: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """name -> mean over the samples of all processes, float64.

        Args:
            total: sums a tensor over processes.

        Raises:
            NonFiniteScore: if no batch was finite.
        """
        seen = [float(self.samples), float(self.skipped)]
        counts = total(torch.tensor(seen, dtype=torch.float64, device=self._device))
        if counts[0] == 0:
            raise NonFiniteScore(
                f"there is no finite calibration batch to score by: {int(counts[1])} batches were not finite; "
                "look at the loss and at the weights"
                if counts[1]
                else "there is no calibration batch to score by; the loader gave none"
            )
        return {name: total(value) / counts[0] for name, value in self._sums.items()}


class Statistics:
    """The statistics of one method on one model.

    Args:
        sizes: group -> number of channels, in data-flow order.
        device: where batches are summed.

    Attributes:
        kept: group -> name -> (C,) tensor; the dicts stay the same objects, so that views can hold them.
    """

    def __init__(self, sizes: Mapping[str, int], device: torch.device) -> None:
        self.kept: dict[str, dict[str, Tensor]] = {name: {} for name in sizes}
        self._device = device
        self._sizes = dict(sizes)
        self._waiting: list[tuple[Tensor, Tensor | None, int]] = []  # batches that are not in the window yet

    @property
    def _window(self) -> ChannelSums:
        """What is summed since the last event."""
        for values, measured, weight in self._waiting:  # one by one in their order, so that all sums stay the same
            self._sums.update(values, measured, weight)
        self._waiting.clear()
        return self._sums

    @cached_property
    def _sums(self) -> ChannelSums:
        """Made when it is asked for, as most methods sum nothing."""
        with self._device:  # made there: a copy would wait for what the device has to do
            return ChannelSums(sum(self._sizes.values())).to(self._device)

    def add(self, values: Mapping[str, Tensor], weight: int = 1) -> None:
        """Add what one batch says: group -> (C,); a group that is left out was not measured.

        A few batches wait and are summed together: a dozen small operations at every step take several times as long.

        Args:
            values: of one batch, or summed over its samples.
            weight: 1, or the number of samples.
        """
        if len(values) == len(self._sizes):
            self._waiting.append((torch.cat([values[name] for name in self._sizes]), None, weight))
        else:
            spans = self._sizes.items()
            parts = [values[n] if n in values else torch.zeros(size, device=self._device) for n, size in spans]
            known = [torch.full((size,), n in values, device=self._device) for n, size in spans]
            self._waiting.append((torch.cat(parts), torch.cat(known), weight))
        if len(self._waiting) == AT_ONCE:
            _ = self._window

    def unmeasured(self, total: Callable[[Tensor], Tensor] = torch.clone) -> list[str]:
        """Groups without a finite batch in the window; ``total`` sums a tensor over processes."""
        counts = torch.split(total(self._window.count), list(self._sizes.values()))
        return [name for name, count in zip(self._sizes, counts, strict=True) if not bool(count.any())]

    @property
    def skipped(self) -> int:
        """Batches that were left out of the window, of this process."""
        return int(self._window.skipped)

    def means(self) -> dict[str, Tensor]:
        """group -> (C,) mean over the window and over processes."""
        values = self._window.compute().float().reshape(-1)  # torchmetrics makes a scalar of a single entry
        return dict(zip(self._sizes, torch.split(values, list(self._sizes.values())), strict=True))

    def cut(self, keep: Mapping[str, Tensor]) -> None:
        """Begin a new window; kept tensors lose what goes. ``keep`` is group -> (C,) bool."""
        for name, mask in keep.items():
            for key, value in self.kept[name].items():
                self.kept[name][key] = value[mask.to(value.device)]
            self._sizes[name] = int(mask.sum())
        self._begin()

    def _begin(self) -> None:
        """Begin a new window."""
        self._waiting.clear()
        vars(self).pop("_sums", None)

    def join(self, sizes: Mapping[str, int]) -> None:
        """Know these groups from now on, in this order, new ones from nothing; begin a new window."""
        for name in sizes:
            self.kept.setdefault(name, {})
        self._sizes = dict(sizes)
        self._begin()

    def drop(self, names: Iterable[str]) -> None:
        """Forget groups, and begin a new window."""
        for name in names:
            del self.kept[name], self._sizes[name]
        self._begin()

    def state_dict(self, total: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, Any]:
        """Tensors and names only; of the window what ``total`` makes of this process' sums."""
        return {
            "sizes": dict(self._sizes),
            "total": total(self._window.total).cpu(),
            "count": total(self._window.count).cpu(),
            "skipped": total(self._window.skipped).cpu(),
            "kept": {name: {key: t.cpu().clone() for key, t in kept.items()} for name, kept in self.kept.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], without: Iterable[str] = ()) -> None:
        """Take up where `state_dict` was taken.

        Args:
            state: what `state_dict` returned.
            without: groups of it that are no more.

        Raises:
            ValueError: if the other groups or their sizes are others.
        """
        sizes = {name: size for name, size in state["sizes"].items() if name not in set(without)}
        if sizes != self._sizes:
            raise ValueError(f"statistics are of groups {sizes}, the model has {self._sizes}")
        wanted = (sum(state["sizes"].values()),)
        for name in ("total", "count"):
            if state[name].shape != wanted or state[name].dtype != torch.float64:
                raise ValueError(f"statistics have a {name} of shape {tuple(state[name].shape)}, {wanted} wanted")
        if state["skipped"].shape != ():
            raise ValueError(f"statistics have skipped {tuple(state['skipped'].shape)}, one number wanted")
        for name, kept in state["kept"].items():
            for key, value in kept.items():
                if name in sizes and value.shape[:1] != (sizes[name],):
                    raise ValueError(f"{key!r} of group {name!r} is kept with shape {tuple(value.shape)}")
        spans = list(state["sizes"].values())
        for name in ("total", "count"):
            parts = dict(zip(state["sizes"], torch.split(state[name], spans), strict=True))
            setattr(self._window, name, torch.cat([parts[group] for group in self._sizes]).to(self._device))
        self._window.skipped = state["skipped"].to(self._device)
        if bool(self._window.count.any() or self._window.skipped > 0):
            self._window._update_count = 1
        for name, kept in self.kept.items():
            kept.clear()
            kept.update({key: t.to(self._device) for key, t in state["kept"].get(name, {}).items()})
