"""Every model of the zoo pruned to half its flops, by this package and by Torch-Pruning, and each cut checked.

    python benchmarks/zoo.py [--only PATTERN] [--tool ours|torch-pruning|both] [--jobs N] [--redo] [--seconds 180]
        [--memory 10] [--results DIR] [--docs FILE.md] [--list]

Each model and tool is a fresh process with one thread, a time limit and a memory limit. A row is appended to `zoo.csv`;
rows that are there already are not made again. `zoo.md` is written anew from it, and with ``--docs`` the tables between
the marks ``<!-- zoo: NAME -->`` and ``<!-- zoo: end -->`` of that page.

Ours is `trace`, `plan` with `L1Filter` at ``Budget(0.5)``, `cut`. Torch-Pruning's is its `BasePruner` with magnitude
scores, half the channels of each group, and the layers whose output is the model's ignored.

A cut is checked without a line of the package's own proof. The dense model is built again from the same seed, what has
been removed is zeroed in it, and the two must compute the same in eval mode, in float64. Constants (norms at one,
layers at zero) are random from the start, so that no wrong index hides behind them. Norms across channels legitimately
change with a cut; for the column "norms aside" they, and means, are replaced in both networks by sums, which zeros do
not change. For Torch-Pruning, what was kept is read out of the parameters' values. Then the cut model takes a step
forward and backward in train mode.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]  # run as a script

from pages import read  # noqa: E402
from zoo_models import Model, catalog  # noqa: E402

import lightning_prune as lp  # noqa: E402
from lightning_prune.errors import NothingToPrune, UnmeetableBudget  # noqa: E402
from lightning_prune.report import markdown_table  # noqa: E402

FIELDS = [
    "model", "source", "kind", "family", "tool", "status", "exact", "difference", "norms aside", "prunable share",
    "flops kept", "predicted - counted", "trace s", "plan s", "cut s", "peak MB", "note",
]  # fmt: skip
TOOLS = ("ours", "torch-pruning")
STATUSES = ("ok", "wrong", "does not run", "raised", "nothing pruned", "time", "memory")
GOALS = {"convnet": 0.98, "transformer": 0.6}  # least prunable share
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
LARGE = 100_000_000  # parameters above which the check stays in the model's own precision

Kept = Mapping[str, Mapping[int, Tensor]]


class Failed(Exception):
    """What ends a row early: a status and a note."""

    def __init__(self, status: str, note: str) -> None:
        super().__init__(note)
        self.status = status


def build(model: Model) -> nn.Module:
    """A model of the catalog, the same every time, without a constant that would hide a wrong index."""
    torch.manual_seed(0)
    net = model.build()
    unsettle(net)
    return net


def unsettle(net: nn.Module) -> None:
    """Random values for norms, zero-initialised layers, layer scales and running statistics, as after training."""
    generator = torch.Generator().manual_seed(0)

    def uniform(shape: torch.Size) -> Tensor:
        return 0.5 + torch.rand(shape, generator=generator)

    def normal(shape: torch.Size, scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    norms = ("running_mean", "running_var", "weight", "bias")  # the buffers of (frozen) BatchNorms
    buffers = [(name, b) for name, b in net.named_buffers() if name.rpartition(".")[2] in norms]
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *buffers]:
            if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
                continue
            leaf, first, shape = name.rpartition(".")[2], float(tensor.flatten()[0]), tensor.shape
            if not bool((tensor == tensor.flatten()[0]).all()):
                continue
            if leaf == "running_mean" or (abs(first) < 1e-2 and leaf.endswith(("bias", "beta"))):
                tensor.copy_(normal(shape, 0.2))
            elif abs(first) >= 1e-2:
                tensor.copy_(first * uniform(shape))
            elif tensor.ndim < 2:
                tensor.copy_(uniform(shape))
            else:
                tensor.copy_(normal(shape, math.prod(shape[1:]) ** -0.5))


def call(net: nn.Module, inputs: Any) -> Any:
    """Run a model on example inputs."""
    if isinstance(inputs, Mapping):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, tuple) else net(inputs)


def tensors(value: Any) -> list[Tensor]:
    """Every floating tensor in an output, in its order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors(item)]
    return []


def run_train(model: Model, net: nn.Module) -> None:
    """A step forward and backward in train mode; buffers and modes are put back, gradients dropped."""
    saved = [(b, b.clone()) for b in net.buffers()]
    modes = [(m, m.training) for m in net.modules()]
    try:
        out = tensors(call(net.train(), model.inputs(2)))
        sum(t.float().square().mean() for t in out if t.requires_grad).backward()
        if not any(p.grad is not None for p in net.parameters()):
            raise RuntimeError("no parameter has a gradient after the backward")
    finally:
        with torch.no_grad():
            for b, value in saved:
                b.copy_(value)
        for m, training in modes:
            m.training = training
        net.zero_grad()


class SumsForMeans(TorchDispatchMode):
    """Norms and means become sums, which channels at zero do not change: the length of x stands for its variance.

    Where a norm's scale is zero, which is where a channel was removed, what it reads counts as zero too: code between
    (a bias across positions) may have made something of the zero, which the cut network never has.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name == "mean":
            dims = args[1] if len(args) > 1 else None
            keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
            return (args[0].sum(dims, keep) if dims is not None else args[0].sum()) / 16
        out = func(*args, **kwargs)  # also where it is replaced, for its checks and shapes
        if name in ("var", "std", "var_mean", "std_mean"):
            dims = args[1] if len(args) > 1 and args[1] is not None else list(range(args[0].ndim))
            square = args[0].square().sum(dims, True) / 16
            square = square if name.startswith("var") else square.sqrt()
            if isinstance(out, tuple):
                return square.reshape(out[0].shape), torch.zeros_like(out[1])
            return square.reshape(out.shape)
        if name in ("native_layer_norm", "_fused_rms_norm"):
            x, shape, weight = args[:3]
            bias = args[3] if name == "native_layer_norm" else None
            x = x if weight is None else x * (weight != 0)
            y = self._unit(x, list(range(x.ndim - len(shape), x.ndim)))
            y = y if weight is None else y * weight
            return (y if bias is None else y + bias, *out[1:])
        if name == "native_group_norm":
            x, weight, bias, n, c, _, groups, _ = args
            x = x if weight is None else x * (weight != 0).reshape(1, c, *[1] * (x.ndim - 2))
            y = self._affine(self._unit(x.reshape(n, groups, -1), [2]).reshape(x.shape), weight, bias, c)
            return (y, *out[1:])
        if name in ("native_batch_norm", "_native_batch_norm_legit") and any(a is True for a in args[3:]):
            x, weight, bias = args[:3]  # statistics of what it is given: weights that are standardised
            y = self._unit(x, [d for d in range(x.ndim) if d != 1])
            return (self._affine(y, weight, bias, x.shape[1]), *out[1:])
        return out

    @staticmethod
    def _unit(x: Tensor, dims: list[int]) -> Tensor:
        return 8 * x * torch.rsqrt(x.square().sum(dims, keepdim=True) + 1e-5)

    @staticmethod
    def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, channels: int) -> Tensor:
        wide = (1, channels, *[1] * (y.ndim - 2))
        y = y if weight is None else y * weight.reshape(wide)
        return y if bias is None else y + bias.reshape(wide)


class _Enough(Exception):
    """All that is compared has been computed."""


def _stop(*_: Any) -> None:
    raise _Enough


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Inputs with their floating tensors in another precision; targets, dicts in a list, stay."""
    if isinstance(value, Mapping):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(item if isinstance(item, Mapping) else _cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def outputs(model: Model, net: nn.Module, norms_aside: bool = False) -> list[Tensor]:
    """What is compared of a model, in eval mode, in the precision of its parameters."""
    dtype = next(p.dtype for p in net.parameters() if p.is_floating_point())
    inputs = _cast(model.inputs(1), dtype)
    seen: list[Tensor] = []
    modules = dict(net.named_modules())
    handles = [
        modules[path].register_forward_hook(lambda _, args, out: seen.extend(tensors(out))) for path in model.compare
    ]
    handles += [modules[path].register_forward_hook(_stop) for path in model.compare[-1:]]
    out: list[Tensor] = []
    torch.backends.mha.set_fastpath_enabled(False)  # fused kernels, whose norms could not be put aside
    try:
        torch.manual_seed(0)
        with suppress(_Enough), torch.no_grad(), SumsForMeans() if norms_aside else nullcontext():
            out = tensors(call(net.eval(), inputs))
    finally:
        for handle in handles:
            handle.remove()
    return [t.clone() for t in (seen if model.compare else out)]


def relative(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Largest difference of any output, relative to its largest value; infinite where shapes differ."""
    if [t.shape for t in expected] != [t.shape for t in got]:
        return math.inf
    worst = [0.0]
    for a, b in zip(expected, got, strict=True):
        if not a.numel():
            continue
        both = torch.isfinite(a) & torch.isfinite(b)
        if not bool((both | (a == b)).all()):  # minus infinity is a value too, of masked scores
            return math.nan
        a, b = a[both].double(), b[both].double()
        if a.numel():
            worst.append(float((a - b).abs().max()) / (float(a.abs().max()) or 1.0))
    return max(worst)


@contextmanager
def zeroed(net: nn.Module, kept: Kept, value: float = 0.0) -> Iterator[None]:
    """Inside, every coordinate of every parameter that is not kept is at zero, or at another value."""
    parameters = dict(net.named_parameters())
    saved = {name: parameters[name].detach().clone() for name in kept}
    try:
        with torch.no_grad():
            for name, dims in kept.items():
                for dim, index in dims.items():
                    gone = torch.ones(parameters[name].shape[dim], dtype=torch.bool)
                    gone[index] = False
                    parameters[name].index_fill_(dim, gone.nonzero().squeeze(1), value)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in saved.items():
                parameters[name].copy_(tensor)


def untie(net: nn.Module, names: Iterable[str]) -> bool:
    """Give names that are further names of a shared parameter copies of their own; whether there were any."""
    known = dict(net.named_parameters())
    apart = [name for name in names if name not in known]
    for name in apart:
        path, _, leaf = name.rpartition(".")
        owner = net.get_submodule(path)
        setattr(owner, leaf, nn.Parameter(getattr(owner, leaf).detach().clone()))
    return bool(apart)


def independent_difference(model: Model, cut: nn.Module, kept: Kept) -> tuple[float, float, float, str]:
    """Compare a cut model with the dense one built again, with what has been removed at zero.

    Args:
        model: how to build the dense one.
        cut: the cut model; left in another precision where that works.
        kept: parameter name -> {dim: indices of the dense model that stay}.

    Returns:
        The relative difference; the same with norms put aside; what is allowed; and a note, or "".
    """
    dense = build(model)
    own = next(p.dtype for p in dense.parameters() if p.is_floating_point())
    note = "weights that were tied came apart" if untie(dense, kept) else ""
    if sum(p.numel() for p in dense.parameters()) <= LARGE:
        try:
            outputs(model, dense.double())
            cut.double()
        except Exception:  # a dtype in the model's code
            dense = build(model)
            untie(dense, kept)
            note = "; ".join(filter(None, [note, f"compared in {str(own).removeprefix('torch.')}"]))
    tolerance = TOLERANCE[next(p.dtype for p in dense.parameters() if p.is_floating_point())]
    worst, blind = [], False
    for norms_aside in (False, True):
        before = outputs(model, dense, norms_aside)
        with zeroed(dense, kept):
            expected = outputs(model, dense, norms_aside)
        if any(bool(torch.isnan(t).any()) for t in expected):  # 0 / 0: weight normalisation of a row that is zero
            with zeroed(dense, kept, 1e-12):
                expected = outputs(model, dense, norms_aside)
        blind |= relative(before, expected) <= 10 * tolerance
        worst.append(relative(expected, outputs(model, cut, norms_aside)))
    if blind:
        note = "; ".join(filter(None, [note, "the removed channels hardly change the output, so the check is weak"]))
    return worst[0], worst[1], tolerance, note


def read_kept(dense: nn.Module, cut: nn.Module) -> dict[str, dict[int, Tensor]]:
    """Parameter name -> {dim: kept indices}, read out of the values of two models.

    Raises:
        Failed: if a parameter of the cut model is no selection of slices of the dense one's.
    """
    whole, out = dict(dense.named_parameters(remove_duplicate=False)), {}
    for name, part in cut.named_parameters():
        if name not in whole or part.ndim != whole[name].ndim:
            raise Failed("wrong", f"{name} is not a parameter of the dense model")
        if part.shape != whole[name].shape:
            out[name] = _slices(name, whole[name].detach(), part.detach())
    return out


def _slices(name: str, whole: Tensor, part: Tensor) -> dict[int, Tensor]:
    dims = [d for d in range(whole.ndim) if whole.shape[d] != part.shape[d]]
    rest = [d for d in range(whole.ndim) if d not in dims]
    if len(dims) > 2:
        raise Failed("wrong", f"{name} was cut along {len(dims)} dimensions, which is not looked into")
    # (n0, n1, R) cells of the dims that changed; n1 is 1 if only one did
    shape = [[t.shape[d] for d in dims] + [1] * (2 - len(dims)) + [-1] for t in (whole, part)]
    big, small = (t.permute(*dims, *rest).reshape(s) for t, s in zip((whole, part), shape, strict=True))
    for row in range(min(8, len(small))):
        holds = (big[:, None, :, :1] == small[row, 0, :1]).flatten(1).any(1)  # rows of the dense with its first value
        for source in holds.nonzero().flatten().tolist():
            columns = _positions(big[source], small[row])
            if columns is None:
                continue
            rows = _positions(big[:, columns].flatten(1), small.flatten(1))
            if rows is not None:
                return dict(zip(dims, (rows, columns), strict=False))
    raise Failed("wrong", f"the values of {name} are not slices of the dense model's")


def _positions(big: Tensor, small: Tensor) -> Tensor | None:
    """Indices of the rows of one matrix in another, in ascending order; None if one is not there."""
    found: list[int] = []
    for row in small:
        hits = (big[:, 0] == row[0]).nonzero().flatten().tolist()
        hit = next((i for i in hits if (not found or i > found[-1]) and torch.equal(big[i], row)), None)
        if hit is None:
            return None
        found.append(hit)
    return torch.tensor(found)


def peak_megabytes() -> int:
    """The most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class Row(dict[str, Any]):
    """A row that says on standard output how far it is, so that what a time limit ends is known."""

    def stage(self, name: str) -> float:
        """Say what begins; the time."""
        print(json.dumps({"stage": name, **self}), flush=True)
        return time.perf_counter()

    def remark(self, note: str) -> None:
        """Add to the note."""
        if note:
            self["note"] = "; ".join(part for part in (self.get("note"), note) if part)


def ours(model: Model, row: Row) -> tuple[nn.Module, Kept]:
    """Prune with this package."""
    net, inputs = build(model), model.inputs(1)
    start = row.stage("trace")
    graph = lp.trace(net, inputs)
    row["trace s"] = round(time.perf_counter() - start, 2)
    row["prunable share"] = round(graph.prunable_share, 4)
    if graph.frozen:
        alike = Counter(re.sub(r"'[^']*'|\d+", "#", reason) for reason in graph.frozen.values())
        shape, times = alike.most_common(1)[0]
        reason = next(r for r in graph.frozen.values() if re.sub(r"'[^']*'|\d+", "#", r) == shape)
        row.remark(f"{len(graph.frozen)} frozen, {times} as in: {_first_line(reason)}")
    start = row.stage("plan")
    try:
        meta = any(p.is_meta for p in net.parameters())  # without values there is nothing to score
        method = "random_channels" if meta else "l1_filter"
        plan = lp.plan(graph, method=method, budget=lp.Budget(0.5))
    except UnmeetableBudget as error:
        smallest = re.search(r"([\d.]+) are left", str(error))
        if smallest is None:
            raise
        row.remark(f"half the flops cannot be met, the least is {smallest[1]}")
        plan = lp.plan(graph, method=method, budget=lp.Budget(min(1.0, float(smallest[1]))))
    row["plan s"] = round(time.perf_counter() - start, 2)
    exact = all(group.exact for group in graph.groups if plan.groups.get(group.name, (0, 0))[0] < group.size)
    row["exact"] = "yes" if exact else "no"
    before, predicted = graph.cost(), graph.cost(plan)
    start = row.stage("cut")
    lp.cut(net, plan, absorb=False)
    row["cut s"] = round(time.perf_counter() - start, 2)
    row["peak MB"] = peak_megabytes()
    row.stage("count")
    _run(net, inputs)
    counted = _count(net, inputs, row)
    if counted is not None:
        row["flops kept"] = round(counted.flops / before.flops, 5)
        row["predicted - counted"] = predicted.flops - counted.flops
        if predicted.params != counted.params:
            row.remark(f"parameters: predicted - counted {predicted.params - counted.params}")
    return net, plan.kept


def torch_pruning(model: Model, row: Row) -> tuple[nn.Module, Kept]:
    """Prune with Torch-Pruning."""
    import torch_pruning as tp

    net, inputs = build(model), model.inputs(1)
    ignored = output_layers(net.eval(), inputs)
    start = row.stage("trace")
    pruner = tp.pruner.BasePruner(
        net, inputs, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.5, ignored_layers=ignored
    )
    row["trace s"] = round(time.perf_counter() - start, 2)
    start = row.stage("cut")
    pruner.step()
    row["cut s"] = round(time.perf_counter() - start, 2)
    row["peak MB"] = peak_megabytes()
    row.stage("count")
    _run(net, inputs)
    dense = build(model)
    kept = read_kept(dense, net) if not any(p.is_meta for p in net.parameters()) else {}
    sizes = {name: p.numel() for name, p in dense.named_parameters()}
    changed = [n for n, p in net.named_parameters() if n in sizes and p.numel() != sizes[n]]
    row["prunable share"] = round(sum(sizes[n] for n in changed) / max(1, sum(sizes.values())), 4)
    if not changed:
        raise Failed("nothing pruned", "every parameter has the shape it had")
    before, after = _count(dense, inputs, row), _count(net, inputs, row)
    if before is not None and after is not None:
        row["flops kept"] = round(after.flops / before.flops, 5)
    return net, kept


def output_layers(net: nn.Module, inputs: Any) -> list[nn.Module]:
    """The layers whose outputs reach the model's own output without another layer between, told from the backward."""
    owners = {id(p): m for m in net.modules() for p in m.parameters(recurse=False)}
    layers = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.RNNBase)
    stack = [t.grad_fn for t in tensors(call(net, inputs)) if t.grad_fn is not None]
    found, seen = [], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        nexts = [n for n, _ in node.next_functions if n is not None]
        parts = [*nexts, *(n for m in nexts if m.name().startswith("TBackward") for n, _ in m.next_functions)]
        owned = [owners.get(id(getattr(n, "variable", None))) for n in parts]
        makers = [m for m in owned if isinstance(m, layers) or type(m).__name__ == "Conv1D"]
        found += makers
        stack += [] if makers else nexts
    return list({id(m): m for m in found}.values())


def _run(net: nn.Module, inputs: Any) -> None:
    try:
        with torch.no_grad():
            call(net.eval(), inputs)
    except Exception as error:
        raise Failed("does not run", _first_line(error)) from error


def _count(net: nn.Module, inputs: Any, row: Row) -> Any:
    try:
        return lp.count(net, inputs)
    except Exception as error:
        row.remark(f"not counted: {_first_line(error)}")
        return None


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    name = f"{type(error).__name__}: " if isinstance(error, BaseException) else ""
    return (name + (lines[0] if lines else ""))[:300]


def check(model: Model, net: nn.Module, kept: Kept, row: Row) -> None:
    """Run a cut model in both modes and hold it against the dense one; fills in the status."""
    row.stage("check")
    failed = None
    try:
        run_train(model, net)
    except Exception as error:
        failed = Failed("does not run", f"in train mode: {_first_line(error)}")
    if any(p.is_meta for p in net.parameters()):
        row.remark("no memory behind it: shapes alone were checked")
    else:
        raw, aside, allowed, note = independent_difference(model, net, kept)
        row["difference"], row["norms aside"] = f"{raw:.1e}", f"{aside:.1e}"
        row.setdefault("exact", "yes" if raw <= allowed else "no")
        row.remark(note)
        if model.compare:
            row.remark(f"compared: {', '.join(model.compare)}")
        if not aside <= allowed or (row["exact"] == "yes" and not raw <= allowed):
            raise Failed("wrong", f"relative difference {raw:.1e}, {aside:.1e} with norms aside")
    if failed is not None:
        raise failed


def one(model: Model, tool: str) -> Row:
    """Everything about one model and one tool, in this process."""
    row = Row(model=model.name, source=model.source, kind=model.kind, family=model.family, tool=tool)
    warnings.simplefilter("ignore")
    row.stage("build")
    try:
        net, kept = (ours if tool == "ours" else torch_pruning)(model, row)
        check(model, net, kept, row)
        row["status"] = "ok"
    except Failed as failed:
        row["status"] = failed.status
        row.remark(str(failed))
    except NothingToPrune as error:
        row["status"] = "nothing pruned"
        row.remark(_first_line(error))
    except MemoryError as error:
        row["status"] = "memory"
        row.remark(_first_line(error))
    except Exception as error:
        out_of_memory = "can't allocate memory" in str(error) or "bad_alloc" in str(error)
        row["status"] = "memory" if out_of_memory else "raised"
        row.remark(_first_line(error))
    return row


def in_a_process(model: Model, tool: str, seconds: float, gigabytes: float) -> dict[str, Any]:
    """`one` in a fresh process with limits; the row, also where the process did not come to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--one", model.key, "--tool", tool, "--memory", str(gigabytes)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        out.seek(0)
        err.seek(0)
        said = [json.loads(line) for line in out.read().splitlines() if line.startswith('{"')]
        row = said[-1] if said else {"stage": "start", "model": model.name, "source": model.source, "tool": tool}
        row = {"kind": model.kind, "family": model.family, **row}
        if "status" not in row:
            lines = err.read().strip().splitlines()
            ends = f"{lines[-1][:200]} " if lines and code is not None else ""
            status = "time" if code is None else "memory" if code in (-9, 137) else "raised"
            end = f"after {seconds:g} s" if code is None else f"with exit status {code}"
            row |= {"status": status, "note": f"{ends}ended {end} during {row['stage']}"}
    return {key: row.get(key) for key in FIELDS}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the CSV file; numbers are numbers again, empty cells None."""
    return [{key: None if value == "" else value for key, value in row.items()} for row in read(path)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], mode: str) -> None:
    """Write the CSV file ("w"), or add to it ("a")."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = mode == "w" or not path.exists()
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, fieldnames=FIELDS, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)


def side_by_side(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per model: ours, then Torch-Pruning's."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        line = table.setdefault((row["source"], row["model"]), {"model": row["model"], "source": row["source"]})
        line["kind"] = row["kind"]
        parts = [row[key] for key in ("trace s", "plan s", "cut s") if row.get(key) is not None]
        cells = {"status": row["status"], "exact": row["exact"], "difference": row["difference"]}
        cells |= {"norms aside": row["norms aside"], "share": row["prunable share"], "flops kept": row["flops kept"]}
        if row["tool"] == "ours":
            cells["pred. - counted"] = row["predicted - counted"]
        cells |= {"s": round(sum(parts), 2) if parts else None, "MB": row["peak MB"]}
        short = "" if row["tool"] == "ours" else "TP "
        line |= {short + key: value for key, value in cells.items()}
    return list(table.values())


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per source and tool: how many models ended how."""
    out = []
    for source in dict.fromkeys(row["source"] for row in rows):
        for tool in TOOLS:
            these = [row for row in rows if row["source"] == source and row["tool"] == tool]
            if these:
                ends = Counter(row["status"] for row in these)
                counts = {status: ends[status] for status in STATUSES}
                out.append({"source": source, "tool": tool, "models": len(these), **counts})
    return out


def families(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per family: how many of its models are cut right, what can go of them, and by the other tool."""
    out = []
    for source, family in dict.fromkeys((row["source"], row["family"]) for row in rows):
        these = {
            tool: [r for r in rows if (r["source"], r["family"], r["tool"]) == (source, family, tool)] for tool in TOOLS
        }
        shares = [r["prunable share"] for r in these["ours"] if r["prunable share"] is not None]
        right = [sum(r["status"] == "ok" for r in these[tool]) for tool in TOOLS]
        out.append(
            {
                "family": family,
                "source": source,
                "models": len(these["ours"] or these["torch-pruning"]),
                "right": right[0],
                "exact": sum(r["status"] == "ok" and r["exact"] == "yes" for r in these["ours"]),
                "least share": min(shares, default=None),
                "right with Torch-Pruning": right[1] if these["torch-pruning"] else None,
            }
        )
    return out


def short_of_the_goal(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Models of ours that are not cut right, keep too many flops, are predicted wrong, or lose too small a share."""
    out = []
    for row in rows:
        if row["tool"] != "ours":
            continue
        share, goal, kept = row["prunable share"], GOALS.get(row["kind"], 0.0), row["flops kept"]
        why = []
        if row["status"] != "ok":
            why.append(str(row["status"]))
        if share is not None and share < goal:
            why.append(f"share {share:.3f} of {goal:g}")
        if kept is not None and kept > 0.5:
            why.append(f"flops kept {kept:.3f}")
        if row["predicted - counted"]:
            why.append(f"predicted - counted {row['predicted - counted']}")
        if why:
            out.append({"model": row["model"], "source": row["source"], "short": ", ".join(why), "reason": row["note"]})
    return out


def sections(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The tables of the documentation, by the name in their mark."""
    return {
        "summary": markdown_table(summary(rows)),
        "families": markdown_table(families(rows)),
        "short of the goal": markdown_table(_safe(short_of_the_goal(rows))) or "None.",
    }


def _safe(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v.replace("|", "\\|") if isinstance(v, str) else v for k, v in row.items()} for row in rows]


def fill(page: str, tables: Mapping[str, str]) -> str:
    """A page with the tables put between their marks.

    Raises:
        ValueError: if the page lacks a mark.
    """
    for name, table in tables.items():
        pattern = rf"(<!-- zoo: {re.escape(name)} -->\n).*?(<!-- zoo: end -->)"
        if not re.search(pattern, page, flags=re.DOTALL):
            raise ValueError(f"the page has no place for {name!r}: wanted <!-- zoo: {name} --> and <!-- zoo: end -->")
        page = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", page, flags=re.DOTALL)
    return page


def write_markdown(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """`zoo.md`: how many ended how, one row per model, and what was noted of each."""
    notes = [
        {"model": r["model"], "source": r["source"], "tool": r["tool"], "note": r["note"]} for r in rows if r["note"]
    ]
    parts = [
        "# The zoo",
        "Made by `python benchmarks/zoo.py`; [architectures](../../docs/architectures.md) says what the columns mean. "
        "TP is Torch-Pruning, which is asked for half the channels, not half the flops; its share is that of the "
        "parameters that shrank.",
        markdown_table(summary(rows)),
        markdown_table(_safe(side_by_side(rows))),
        "## Notes",
        markdown_table(_safe(notes)),
    ]
    path.write_text("\n\n".join(part for part in parts if part) + "\n")


def main() -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression that source/name has to match")
    parser.add_argument("--tool", choices=(*TOOLS, "both"), default="ours")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--redo", action="store_true", help="also what has a row already")
    parser.add_argument("--seconds", type=float, default=180, help="time limit of a process")
    parser.add_argument("--memory", type=float, default=10, help="limit of a process, in GiB")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--docs", type=Path, help="page whose tables are filled in")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = catalog()
    if options.one:
        resource.setrlimit(resource.RLIMIT_DATA, (int(options.memory * 2**30),) * 2)
        torch.set_num_threads(1)
        print(json.dumps(one(models[options.one], options.tool)), flush=True)
        return
    chosen = {key: model for key, model in models.items() if re.search(options.only, key)}
    if not chosen:
        sys.exit(f"--only {options.only!r} matches no model; --list prints them")
    if options.list:
        print("\n".join(chosen))
        return
    path = options.results / "zoo.csv"
    jobs = [(m, tool) for m in chosen.values() for tool in (TOOLS if options.tool == "both" else (options.tool,))]
    wanted = {(m.source, m.name, tool) for m, tool in jobs}
    rows = read_rows(path)
    if options.redo:
        rows = [r for r in rows if (r["source"], r["model"], r["tool"]) not in wanted]
        write_rows(path, rows, "w")
    done = {(r["source"], r["model"], r["tool"]) for r in rows}
    lock = threading.Lock()

    def do(job: tuple[Model, str]) -> None:
        row = in_a_process(*job, options.seconds, options.memory)
        with lock:
            write_rows(path, [row], "a")
            shown = {
                key: row[key]
                for key in ("status", "exact", "difference", "norms aside", "prunable share", "flops kept", "note")
            }
            print(f"{job[0].key} {job[1]}: {shown}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(do, [(m, tool) for m, tool in jobs if (m.source, m.name, tool) not in done]))
    order = {(m.source, m.name): i for i, m in enumerate(models.values())}
    rows = [r for r in read_rows(path) if (r["source"], r["model"]) in order]
    rows.sort(key=lambda r: (order[r["source"], r["model"]], TOOLS.index(r["tool"])))
    write_markdown(rows, options.results / "zoo.md")
    if options.docs:
        options.docs.write_text(fill(options.docs.read_text(), sections(rows)))


if __name__ == "__main__":
    main()
