"""Look at the tensors that carry a group's channels while a model runs, and put gates on them.

Nothing of the model changes: hooks sit on modules only inside of a context, and the torch function mode that finds a
call lives from the entry of the outermost module with a tap in it to its exit.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_prune.graph.attention import standing_in
from lightning_prune.graph.flow import Call, Tap
from lightning_prune.graph.trace import undisturbed
from lightning_prune.statistics import samples_in

Look = Callable[["Seen"], "Any | None"]  # what it returns, if anything, is what the model goes on with


class Seen:
    """One run of a call that is watched.

    Attributes:
        call: where it is.
        args, kwargs: what the function got.
        out: what it returned.
        batch: number of samples of this forward: the first size of the first tensor that went in.
        forward: number of this forward, counted since watching began. Modules that are called on their own, one after
            the other, are one forward; one that is called again begins the next.
        grad: whether gradients were on when this forward began.
        again: whether a checkpoint computes it anew, in the backward.
    """

    __slots__ = ("again", "args", "batch", "call", "forward", "grad", "kwargs", "out")

    def __init__(self, call: Call, args: Any, kwargs: Any, out: Any, forward: _Forward) -> None:
        self.call = call
        self.args = args
        self.kwargs = kwargs
        self.out = out
        self.batch = forward.batch
        self.forward = forward.number
        self.grad = forward.grad
        self.again = forward.again


@dataclass(frozen=True)
class _Forward:
    number: int
    batch: int
    grad: bool
    again: bool = False


@dataclass
class _Visit:
    """A module that runs."""

    module: nn.Module
    path: str
    number: int
    enters: bool  # the mode, which the visits above it do without
    made: Counter[str] = field(default_factory=Counter)


class Watch(TorchFunctionMode):
    """Finds calls of torch functions in a model that runs, wherever it is called from.

    Args:
        model: whose modules' paths the calls are said in.
        looks: call -> what looks at it. A module that is called more often in one forward than any of these says begins
            again at its first visit, and so does a function all of whose calls are looked at.
        replacing: whether looks replace outputs; a function that works in place then gets a copy of its tensor, and
            what is looked at is written back, as the model may go on with the tensor instead of the output.
    """

    def __init__(self, model: nn.Module, looks: Mapping[Call, Sequence[Look]], replacing: bool = False) -> None:
        super().__init__()
        self._replacing = replacing
        self._totals = {(call.module, call.visit, call.name): call.total for call in looks}
        self._warned: set[tuple[str, str]] = set()
        self._looks = looks
        self._found = {(call.module, call.visit, call.name, call.number): (call, looks[call]) for call in looks}
        self._wanted = {(call.module, call.name) for call in looks}
        self._visits = {call.module: 1 for call in looks}
        for call in looks:
            self._visits[call.module] = max(self._visits[call.module], call.visit + 1)
        self._above = {""} | {p[:i] for p in self._visits for i, c in enumerate(p + ".") if c == "."}
        self._paths = {module: path for path, module in model.named_modules()}
        self._own: dict[nn.Module, Any] = {}  # the forward of each
        self._called: Counter[str] = Counter()
        self._outermost: set[str] = set()
        self._stack: list[_Visit] = []
        self._handles: list[Any] = []
        self._model = model
        self._swapped = ExitStack()
        self._last = self._now = _Forward(0, 1, False)
        self._asleep: dict[str, list[tuple[_Forward, int]]] = {}  # visits that a checkpoint may compute anew

    def begin(self) -> None:
        """Watch from now on.

        Raises:
            RuntimeError: if a module that would have to be watched is compiled.
        """
        eager = torch._dynamo.eval_frame._stance.stance == "force_eager" if "torch._dynamo" in sys.modules else True
        for module, path in self._paths.items():
            if _is_compiled(module) and not eager:
                raise RuntimeError(
                    f"{f'module {path!r}' if path else 'the model'} is compiled, so that what happens inside cannot be "
                    "watched while it trains; compile it after pruning"
                )
        self._swapped.enter_context(standing_in(self._model))  # as it was when its calls were recorded
        names = {name for _, name in self._wanted}
        for module, path in self._paths.items():
            if path not in self._above and _calls_none(module, names):
                continue  # most modules are such, and a hook costs more than the call
            self._own[module] = module.forward
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def end(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._swapped.close()
        while self._stack:
            self._pop()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.forward != self._own[module]:
            return  # a strategy has put the training step in its place, which calls the forward itself
        path = self._paths[module]
        again = torch._C._current_graph_task_id() != -1  # in a backward
        asleep = self._asleep.get(path) if again else None
        if asleep:
            forward, number = asleep.pop()  # the last one is computed first
        else:
            if not self._stack and not again:
                if self._begins(path):
                    self._called.clear()
                    self._outermost.clear()
                    self._last = replace(self._last, number=self._last.number + 1)
                if not self._outermost:
                    self._last = replace(self._last, grad=torch.is_grad_enabled())
            forward, number = self._last, self._called[path] % self._visits.get(path, 1)
            self._called[path] += 1
            if forward.grad and not torch.is_grad_enabled():
                self._asleep.setdefault(path, []).append((replace(forward, again=True), number))
        if not self._stack:
            if not again:
                if path in self._above:
                    self._outermost.add(path)
                forward = self._last = replace(self._last, batch=samples_in((args, kwargs)))
            self._now = forward
        enters = path in self._visits and not any(visit.enters for visit in self._stack)
        if enters:
            self.__enter__()  # type: ignore[no-untyped-call]
        self._stack.append(_Visit(module, path, number, enters))

    def _begins(self, path: str) -> bool:
        """Whether an outermost module begins another forward: it has run already, or what is in it has."""
        if path not in self._above:
            return False
        again = self._called[path] >= self._visits.get(path, 1)
        return again or any(other.startswith(path and path + ".") for other in self._outermost)

    def settle(self) -> None:
        """No checkpoint computes anew what has run so far."""
        self._asleep.clear()

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if self._stack and self._stack[-1].module is module:
            self._pop()

    def _pop(self) -> None:
        if self._stack.pop().enters:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        visit = self._stack[-1]
        name = getattr(func, "__name__", "")
        if (visit.path, name) not in self._wanted:
            return func(*args, **kwargs)
        number = visit.made[name]
        visit.made[name] = number + 1
        if number >= self._totals.get((visit.path, visit.number, name), 0):
            number = self._known(Call(visit.path, visit.number, name, number)).number
        found = self._found.get((visit.path, visit.number, name, number))
        if found is None:
            return func(*args, **kwargs)
        call, looks = found
        written = args[0] if self._replacing and _works_in_place(name, kwargs) else None
        if written is not None:
            args = (written.clone(), *args[1:])
        out = func(*args, **kwargs)
        for look in looks:
            new = look(Seen(call, args, kwargs, out, self._now))
            out = out if new is None else new
        return out if written is None else written.copy_(out)

    def _known(self, call: Call) -> Call:
        """One of the calls there were when the model was traced: past the last, again the first, if all are looked at.

        So a loop of more steps is followed where each step is looked at; else there is a warning, once.
        """
        total = self._totals.get((call.module, call.visit, call.name), 0)
        if not total:
            return call
        if all(replace(call, number=number) in self._looks for number in range(total)):
            return replace(call, number=call.number % total)
        if call.number == total and (call.module, call.name) not in self._warned:
            self._warned.add((call.module, call.name))
            warnings.warn(
                f"'{call.name}' is called more often in {call.module or 'the model'} than the {total} times when the "
                "model was traced, so that channels may be looked for in the wrong place; pass an example_input= that "
                "makes the model run as it does in training",
                stacklevel=2,
            )
        return call


def _calls_none(module: nn.Module, names: Container[str]) -> bool:
    """Whether a module is known to call no function of these names, so that none is taken for its parent's."""
    known = _CALLS.get(type(module))
    own = module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
    return known is not None and not own and all(name not in names for name in known)


# Modules that hold no others -> names of the torch functions that their forward may call.
_CALLS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Identity: (),
    nn.Linear: ("linear",),
    nn.Conv1d: ("conv1d", "pad"),
    nn.Conv2d: ("conv2d", "pad"),
    nn.Conv3d: ("conv3d", "pad"),
    nn.BatchNorm1d: ("batch_norm", "dim", "add_", "__float__"),
    nn.BatchNorm2d: ("batch_norm", "dim", "add_", "__float__"),
    nn.BatchNorm3d: ("batch_norm", "dim", "add_", "__float__"),
    nn.LayerNorm: ("layer_norm",),
    nn.GroupNorm: ("group_norm",),
    nn.Dropout: ("dropout",),
    nn.ReLU: ("relu", "relu_"),
    nn.GELU: ("gelu",),
    nn.MaxPool2d: ("max_pool2d",),
    nn.AdaptiveAvgPool2d: ("adaptive_avg_pool2d",),
}


def _works_in_place(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a torch function writes to its first argument: ``relu_``, ``+=``, ``relu(..., inplace=True)``."""
    return name in _AUGMENTED or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True


_AUGMENTED = frozenset(f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "pow"))


def _is_compiled(module: nn.Module) -> bool:
    if type(module).__name__ == "OptimizedModule":
        return True
    # `module.compile()`, and a LightningModule that came out of `torch.compile`
    return module._compiled_call_impl is not None or getattr(module, "_compiler_ctx", None) is not None


@contextmanager
def evaluating(model: nn.Module, grad: bool = False) -> Iterator[None]:
    """Look at a model inside as it would be shipped: in eval mode, in its own precision, and without a trace.

    Modes, buffers, random state and settings are as before afterwards. Gradients asked for with
    `torch.autograd.grad` leave ``.grad`` alone.

    Args:
        model: what is looked at.
        grad: whether gradients are computed inside.
    """
    device = next((p.device.type for p in model.parameters()), "cpu")
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with undisturbed(model), torch.autocast(device, enabled=False), torch.set_grad_enabled(grad):
            model.eval()
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@contextmanager
def watching(model: nn.Module, looks: Mapping[Call, Sequence[Look]], replacing: bool = False) -> Iterator[Watch]:
    """Watch calls inside of the context; arguments as of `Watch`.

    Raises:
        RuntimeError: as `Watch.begin`.
    """
    watch = Watch(model, looks, replacing)
    try:
        watch.begin()
        yield watch
    finally:
        watch.end()


def tensor_of(tap: Tap, out: Any) -> Tensor:
    """The tensor of a tap in what its call returned."""
    if isinstance(out, Tensor):
        return out
    leaves = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
    return leaves[tap.output]


def looks_at(taps: Mapping[str, Sequence[Tap]], look: Callable[[str, Tap, Seen], Any]) -> dict[Call, list[Look]]:
    """The same look for all taps: group -> taps; ``look`` also gets the group's name and the tap."""
    out: dict[Call, list[Look]] = {}
    for name, of_group in taps.items():
        for tap in of_group:
            out.setdefault(tap.call, []).append(lambda seen, name=name, tap=tap: look(name, tap, seen))  # type: ignore[misc]
    return out


class SampleGradients:
    """What each sample's loss changes by, to first order, when a gate on a channel moves: map times its gradient.

    The loss is taken for a mean over samples, and its gradient multiplied by their number, so that what is found is of
    each sample's own loss and does not depend on the batch size. Gates of one group are one gate: signed sums over its
    taps, as the chain rule has it. The samples of a second forward are further samples.

    Args:
        taps: group -> where its channels are.
        mean: mean over positions of each map, instead of their sum.
    """

    def __init__(self, taps: Mapping[str, Sequence[Tap]], mean: bool = False) -> None:
        self.looks = looks_at(taps, self._look)
        self._mean = mean
        self._sums: dict[str, dict[tuple[int, int], Tensor]] = {name: {} for name in taps}
        self._blind: Counter[tuple[str, int]] = Counter()  # places that ran without gradients, by group and forward

    def _look(self, name: str, tap: Tap, seen: Seen) -> None:
        if seen.grad:
            self._blind[name, seen.forward] += (not torch.is_grad_enabled()) - seen.again
        map_ = tensor_of(tap, seen.out)
        if not (torch.is_grad_enabled() and map_.requires_grad):
            return
        batch, forward = seen.batch, seen.forward
        values = map_.detach().clone() if tap.overwritten else map_.detach()
        version = values._version

        def add(gradient: Tensor) -> None:
            if values._version != version:
                raise RuntimeError(
                    f"what '{tap.call.name}' makes in {tap.call.module or 'the model'} was written to in place after "
                    f"group {name!r} was looked at there, which did not happen when the model was traced; make it work "
                    "out of place, or list the group in ignore="
                )
            wide = values.float() if values.dtype.itemsize < 4 else values
            product = tap.maps(wide * gradient.detach(), batch)
            # a mean would divide in an operation of its own
            found = product.sum(dim=2).mul_(batch / max(1, product.shape[2]) if self._mean else batch)  # (B, C)
            sums, key = self._sums[name], (forward, batch)
            sums[key] = sums[key] + found if key in sums else found

        map_.register_hook(add)  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Forget what gradients have been taken so far."""
        for sums in self._sums.values():
            sums.clear()

    def take(self) -> dict[str, Tensor]:
        """group -> (B, C) of the backward passes since the last call; groups that no gradient reached are left out.

        Raises:
            RuntimeError: if some of a group's places ran without gradients, so that only a part was found.
        """
        out = {name: _joined(list(sums.values())) for name, sums in self._sums.items() if sums}
        found = [(name, forward) for name, sums in self._sums.items() for forward, _ in sums]
        self.clear()
        partly = next((name for name, forward in found if self._blind[name, forward] > 0), None)
        self._blind.clear()
        if partly is not None:
            raise RuntimeError(
                f"group {partly!r} is read in several places, of which some ran without gradients: under no_grad, or "
                "in a checkpoint of a function that is no module; use checkpoint(..., use_reentrant=False), or list "
                "the group in ignore="
            )
        return out


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@contextmanager
def gated(model: nn.Module, taps: Mapping[str, Sequence[Tap]], gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply maps by gates, one a channel, inside of the context: 1 is as before, 0 as if the channel were gone.

    Args:
        model: what runs.
        taps: group -> where its channels are.
        gates: group -> (C,), may require gradients, in a floating dtype.
    """

    def multiply(name: str, tap: Tap, seen: Seen) -> Any:
        leaves, structure = tree_flatten(seen.out)
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        map_ = leaves[places[tap.output]]
        indices = tap.indices.to(map_.device)
        factor = torch.ones(map_.shape[tap.dim], dtype=map_.dtype, device=map_.device)
        spread = gates[name].to(map_)[:, None].expand(indices.shape)
        factor = factor.index_put((indices.reshape(-1),), spread.reshape(-1))
        shape = [1] * map_.ndim
        shape[tap.dim] = -1
        leaves[places[tap.output]] = map_ * factor.reshape(shape)
        return tree_unflatten(leaves, structure)

    with watching(model, looks_at({name: taps[name] for name in gates}, multiply), replacing=True):
        yield
