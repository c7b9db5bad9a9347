"""Measured time per batch and throughput of a model, its peak of activations, and the size of its state dict."""

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

Inputs = Any
"""A tensor, a tuple of positional inputs or a dict of keyword inputs, each nested as deep as the model wants."""


@dataclass(frozen=True)
class Latency:
    """Times of one model at one batch size; the median and the range that holds the middle 80 % of the runs.

    Attributes:
        batch: samples per run.
        median_ms: milliseconds per run.
        p10_ms: a tenth of the runs were at most as long.
        p90_ms: a tenth of the runs were at least as long.
        per_second: samples per second at the median.
        repeats: number of timed runs.
        threads: CPU threads within an operator.
        device: where the model was, such as ``cpu`` or ``cuda:0``.
        compiled: whether `torch.compile` had compiled it.
    """

    batch: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    per_second: float
    repeats: int
    threads: int
    device: str
    compiled: bool = False


def measure(
    model: nn.Module,
    example_inputs: Inputs,
    batch_sizes: Sequence[int] = (1, 32),
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
    compiled: bool = False,
) -> list[Latency]:
    """Time a model's forward, in eval mode and without gradients.

    Args:
        model: stays on its device; train/eval mode of every module and the thread count are put back.
        example_inputs: tensor, tuple or dict as the model takes it; the first sample along dim 0 of each tensor is
            repeated to each batch size. Tensors without a dimension are passed on as they are.
        batch_sizes: at least 1 each.
        repeats: timed runs, at least 1.
        warmup: runs before them that are not timed.
        threads: CPU threads within an operator; None leaves torch's setting.
        compiled: time what `torch.compile` makes of it, compiled anew for each batch size before any warmup; the model
            stays as it is.

    Returns:
        One entry per batch size, in that order.

    Raises:
        ValueError: if a count is below 1 (``warmup`` below 0), or an input has no sample to repeat.
        RuntimeError: if ``compiled`` is asked for where nothing can be compiled; `compiler_missing` says why.
    """
    return compare({"": model}, example_inputs, batch_sizes, repeats, warmup, threads, compiled)[""]


def compare(
    models: Mapping[str, nn.Module],
    example_inputs: Inputs,
    batch_sizes: Sequence[int] = (1, 32),
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
    compiled: bool = False,
) -> dict[str, list[Latency]]:
    """Time several models in turn, A B A B, so that a machine that slows down slows all of them.

    Args:
        models: name -> model; all take the same inputs.
        example_inputs: see ``measure``, as are the other arguments.
        batch_sizes: at least 1 each.
        repeats: timed runs of each model at each batch size.
        warmup: runs of each before them that are not timed.
        threads: CPU threads within an operator; None leaves torch's setting.
        compiled: time what `torch.compile` makes of it, compiled anew for each batch size before any warmup; the model
            stays as it is.

    Returns:
        Name -> one entry per batch size, in that order.

    Raises:
        ValueError: if a count is below 1 (``warmup`` below 0), or an input has no sample to repeat.
        RuntimeError: if ``compiled`` is asked for where nothing can be compiled; `compiler_missing` says why.
    """
    for what, value, least in (("repeats", repeats, 1), ("warmup", warmup, 0), ("threads", threads, 1)):
        if value is not None and value < least:
            raise ValueError(f"{what} must be at least {least}, got {value}")
    if any(size < 1 for size in batch_sizes):
        raise ValueError(f"every batch size must be at least 1, got {tuple(batch_sizes)}")
    if compiled and (why := compiler_missing()) is not None:
        raise RuntimeError(f"torch.compile does not work here: {why}; measure with compiled=False")
    measured: dict[str, list[Latency]] = {name: [] for name in models}
    with _evaluating(models), threads_set(threads), torch.no_grad():
        for size in batch_sizes:
            runs = {name: _run(model, _resized(example_inputs, size), compiled) for name, model in models.items()}
            milliseconds: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(warmup + repeats):
                for name, run in runs.items():
                    elapsed = run()
                    if turn >= warmup:
                        milliseconds[name].append(elapsed)
            for name, times in milliseconds.items():
                measured[name].append(_latency(size, times, _device(models[name]), compiled))
    return measured


def state_dict_bytes(model: nn.Module) -> int:
    """How many bytes ``torch.save(model.state_dict())`` writes."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getbuffer().nbytes


@cache
def compiler_missing() -> str | None:
    """Say why `torch.compile` cannot make code for the CPU here (no C++ compiler, say); None if it can."""
    try:
        with torch.no_grad():
            torch.compile(torch.nn.functional.relu)(torch.zeros(1))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def activation_bytes(model: nn.Module, example_inputs: Inputs, batch: int = 1) -> int:
    """Count the bytes of all activations that are alive at once, at the worst moment of a forward in eval mode.

    An activation is memory that an operator of the forward allocates and that is not freed yet: views and what is
    written in place take none of their own. Parameters, buffers and the inputs, which are the caller's, do not count,
    nor does what a kernel takes and frees within itself.

    Args:
        model: stays on its device; train/eval mode of every module is put back.
        example_inputs: see `measure`.
        batch: samples, at least 1.

    Raises:
        ValueError: if ``batch`` is below 1, or an input has no sample to repeat.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    inputs = _mapped(_resized(example_inputs, batch), lambda tensor: tensor.to(_device(model)))
    arguments, keywords = _as_call(inputs)
    foreign = [t for t in tree_flatten((arguments, dict(keywords)))[0] if isinstance(t, Tensor)]
    live = _Live([*foreign, *model.parameters(), *model.buffers()])
    with _evaluating({"": model}), torch.no_grad(), live:
        model(*arguments, **keywords)
    return live.peak


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the memory that operators allocate until it is freed."""

    def __init__(self, foreign: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._foreign = {tensor.untyped_storage()._cdata for tensor in foreign}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and see what is alive when it is done."""
        out = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._foreign:
                    weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._alive[storage._cdata] = weak, storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def _latency(batch: int, milliseconds: Sequence[float], device: torch.device, compiled: bool) -> Latency:
    points = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    tenth, median, ninth = torch.tensor(milliseconds, dtype=torch.float64).quantile(points).tolist()
    throughput, threads = 1000 * batch / median, torch.get_num_threads()
    return Latency(batch, median, tenth, ninth, throughput, len(milliseconds), threads, str(device), compiled)


def _run(model: nn.Module, inputs: Inputs, compiled: bool) -> Callable[[], float]:
    """A forward on the model's device that returns its milliseconds; inputs are moved there beforehand."""
    device = _device(model)
    forward: Callable[..., Any] = model
    if compiled:
        torch.compiler.reset()  # else a new batch size compiles for any size, which is slower
        forward = torch.compile(model)
    inputs = _mapped(inputs, lambda tensor: tensor.to(device))
    arguments, keywords = _as_call(inputs)

    def run() -> float:
        _synchronise(device)
        start = time.perf_counter()
        forward(*arguments, **keywords)
        _synchronise(device)
        return 1000 * (time.perf_counter() - start)

    if compiled:
        run()
    return run


def _as_call(inputs: Inputs) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _resized(inputs: Inputs, batch: int) -> Inputs:
    def repeat(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            return tensor
        if not len(tensor):
            raise ValueError(f"an example input needs a first sample to repeat, got shape {tuple(tensor.shape)}")
        return tensor[:1].expand(batch, *tensor.shape[1:]).contiguous()

    return _mapped(inputs, repeat)


def _mapped(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """The same nest of tuples, lists and mappings with every tensor replaced."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: _mapped(value, function) for key, value in inputs.items()}
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
        return type(inputs)(*(_mapped(value, function) for value in inputs))
    if isinstance(inputs, tuple | list):
        return type(inputs)(_mapped(value, function) for value in inputs)
    return inputs


def _device(model: nn.Module) -> torch.device:
    tensor = next((tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _evaluating(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Eval mode throughout; afterwards every module is in the mode it came in."""
    modes = {module: module.training for model in models.values() for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def threads_set(count: int | None) -> Iterator[None]:
    """Run inside with so many CPU threads within an operator; None leaves torch's setting."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
