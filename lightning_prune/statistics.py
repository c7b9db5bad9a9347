"""Sums and sample counts per channel, kept over batches and joined over processes.

Two lifetimes: the *window* is what was measured since the last event; *kept* tensors (moving averages) live on from
event to event and lose the entries of channels that go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


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

    def update(self, values: Tensor, measured: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            values: (size,), 0 where nothing was measured.
            measured: (size,) bool; None for all.
        """
        finite = torch.isfinite(values).all()
        self.total += torch.where(finite, values.to(self.total.dtype), 0.0)
        self.count += finite if measured is None else finite & measured
        self.skipped += ~finite

    def compute(self) -> Tensor:
        """(size,) mean over the finite batches; NaN before the first."""
        return self.total / self.count


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
        self._window = self._new_window()

    def _new_window(self) -> ChannelSums:
        return ChannelSums(sum(self._sizes.values())).to(self._device)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add what one batch says: group -> (C,); a group that is left out was not measured."""
        if len(values) == len(self._sizes):
            self._window.update(torch.cat([values[name] for name in self._sizes]))
            return
        device = self._window.total.device
        parts = [values[n] if n in values else torch.zeros(size, device=device) for n, size in self._sizes.items()]
        known = [torch.full((size,), n in values, device=device) for n, size in self._sizes.items()]
        self._window.update(torch.cat(parts), torch.cat(known))

    def unmeasured(self) -> list[str]:
        """Groups without a finite batch in the window, of this process."""
        counts = torch.split(self._window.count, list(self._sizes.values()))
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
        self._window = self._new_window()

    def join(self, sizes: Mapping[str, int]) -> None:
        """Know these groups from now on, in this order, new ones from nothing; begin a new window."""
        for name in sizes:
            self.kept.setdefault(name, {})
        self._sizes = dict(sizes)
        self._window = self._new_window()

    def drop(self, names: Iterable[str]) -> None:
        """Forget groups, and begin a new window."""
        for name in names:
            del self.kept[name], self._sizes[name]
        self._window = self._new_window()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and names only."""
        return {
            "sizes": dict(self._sizes),
            "total": self._window.total.cpu().clone(),
            "count": self._window.count.cpu().clone(),
            "skipped": self._window.skipped.cpu().clone(),
            "kept": {name: {key: t.cpu().clone() for key, t in kept.items()} for name, kept in self.kept.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` was taken.

        Raises:
            ValueError: if the groups or their sizes are others.
        """
        if dict(state["sizes"]) != self._sizes:
            raise ValueError(f"statistics are of groups {dict(state['sizes'])}, the model has {self._sizes}")
        if state["total"].shape != self._window.total.shape:
            raise ValueError(
                f"statistics have {tuple(state['total'].shape)} sums, {tuple(self._window.total.shape)} wanted"
            )
        self._window.total = state["total"].to(self._device)
        self._window.count = state["count"].to(self._device)
        self._window.skipped = state["skipped"].to(self._device)
        if bool(self._window.count.any() or self._window.skipped > 0):
            self._window._update_count = 1
        for name, kept in self.kept.items():
            kept.clear()
            kept.update({key: t.to(self._device) for key, t in state["kept"].get(name, {}).items()})
