"""A trained model leaves: as a plain state dict, as a ``torch.export`` program, as ONNX, each held against the model.

Whatever is written loads where this package is not installed. Files are written aside and compared with the model on
random inputs; only when all of them compute what it computes do they take their places.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fusion
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune import rebuild
from lightning_prune.decision import Plan
from lightning_prune.errors import TraceError, UnequalExport
from lightning_prune.factorise import factorise, is_pair, is_pair_of
from lightning_prune.graph.attention import is_stand_in
from lightning_prune.graph.trace import as_call, place, undisturbed
from lightning_prune.wiring import wiring

FORMS = ("state_dict", "torch_export", "onnx")
LOADER = "load_model.py"
TOLERANCE = 1e-4
BATCH_SIZES = (1, 3)  # a program traced at 2 that took its batch size for a constant fails at both
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *_TRANSPOSED)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Exported:
    """One form that a model was written in.

    Attributes:
        form: one of `FORMS`.
        path: its file.
        bytes: of that file, and of the one beside it that holds the weights of a large ONNX model.
        difference: the largest from the model's outputs on random inputs, as a fraction of the largest output.
        tolerance: what it was allowed to be.
        batch_sizes: that were compared; empty where the batch size is fixed.
    """

    form: str
    path: Path
    bytes: int
    difference: float
    tolerance: float
    batch_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Plain:
    """A copy of a model with nothing in it but layers.

    Attributes:
        model: in eval mode, on the CPU, without gradients.
        folded: norm -> the layer it was folded into.
        paired: layers that became two, by the plan's ranks.
    """

    model: nn.Module
    folded: Mapping[str, str]
    paired: tuple[str, ...]


def export_model(
    model: nn.Module,
    example_inputs: Any,
    out: str | Path,
    *,
    to: Sequence[str] = FORMS,
    name: str = "model",
    fold_bn: bool = False,
    plan: Plan | None = None,
    build: Callable[[], nn.Module] | None = None,
    dynamic_batch: bool = True,
    tolerance: float = TOLERANCE,
    opset: int | None = None,
) -> dict[str, Exported]:
    """Write a model in forms that need nothing of this package, each compared with the model first.

    Args:
        model: dense or pruned, on any device; it is left as it is.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs. Floating inputs to compare on are
            normal noise with their mean and deviation; others are drawn from the values that the examples hold.
        out: directory, made if it is not there.
        to: forms out of `FORMS`; a state dict comes with a loader that needs torch alone.
        name: of the files, before their suffixes.
        fold_bn: whether norms that alone read a layer become part of its weights.
        plan: of the pruned model. At its ranks layers become two where they are still one; the JSON holds all of it.
        build: makes the model anew, dense, so that the state dict is compared too after it was loaded into that.
        dynamic_batch: whether the batch size stays open; it is the first dimension of every input.
        tolerance: largest difference of outputs, as a fraction of the largest output; at least eight roundings of the
            outputs' dtype. Outputs that are no floating-point numbers have to be equal.
        opset: of ONNX; by default the exporter's.

    Returns:
        Form -> what was written.

    Raises:
        UnequalExport: if a form computes something else; nothing has been written then, as with every other error.
        TraceError: if the model does not run on the inputs, or torch cannot export it.
        ValueError: for an argument that makes no sense.
        ModuleNotFoundError: for ONNX without the packages it needs.
    """
    _check(to, name, tolerance)
    if "onnx" in to:
        needs("onnx", "onnxscript", "onnxruntime", extra="export")
    batches = BATCH_SIZES if dynamic_batch else ()
    copied = _copied(model)
    sizes: tuple[int | None, ...] = (2, *batches) if batches else (None, None)
    inputs = [place(_drawn(example_inputs, size, seed), copied) for seed, size in enumerate(sizes)]
    wanted = [(given, _outputs(copied, given)) for given in inputs]
    simple = _simplified(copied, inputs[0], fold_bn, plan)
    _compared("model at the plan's ranks" if simple.paired else "plain model", simple.model, wanted, tolerance)
    recipe = _recipe(simple)
    program = _program(simple.model, inputs[0], dynamic_batch) if set(to) - {"state_dict"} else None
    out = Path(out)
    made_here = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=out, prefix=".export-") as folder:
            aside, done = Path(folder), {}
            for form in dict.fromkeys(to):
                path, runs = _WRITERS[form](_Job(simple, recipe, program, aside / name, build, opset))
                difference = _compared(form, runs, wanted, tolerance)
                size = sum(f.stat().st_size for f in (path, Path(f"{path}.data")) if f.exists())
                done[form] = Exported(form, out / path.name, size, difference, tolerance, batches)
            described = _description(simple, example_inputs, recipe, plan, done)
            (aside / f"{name}.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
            for file in sorted(aside.iterdir()):
                os.replace(file, out / file.name)
    except BaseException:
        if made_here:
            shutil.rmtree(out)
        raise
    return done


def plain(model: nn.Module, example_inputs: Any, *, fold_bn: bool = False, plan: Plan | None = None) -> Plain:
    """Copy a model and leave nothing in the copy but layers: masks and parametrizations become part of the weights.

    Args:
        model: any module that runs on the example inputs; it is left as it is.
        example_inputs: see `export_model`, as are the other arguments.
        fold_bn: whether norms are folded.
        plan: at whose ranks layers become two.

    Raises:
        TraceError: if the model does not run on the example inputs.
    """
    return _simplified(_copied(model), example_inputs, fold_bn, plan)


def _copied(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode; a trainer is not copied with it."""
    left_out = {id(vars(m)[key]): None for m in model.modules() for key in ("_trainer", "_fabric") if key in vars(m)}
    copied: nn.Module = copy.deepcopy(getattr(model, "_orig_mod", model), left_out)
    return copied.cpu().eval().requires_grad_(False)


def _simplified(copied: nn.Module, example_inputs: Any, fold_bn: bool, plan: Plan | None) -> Plain:
    rebuild.fold_parametrizations(copied)
    ranks = {} if plan is None else {n: r for n, r in plan.ranks.items() if not is_pair_of(copied, n, r)}
    try:
        factorise(copied, ranks)
    except ValueError as error:
        raise ValueError(f"the plan's ranks are not of this model: {error}") from error
    folded = _fold(copied, place(example_inputs, copied)) if fold_bn else {}
    return Plain(copied.requires_grad_(False), folded, tuple(ranks))


def needs(*packages: str, extra: str) -> None:
    """Say which extra is missing.

    Raises:
        ModuleNotFoundError: if one of the packages cannot be imported.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ModuleNotFoundError(
                f"this needs {package}, which cannot be imported ({error}): pip install 'lightning-prune[{extra}]'"
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """For the time that other packages export or quantize: what they warn of and log concerns their own code.

    Before torch raises that it cannot export a model it logs and prints pages of what it had so far.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class OnnxModel(nn.Module):
    """An ONNX file as a module: takes and gives tensors on the CPU, with torch's number of threads.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        needs("onnxruntime", extra="export")
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [given.name for given in self._session.get_inputs()]

    def feeds(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Inputs by their names in the file, as NumPy arrays; keyword inputs by name where the file has their names."""
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if kwargs and set(self._names) <= set(kwargs):
            leaves = [kwargs[name] for name in self._names]
        if len(leaves) != len(self._names):
            raise ValueError(f"the ONNX model takes {self._names}, got {len(leaves)} tensors")
        return {name: leaf.detach().cpu().numpy() for name, leaf in zip(self._names, leaves, strict=True)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file; one output is a tensor, several are a tuple."""
        outputs = tuple(torch.from_numpy(value) for value in self._session.run(None, self.feeds(*args, **kwargs)))
        return outputs[0] if len(outputs) == 1 else outputs


@dataclass(frozen=True)
class _Job:
    """What a writer is given; ``stem`` is a path without its suffix."""

    simple: Plain
    recipe: dict[str, Any]
    program: Any
    stem: Path
    build: Callable[[], nn.Module] | None
    opset: int | None


def _check(to: Sequence[str], name: str, tolerance: float) -> None:
    if isinstance(to, str) or not to or set(to) - set(FORMS):
        raise ValueError(f"to= takes a list out of {', '.join(FORMS)}, got {to!r}")
    if not name or Path(name).name != name:
        raise ValueError(f"name must be the beginning of a file name, without a folder, got {name!r}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be above 0 and below 1, a fraction of the largest output, got {tolerance!r}")


def _write_state_dict(job: _Job) -> tuple[Path, Callable[..., Any]]:
    path = job.stem.with_name(f"{job.stem.name}.pt")
    torch.save({key: value.contiguous() for key, value in job.simple.model.state_dict().items()}, path)
    shutil.copyfile(rebuild.__file__, path.with_name(LOADER))
    if job.build is None or job.recipe["rewritten"]:
        return path, job.simple.model
    job.stem.with_name(f"{job.stem.name}.json").write_text(json.dumps({"rebuild": job.recipe}), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        return path, rebuild.load(job.build(), path.parent, job.stem.name)


def _write_program(job: _Job) -> tuple[Path, Callable[..., Any]]:
    path = job.stem.with_name(f"{job.stem.name}.pt2")
    with quiet():
        torch.export.save(job.program, path)
        return path, torch.export.load(path).module()


def _write_onnx(job: _Job) -> tuple[Path, Callable[..., Any]]:
    onnx = importlib.import_module("onnx")
    path = job.stem.with_name(f"{job.stem.name}.onnx")
    try:
        with quiet():
            made: Any = torch.onnx.export(job.program, dynamo=True, opset_version=job.opset, verbose=False)
            made.save(path)
    except Exception as error:
        raise TraceError(f"torch cannot write {type(job.simple.model).__name__} as ONNX: {_first(error)}") from error
    proto = onnx.load(path, load_external_data=False)
    _tidy(proto.graph)
    onnx.save(proto, path)
    onnx.checker.check_model(str(path))
    return path, OnnxModel(path)


_WRITERS: Mapping[str, Callable[[_Job], tuple[Path, Callable[..., Any]]]] = {
    "state_dict": _write_state_dict,
    "torch_export": _write_program,
    "onnx": _write_onnx,
}


def _tidy(graph: Any) -> None:
    """Call the open dimension by its name, and leave out notes of where in whose folders an operator was written."""
    for node in graph.node:
        del node.metadata_props[:]
    renamed: dict[str, str] = {}
    for value in graph.input:
        first = value.type.tensor_type.shape.dim[:1]
        if first and first[0].dim_param:
            renamed[first[0].dim_param] = "batch"
    for value in (*graph.input, *graph.output, *graph.value_info):
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in renamed:
                dim.dim_param = renamed[dim.dim_param]


def _program(model: nn.Module, inputs: Any, dynamic_batch: bool) -> Any:
    """The ``torch.export`` program of a plain model."""
    args, kwargs = as_call(inputs)
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    if dynamic_batch:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                shapes[leaf] = {0: torch.export.Dim.DYNAMIC}
    try:
        with quiet(), _portable():
            dynamic = shapes.dynamic_shapes(model, args, kwargs) if dynamic_batch else None
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic)
    except Exception as error:
        advice = "; a batch size that is fixed (dynamic_batch=False) asks less of a model" if dynamic_batch else ""
        raise TraceError(f"torch cannot export {type(model).__name__}: {_first(error)}{advice}") from error
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # places on the machine it was made on
    return program


@contextmanager
def _portable() -> Iterator[None]:
    """Without gradients, without the fused attention that only torch has, and without hooks that stay behind.

    Where torch 2.10 cannot export, it leaves a hook on all modules of the process.
    """
    every = [hooks for name, hooks in vars(nn.modules.module).items() if name.endswith("_registration_hooks")]
    before = [set(hooks) for hooks in every]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hooks, keys in zip(every, before, strict=True):
            for key in hooks.keys() - keys:
                del hooks[key]


def _first(error: Exception) -> str:
    """What another package's error says, without its pages of advice."""
    text = " ".join(str(error).split()).partition(" For more information")[0]
    return f"{type(error).__name__}: {text[:600]}{'...' if len(text) > 600 else ''}"


def _drawn(example_inputs: Any, batch: int | None, seed: int) -> Any:
    """Random inputs like the examples, of a batch size or of the examples' own."""
    tensors = [leaf for leaf in tree_leaves(as_call(example_inputs)) if isinstance(leaf, Tensor)]
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in tensors}
    if batch is not None and (len(sizes) != 1 or 0 in sizes):
        raise ValueError(
            "an open batch size needs inputs whose first dimension is the batch, the same for all and at least 1; got "
            f"shapes {[tuple(leaf.shape) for leaf in tensors]}; pass dynamic_batch=False to fix all sizes"
        )
    generator = torch.Generator().manual_seed(seed)

    def draw(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = value.shape if batch is None else (batch, *value.shape[1:])
        known = value.detach().cpu()
        if not known.is_floating_point():  # tokens, say: each one that is there is a valid one
            at = torch.randint(max(1, known.numel()), shape, generator=generator)
            return known.flatten()[at] if known.numel() else known
        mean, deviation = known.double().mean(), known.double().std(correction=0)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (mean + (deviation if deviation > 0 else 1.0) * noise).to(known.dtype)

    return tree_map(draw, example_inputs)


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Outputs of a model in eval mode.

    Raises:
        TraceError: if it does not run, gives no tensors, or gives no finite ones.
    """
    args, kwargs = as_call(inputs)
    with undisturbed(model):
        model.eval()
        try:
            outputs = _flat(model(*args, **kwargs))
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} does not run on inputs like the examples: {_first(error)}"
            ) from error
    if not outputs:
        raise TraceError(f"{type(model).__name__} gives no tensor, so that nothing can be compared")
    if not all(bool(value.isfinite().all()) for value in outputs):
        raise TraceError(f"{type(model).__name__} gives NaN or infinity on noise like the examples; check its weights")
    return outputs


def _flat(value: Any) -> list[Tensor]:
    return [leaf.detach().cpu().clone() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _compared(
    form: str, runs: Callable[..., Any], wanted: Sequence[tuple[Any, list[Tensor]]], tolerance: float
) -> float:
    """The largest difference from the model's outputs.

    Raises:
        UnequalExport: if it is above the tolerance, or a NaN.
    """
    worst = 0.0
    for inputs, outputs in wanted:
        args, kwargs = as_call(inputs)
        shapes = [tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        try:
            with torch.no_grad():
                got = _flat(runs(*args, **kwargs))
        except Exception as error:
            raise UnequalExport(f"the {form} does not run on inputs of shapes {shapes}: {_first(error)}") from error
        if [value.shape for value in got] != [value.shape for value in outputs]:
            raise UnequalExport(
                f"the {form} gives shapes {[tuple(v.shape) for v in got]} for inputs of shapes {shapes}, the model "
                f"{[tuple(v.shape) for v in outputs]}"
            )
        for value, right in zip(got, outputs, strict=True):
            difference, allowed = _difference(value, right, tolerance)
            if not difference <= allowed:  # a NaN is not
                raise UnequalExport(
                    f"the {form} differs from the model by {difference:.3g} of its largest output, on inputs of shapes "
                    f"{shapes}; at most {allowed:.3g} is allowed; nothing was written"
                )
            worst = max(worst, difference)
    return worst


def _difference(value: Tensor, right: Tensor, tolerance: float) -> tuple[float, float]:
    """The largest difference of two tensors of one shape as a fraction of the largest entry, and what it may be."""
    if not right.numel():
        return 0.0, 0.0
    if not (right.is_floating_point() or right.is_complex()):
        return float((value != right).double().mean()), 0.0  # classes and counts: the share that differs
    wide = torch.complex128 if right.is_complex() else torch.float64
    apart, largest = (value.to(wide) - right.to(wide)).abs().max().item(), right.to(wide).abs().max().item()
    allowed = max(tolerance, 8 * torch.finfo(right.dtype).eps)
    return (apart / largest if largest else float("inf") if apart else 0.0), allowed


def _fold(model: nn.Module, example_inputs: Any) -> dict[str, str]:
    """Make norms part of the layers that they alone read, in place; norm -> layer."""
    modules = dict(model.named_modules())
    layers = {
        name: module
        for name, module in modules.items()
        if name and type(module) in _FOLDABLE and not (type(module) in _TRANSPOSED and module.groups != 1)
    }
    wired = wiring(model, example_inputs, layers)
    behind = {name: norm.variance.rpartition(".")[0] for name, norm in wired.norms.items()}
    folded: dict[str, str] = {}
    for layer, norm in behind.items():
        alone = list(behind.values()).count(norm) == 1 and layer not in wired.bypassed
        if not alone or type(modules.get(norm)) not in _NORMS:
            continue
        fused = _fused(layers[layer], modules[norm])
        for name, new in ((layer, fused), (norm, nn.Identity())):
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent)._modules[key] = new
        folded[norm] = layer
    return folded


def _fused(layer: Any, norm: Any) -> nn.Module:
    """A layer with a norm in its weights; torch adds the rounding of float32, so that it is done in double."""
    wide, norm = copy.deepcopy(layer).double(), copy.deepcopy(norm).double()
    fused: nn.Module
    if isinstance(layer, nn.Linear):
        fused = fusion.fuse_linear_bn_eval(wide, norm)
    else:
        fused = fusion.fuse_conv_bn_eval(wide, norm, transpose=isinstance(layer, _TRANSPOSED))
    return fused.to(layer.weight.dtype)


def _recipe(simple: Plain) -> dict[str, Any]:
    """How a model of the class, as it is made, becomes one that takes the state dict: see rebuild.py."""
    modules = dict(simple.model.named_modules())
    return {
        "pairs": [name for name, module in modules.items() if name and is_pair(module)],
        "folded": list(simple.folded),
        "rewritten": [name for name, module in modules.items() if is_stand_in(module)],
        "attributes": {name: sizes for name, module in modules.items() if (sizes := _sizes(module))},
    }


def _sizes(module: nn.Module) -> dict[str, int | list[int]]:
    """Public attributes of a module that are whole numbers, or tuples of them: all that a cut may change."""
    sizes: dict[str, int | list[int]] = {}
    for key, value in vars(module).items():
        if key.startswith("_") or key == "training":
            continue
        if type(value) is int:
            sizes[key] = value
        elif isinstance(value, tuple) and value and all(type(item) is int for item in value):
            sizes[key] = list(value)
    return sizes


def _description(
    simple: Plain, example_inputs: Any, recipe: dict[str, Any], plan: Plan | None, done: Mapping[str, Exported]
) -> dict[str, Any]:
    """What the JSON beside the files says."""
    inputs = [leaf for leaf in tree_leaves(as_call(example_inputs)) if isinstance(leaf, Tensor)]
    forms = {form: {**asdict(one), "path": one.path.name} for form, one in done.items()}
    for said in forms.values():
        del said["form"]
    return {
        "class": f"{type(simple.model).__module__}.{type(simple.model).__qualname__}",
        "inputs": [{"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")} for leaf in inputs],
        "forms": forms,
        "parameters": {name: list(value.shape) for name, value in simple.model.state_dict().items()},
        "rebuild": recipe,
        "plan": None if plan is None else plan.to_dict(),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
    }
