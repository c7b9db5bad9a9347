"""Put two thin layers in place of one, and one in place of two: the surgery of methods that remove ranks.

A layer with weight matrix M, (N, K), one row per output channel, becomes ``nn.Sequential(first, second)`` of ordinary
layers: ``first`` makes ``rank`` channels with the kernel, stride, padding and dilation of the layer, ``second`` makes N
of them, position by position, with its bias. It costs ``rank * (N + K)`` where the layer cost ``N * K``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.errors import IncompatibleCheckpoint
from lightning_prune.graph.trace import output_tensors, run, undisturbed

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_ALIKE = 1e-3  # relative difference of outputs at which a trial counts as failed: far above rounding


@dataclass(frozen=True)
class Replaced:
    """One exchange of modules: where, what stood there, what stands there now."""

    name: str
    old: nn.Module
    new: nn.Module


def matrix_of(layer: nn.Module) -> Tensor:
    """(N, K): a layer's weight, one row per output channel."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1)


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and singular vectors of a matrix, from the eigenvalues of the smaller of its two squares.

    In double precision, so that what is lost to squaring, 1e-8 of the largest value, is below the rounding of weights;
    several times faster than a decomposition of the matrix itself.

    Args:
        matrix: (N, K).

    Returns:
        (n,) values, falling, with n = min(N, K), and (n, n) vectors in columns: the left ones if N <= K, else the right
        ones. Both float64.
    """
    # Apple's GPUs know no double precision
    exact = (matrix.cpu() if matrix.device.type == "mps" else matrix).detach().double()
    square = exact @ exact.T if matrix.shape[0] <= matrix.shape[1] else exact.T @ exact
    squares, vectors = torch.linalg.eigh(square)
    return squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two thin matrices whose product is nearest to a matrix, its singular values shared equally.

    Args:
        matrix: (N, K).
        rank: from 1 to min(N, K).

    Returns:
        (rank, K) ``sqrt(sigma) V^T`` and (N, rank) ``U sqrt(sigma)``, float64.

    Raises:
        ValueError: if the rank is outside that range.

    Example:
        >>> first, second = factors(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), 1)
        >>> (second @ first).abs()
        tensor([[4., 0.],
                [0., 0.]], dtype=torch.float64)
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"a {tuple(matrix.shape)} matrix has a rank from 1 to {min(matrix.shape)}, wanted {rank}")
    _, vectors = spectrum(matrix)
    leading = vectors[:, :rank]
    exact = matrix.detach().to(leading)
    wide = matrix.shape[0] <= matrix.shape[1]
    other = leading.T @ exact if wide else (exact @ leading).T  # (rank, the longer side), rows of length sigma
    root = other.norm(dim=1).sqrt()
    other = other / torch.where(root > 0, root, torch.ones_like(root))[:, None]  # a value of zero is a row of zeros
    return (other, leading * root) if wide else (root[:, None] * leading.T, other.T)


def refusal(layer: nn.Module) -> str | None:
    """Why a layer cannot become two; None if it can."""
    if type(layer) not in LAYERS:
        return f"a {type(layer).__name__} does not become two layers"
    if getattr(layer, "groups", 1) != 1:
        return f"its {layer.groups} groups are thin already"
    if "weight" not in layer._parameters or "forward" in vars(layer):
        return "its weight, or its forward, is made by something else"
    if any(value for key, value in vars(layer).items() if "state_dict" in key and key.endswith("_hooks")):
        return "it has hooks on its state dict, which knows no two layers"
    return None


def candidates(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers of a model that can become two, and why the others like them cannot: qualified names in module order."""
    every = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, LAYERS)]
    times = Counter(id(module) for _, module in every)
    holders = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    found: dict[str, nn.Module] = {}
    why: dict[str, str] = {}
    for name, module in every:
        reason = refusal(module)
        if reason is None and not name:
            reason = "it is the model itself"
        if reason is None and times[id(module)] > 1:
            reason = "the model has it under several names"
        if reason is None and any(holders[id(p)] > 1 for p in module._parameters.values() if p is not None):
            reason = "other layers share its parameters"
        if reason is None:
            found[name] = module
        else:
            why[name] = reason
    return found, why


def _in_place_of(layer: nn.Module, new: nn.Module) -> nn.Module:
    """A module in another's mode and with its hooks, which see what goes in and out, and whose handles still hold."""
    for key, value in vars(layer).items():
        if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_full_backward_hook")):
            vars(new)[key] = value
    return new.train(layer.training)


def is_pair(module: nn.Module) -> bool:
    """Whether a module is two layers that `merged` can make one."""
    if type(module) is not nn.Sequential or len(module) != 2 or refusal(module[0]) or refusal(module[1]):
        return False
    first, second = module[0], module[1]
    if type(first) is not type(second) or first.bias is not None or first.weight.shape[0] != second.weight.shape[1]:
        return False
    return isinstance(second, nn.Linear) or (
        set(second.kernel_size) == set(second.stride) == {1} and set(second.padding) == {0}
    )


def is_pair_of(model: nn.Module, name: str, rank: int) -> bool:
    """Whether a model has two layers of that rank at a place."""
    module = dict(model.named_modules()).get(name)
    return module is not None and is_pair(module) and len(module[0].weight) == rank


def pair(layer: nn.Module, first: Tensor, second: Tensor) -> nn.Sequential:
    """Two layers that compute what a layer would with the weight ``second @ first``; its bias and hooks go with them.

    Args:
        layer: of a type in `LAYERS`.
        first: (rank, K).
        second: (N, rank).
    """
    any_layer: Any = layer
    weight, rank, outs = any_layer.weight, first.shape[0], second.shape[0]
    if isinstance(layer, nn.Linear):
        thin, wide = nn.Linear(weight.shape[1], rank, False, "meta"), nn.Linear(rank, outs, False, "meta")
        shapes: tuple[Sequence[int], Sequence[int]] = (rank, weight.shape[1]), (outs, rank)
    else:
        thin = _convolution(any_layer, any_layer.in_channels, rank)
        wide = type(any_layer)(rank, outs, 1, bias=False, device="meta")
        shapes = (rank, *weight.shape[1:]), (outs, rank, *[1] * (weight.ndim - 2))
    for made, value, shape in ((thin, first, shapes[0]), (wide, second, shapes[1])):
        made.weight = nn.Parameter(value.to(weight).reshape(shape).contiguous(), weight.requires_grad)
    wide.bias = any_layer.bias
    new = nn.Sequential(thin, wide)
    _in_place_of(layer, new)
    return new


def _convolution(like: Any, ins: int, outs: int) -> Any:
    """A convolution like another, of other widths and without a bias, not yet anywhere."""
    return type(like)(
        ins,
        outs,
        like.kernel_size,
        like.stride,
        like.padding,
        like.dilation,
        bias=False,
        padding_mode=like.padding_mode,
        device="meta",
    )


def merged(module: nn.Sequential) -> nn.Module:
    """The one layer that computes what a pair does."""
    first: Any = module[0]
    second: Any = module[1]
    weight = (second.weight.detach().flatten(1).double() @ first.weight.detach().flatten(1).double()).to(first.weight)
    layer: Any
    if isinstance(first, nn.Linear):
        layer = nn.Linear(first.in_features, second.out_features, False, "meta")
    else:
        layer = _convolution(first, first.in_channels, second.out_channels)
    shape = (second.weight.shape[0], *first.weight.shape[1:])
    layer.weight = nn.Parameter(weight.reshape(shape), first.weight.requires_grad)
    layer.bias = second.bias
    return _in_place_of(module, layer)


def factorise(model: nn.Module, ranks: Mapping[str, int]) -> list[Replaced]:
    """Put two thin layers in place of each layer named, by the leading singular values of its weight, in place.

    Args:
        model: any module.
        ranks: qualified name of a layer -> its rank.

    Returns:
        What was exchanged, in the order given.

    Raises:
        ValueError: if a layer is not there, cannot become two, or has no such rank; nothing has changed then.
    """
    modules = dict(model.named_modules())
    able, why = candidates(model)
    new: dict[str, nn.Module] = {}
    for name, rank in ranks.items():
        if name not in able:
            reason = why.get(name) or ("it is no layer" if name in modules else "there is none")
            raise ValueError(f"layer {name!r} of {type(model).__name__} cannot become two of rank {rank}: {reason}")
        try:
            new[name] = pair(able[name], *factors(matrix_of(able[name]), rank))
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    return _exchange(model, new)


def _exchange(model: nn.Module, new: Mapping[str, nn.Module]) -> list[Replaced]:
    done = []
    for name, module in new.items():
        path, _, key = name.rpartition(".")
        parent = model.get_submodule(path)
        done.append(Replaced(name, parent._modules[key], module))  # type: ignore[arg-type]
        parent._modules[key] = module
    return done


def put_back(model: nn.Module, replaced: Iterable[Replaced]) -> None:
    """Undo exchanges."""
    _exchange(model, {one.name: one.old for one in replaced})


def follow(optimizers: Iterable[Optimizer], replaced: Iterable[Replaced]) -> None:
    """Let optimizers step the two weights of a pair where they stepped the one before, from a state of its own."""
    new: dict[int, list[nn.Parameter]] = {}
    for one in replaced:
        old: Any = one.old
        pairs: Any = one.new
        new[id(old.weight)] = [pairs[0].weight, pairs[1].weight]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in new:
                    optimizer.state.pop(parameter, None)
            group["params"] = [p for parameter in group["params"] for p in new.get(id(parameter), [parameter])]


def trial(model: nn.Module, example_inputs: Any, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Try what a model does once layers are pairs that compute the same; it is left as it was.

    A model that reads ``self.conv.weight`` or ``self.conv.stride``, or holds the layer in a second place, is found out.

    Args:
        model: any module that runs on the example inputs.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs.
        layers: qualified name -> layer to be tried.

    Returns:
        Layer -> why it has to stay one, found by bisection.
    """
    failed: dict[str, str] = {}
    wanted, trains = _outputs(model, example_inputs), _trains(model, example_inputs)

    def attempt(some: Sequence[str]) -> None:
        reason = _failure(model, example_inputs, {name: layers[name] for name in some}, wanted, trains)
        if reason is not None and len(some) > 1:
            attempt(some[: len(some) // 2])
            attempt(some[len(some) // 2 :])
        elif reason is not None:
            failed[some[0]] = reason

    if layers:
        attempt(list(layers))
    return failed


@contextmanager
def _shipped(model: nn.Module, training: bool) -> Iterator[None]:
    """A model runs inside as a shipped one does, on the fast paths that read weights, and is left as it was."""
    with undisturbed(model):  # which puts this switch back as well
        torch.backends.mha.set_fastpath_enabled(True)
        torch.manual_seed(0)
        model.train(training)
        yield


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    with _shipped(model, False):
        return [value.detach().clone() for value in output_tensors(run(model, example_inputs, 1))]


def _trains(model: nn.Module, example_inputs: Any) -> bool:
    """Whether a model runs on the example inputs in train mode too; some want targets there."""
    try:
        with _shipped(model, True):
            run(model, example_inputs, 2)
    except Exception:  # whatever the model's own code raises
        return False
    return True


def _failure(
    model: nn.Module, example_inputs: Any, layers: Mapping[str, nn.Module], wanted: Sequence[Tensor], trains: bool
) -> str | None:
    """Why a model does not do the same with pairs in place of these layers; None if it does."""
    new = {name: _TwoLayers(layer) for name, layer in layers.items()}
    replaced = _exchange(model, new)
    try:
        got = _outputs(model, example_inputs)
        if trains:
            with _shipped(model, True):
                run(model, example_inputs, 2)
    except Exception as error:  # as above: here it is the reason
        return f"the model does not run with two layers in its place: {type(error).__name__}: {error}".splitlines()[0]
    finally:
        put_back(model, replaced)
    if missed := next((name for name, module in new.items() if not module.called), None):
        return f"the model does not call '{missed}' where it stands"
    if len(got) != len(wanted) or any(_differs(a, b) for a, b in zip(got, wanted, strict=True)):
        return "the model computes something else with two layers in its place"
    return None


class _TwoLayers(nn.Sequential):
    """A pair that computes what a layer does, by its own matrix and an identity, and knows whether it was called."""

    def __init__(self, layer: nn.Module) -> None:
        matrix = matrix_of(layer)
        super().__init__(*pair(layer, matrix, torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)))
        _in_place_of(layer, self)
        self.called = False

    def forward(self, input: Tensor) -> Tensor:
        self.called = True  # not by a hook: where there are hooks, some modules leave their fast path
        out: Tensor = self[1](self[0](input))
        return out


def _differs(got: Tensor, wanted: Tensor) -> bool:
    if got.shape != wanted.shape:
        return True
    if not got.is_floating_point():
        return False  # a class or a count: small rounding may tip it
    exact, other = wanted.cpu().double(), got.cpu().double()
    rounding = max(_ALIKE, 8 * torch.finfo(wanted.dtype).eps)
    return bool(((other - exact).abs() > rounding * exact.abs().amax()).any()) if exact.numel() else False


@contextmanager
def in_form_of(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Give a model's layers the form that a state has, one layer or two, so that its names fit; undone by an error.

    Two layers that come to stand for one, or that change their rank, are zero until the state is loaded.

    Args:
        model: whole or factorised.
        shapes: of the state's tensors by name, which say of each layer what it is.

    Raises:
        IncompatibleCheckpoint: if the state has two layers that do not meet.
    """
    replaced = _exchange(model, _forms(model, shapes))
    try:
        yield
    except BaseException:
        put_back(model, replaced)
        raise


def _forms(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, nn.Module]:
    new: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        one, first, second = f"{name}.weight", shapes.get(f"{name}.0.weight"), shapes.get(f"{name}.1.weight")
        if not name or not (type(module) in LAYERS or is_pair(module)):
            continue
        if one in shapes and isinstance(module, nn.Sequential):
            new[name] = merged(module)
        elif one not in shapes and first is not None and second is not None:
            made = _of_rank(name, module, tuple(first), tuple(second))
            if made is not None:
                new[name] = made
    return new


def _of_rank(name: str, module: nn.Module, first: tuple[int, ...], second: tuple[int, ...]) -> nn.Module | None:
    """A pair of zeros with the rank of a state; None if the module is one with room for it."""
    whole: Any = merged(module) if isinstance(module, nn.Sequential) else module
    rank, shape = first[0], tuple(whole.weight.shape)
    if not len(first) == len(second) == len(shape) or rank != second[1] or rank < 1:
        raise IncompatibleCheckpoint(f"{name!r} has shape {shape} in the model, and {first} then {second} in the state")
    if isinstance(module, nn.Sequential) and rank <= len(matrix_of(module[0])):
        return None  # fewer channels between two layers are a cut like any other
    matrix = matrix_of(whole)
    if rank > min(matrix.shape):  # before memory is taken for what a state only claims
        raise IncompatibleCheckpoint(
            f"{name!r} has rank {rank} in the state, and at most {min(matrix.shape)} in the model"
        )
    return pair(whole, matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(shape[0], rank))
