"""Checkpoints of a cut model: they say their plan, and a model takes their shapes before it takes their weights."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_prune import surgery
from lightning_prune.decision import Plan
from lightning_prune.errors import IncompatibleCheckpoint, PruneError
from lightning_prune.factorise import in_form_of

KEY = "lightning_prune"
_DRAWS = frozenset((init.uniform_, init.normal_, init.kaiming_uniform_, torch.Tensor.uniform_, torch.Tensor.normal_))
"""What draws parameters; all functions of `torch.nn.init` come down to these."""
_M = TypeVar("_M", bound=pl.LightningModule)


def add_plan(checkpoint: dict[str, Any], state_key: str, plan: Plan) -> None:
    """Write a plan into a checkpoint under a plain top-level key, one entry per callback.

    Where the callback's own state is in the checkpoint the entry is the one in there, which the file then holds once.
    """
    state = checkpoint.get("callbacks", {}).get(state_key, {})
    written = state["plan"] if "plan" in state else plan.state_dict()
    checkpoint.setdefault(KEY, {"version": 1, "plans": {}})["plans"][state_key] = written


def written_by(checkpoint: Mapping[str, Any]) -> list[str]:
    """State keys of the callbacks whose plans a checkpoint holds."""
    entry = checkpoint.get(KEY)
    return list(entry["plans"]) if isinstance(entry, Mapping) and isinstance(entry.get("plans"), Mapping) else []


def plan_of(checkpoint: Mapping[str, Any]) -> Plan | None:
    """The plan of a checkpoint, those of several callbacks merged; None if there is none.

    Raises:
        IncompatibleCheckpoint: if what stands there is no plan.
    """
    entry = checkpoint.get(KEY)
    if entry is None:
        return None
    if not isinstance(entry, Mapping) or not isinstance(entry.get("plans"), Mapping):
        raise IncompatibleCheckpoint(f"the checkpoint's {KEY!r} entry is not one that lightning_prune wrote")
    plans = [Plan.from_state_dict(state) for state in entry["plans"].values()]
    return reduce(Plan.merge, plans) if plans else Plan()


def take_shapes(model: nn.Module, checkpoint: Mapping[str, Any], values: bool = True) -> None:
    """Give a model the shapes of a checkpoint's weights.

    Args:
        model: dense or cut.
        checkpoint: with a ``state_dict``.
        values: see `lightning_prune.surgery.conform`.

    Raises:
        IncompatibleCheckpoint: if the checkpoint is of another architecture; nothing has changed then.
    """
    plan = plan_of(checkpoint)
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping):
        raise IncompatibleCheckpoint(f"the checkpoint's 'state_dict' must be a mapping, got {type(state).__name__}")
    if plan is None or not plan.kept:
        shapes = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
        with in_form_of(model, shapes):
            surgery.reshape_like(model, shapes, plan, dense_again=plan is not None, values=values)
        return
    surgery.conform(model, state, plan, values=values)


def being_loaded(trainer: pl.Trainer) -> Mapping[str, Any]:
    """The checkpoint that a fit, or another stage, is going on from; empty once it has, or without one."""
    return getattr(trainer._checkpoint_connector, "_loaded_checkpoint", None) or {}


class _ShapesFirst:
    """A load-state-dict pre-hook: looks for the plan in the checkpoint the trainer is loading, else at shapes."""

    def __init__(self, trainer: pl.Trainer | None, model: pl.LightningModule | None) -> None:
        self._trainer = trainer
        self._model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> _ShapesFirst:
        return _ShapesFirst(None, None)  # in a copy of the module nobody would remove it, so that it does nothing

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        if prefix or self._trainer is None or self._model is None:
            return
        loaded = being_loaded(self._trainer)
        whole = loaded if loaded.get("state_dict") is not None else {}
        checkpoint = {**({KEY: whole[KEY]} if KEY in whole else {}), "state_dict": state_dict}
        for each in (self._model, *copies(self._trainer, self._model)):
            take_shapes(each, checkpoint)


def conform_on_load(trainer: pl.Trainer, model: pl.LightningModule) -> Any:
    """Register the pre-hook; returns its handle."""
    return model.register_load_state_dict_pre_hook(_ShapesFirst(trainer, model))  # type: ignore[no-untyped-call]


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """For the time of a load: say of a checkpoint that is not whole which one it is, and what to do.

    Raises:
        IncompatibleCheckpoint: instead of what torch raises, if the end of a local file is missing.
    """
    try:
        yield
    except Exception as error:
        file = Path(path)
        if not _is_torn(file):
            raise
        others = sorted(file.parent.glob(f"*{file.suffix}"), key=lambda other: -other.stat().st_mtime_ns)
        whole = next((other for other in others if other.is_file() and zipfile.is_zipfile(other)), None)
        raise IncompatibleCheckpoint(
            f"{file} is not a whole checkpoint: {file.stat().st_size} bytes of it are there and its end is missing, as "
            "when a process dies while it writes; use the one before it"
            + ("" if whole is None else f": {whole.name} is the newest whole one beside it")
        ) from error


def _is_torn(file: Path) -> bool:
    """Whether a local file begins as torch writes it, or has not even that, and does not end so."""
    if not file.is_file() or zipfile.is_zipfile(file):
        return False
    with file.open("rb") as opened:
        return b"PK\x03\x04".startswith(opened.read(4))


class _Naming:
    """Stands before a strategy's ``load_checkpoint`` until it is removed: no hook knows which file will be read."""

    def __init__(self, strategy: Any) -> None:
        self._strategy, self._load = strategy, strategy.load_checkpoint
        strategy.load_checkpoint = self

    def __call__(self, checkpoint_path: str | Path, *arguments: Any, **named: Any) -> Any:
        with naming(checkpoint_path):
            return self._load(checkpoint_path, *arguments, **named)

    def remove(self) -> None:
        if vars(self._strategy).get("load_checkpoint") is self:
            del self._strategy.load_checkpoint


def name_on_load(trainer: pl.Trainer) -> Any:
    """Have the trainer say which checkpoint is torn; returns the handle. One of several callbacks does."""
    standing = vars(trainer.strategy).get("load_checkpoint")
    return standing if isinstance(standing, _Naming) else _Naming(trainer.strategy)


def copies(trainer: pl.Trainer, model: pl.LightningModule) -> list[nn.Module]:
    """Copies of the module that other callbacks hold, to average weights in: they follow what is done to it."""
    held = [value for callback in trainer.callbacks for value in vars(callback).values()]  # type: ignore[attr-defined]
    modules = [getattr(value, "module", value) for value in held if isinstance(value, nn.Module)]
    return [module for module in modules if type(module) is type(model) and module is not model]


def wrap_again(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Under DDP the reducer holds the old shapes: let the strategy wrap the module anew, on all ranks."""
    wrapped = trainer.strategy.model
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        trainer.strategy.model = model
        del wrapped
        trainer.strategy.configure_ddp()  # type: ignore[attr-defined]


class PrunableModule:
    """Mixin for a `LightningModule`: ``load_from_checkpoint`` takes checkpoints of a cut model.

    Example:
        class Net(PrunableModule, LightningModule): ...
    """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the shapes of the checkpoint before its weights."""
        take_shapes(self, checkpoint)  # type: ignore[arg-type]
        parent = getattr(super(), "on_load_checkpoint", None)
        if parent is not None:
            parent(checkpoint)


def load_pruned(cls: type[_M], path: str | Path, *, map_location: Any = None, **arguments: Any) -> _M:
    """Load a Lightning checkpoint of a pruned module, whatever its class knows of pruning.

    No random numbers are drawn for parameters that the checkpoint holds. A class whose ``__init__`` cannot do without
    them, or of which the checkpoint leaves something out, is made a second time, with them.

    Args:
        cls: the module's class.
        path: the checkpoint; read with ``weights_only``, so that nothing in it is run.
        map_location: as for ``torch.load``.
        **arguments: for the class's ``__init__``, over the hyper-parameters in the checkpoint.

    Returns:
        The module, with its pruned shapes and weights, in eval mode as Lightning loads it.

    Raises:
        IncompatibleCheckpoint: if the checkpoint is of another architecture, or its end is missing.
        FileNotFoundError: if there is none.
        TypeError: if ``cls`` is no class.
    """
    if not isinstance(cls, type):
        raise TypeError(
            f"load_pruned takes the module's class first, then the path, got {type(cls).__name__}: "
            "load_pruned(MyModule, 'best.ckpt')"
        )
    with naming(path), _refusing(path, cls):
        undrawn = _Undrawn()
        try:
            with undrawn, _taking_shapes(cls, undrawn):
                module = cls.load_from_checkpoint(path, map_location=map_location, weights_only=True, **arguments)
            if undrawn.all_written():
                return module
        except Exception:
            if undrawn.drew:
                raise
        with _taking_shapes(cls):
            return cls.load_from_checkpoint(path, map_location=map_location, weights_only=True, **arguments)


class _Undrawn(TorchFunctionMode):
    """While it lasts no random values are drawn for parameters: a checkpoint is about to overwrite them.

    To draw them for a dense network takes longer than all else of a load. Whether all was overwritten is seen
    afterwards: a module of which something was not has to be made again, without this.

    Attributes:
        drew: whether everything has been done so far as it would be without this.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drew = True
        self._versions: dict[Tensor, int] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._versions is None and func in _DRAWS:
            tensor = kwargs.get("tensor", args[0] if args else None)
            if isinstance(tensor, nn.Parameter):
                self.drew = False
                with torch.no_grad():
                    return tensor.zero_()
        return func(*args, **kwargs)

    def expect(self, module: nn.Module) -> None:
        """From here on weights are loaded, and what is drawn is meant to be."""
        self.drew = False
        buffers = [b for m in module.modules() for k, b in m._buffers.items() if k not in m._non_persistent_buffers_set]
        tensors = [*module.parameters(), *(buffer for buffer in buffers if buffer is not None)]
        self._versions = {tensor: tensor._version for tensor in tensors}  # whatever its ``state_dict`` says it has

    def all_written(self) -> bool:
        """Whether all parameters, and buffers that a checkpoint holds, got other values since."""
        return all(tensor._version != version for tensor, version in (self._versions or {}).items())


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, or a plain state dict, on the CPU and with ``weights_only``, so that nothing in it is run.

    Returns:
        The checkpoint; a state dict as the only entry of one.

    Raises:
        IncompatibleCheckpoint: if it is neither, or its end is missing.
        FileNotFoundError: if there is no such file.
    """
    try:
        with naming(path):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (PruneError, OSError):
        raise
    except Exception as error:  # what is in a file decides which of many errors torch gives
        raise IncompatibleCheckpoint(
            f"{path} could not be read as a checkpoint: {type(error).__name__}: {_why(error)[:300]}"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise IncompatibleCheckpoint(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint or a state dict")
    return dict(checkpoint) if "state_dict" in checkpoint else {"state_dict": dict(checkpoint)}


def load_into(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Give a model the shapes and weights of a checkpoint, in place.

    Args:
        model: of the checkpoint's class, made with its arguments, dense or cut.
        checkpoint: see `read_checkpoint`.

    Raises:
        IncompatibleCheckpoint: if the checkpoint is of another architecture.
    """
    take_shapes(model, checkpoint)
    try:
        if isinstance(model, pl.LightningModule):
            model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
    except PruneError:
        raise
    except Exception as error:
        raise IncompatibleCheckpoint(
            f"the checkpoint is not of a {type(model).__name__} made with these arguments: {str(error).strip()[:500]}"
        ) from error


@contextmanager
def _refusing(path: str | Path, cls: type) -> Iterator[None]:
    """For the time of a load: what is in a file decides which of many errors Lightning and torch give."""
    try:
        yield
    except (PruneError, OSError):
        raise
    except Exception as error:
        raise IncompatibleCheckpoint(
            f"{path} could not be loaded as a {cls.__name__}: {type(error).__name__}: {_why(error)[:500]}"
        ) from error


def _why(error: Exception) -> str:
    """What torch found in a file, without its advice to read it in a way that may run what is in it."""
    found = re.search(r"WeightsUnpickler error:(.*?)(?:Check the documentation|$)", str(error), re.DOTALL)
    return " ".join((found[1] if found else str(error)).split())


@contextmanager
def _taking_shapes(cls: type[pl.LightningModule], undrawn: _Undrawn | None = None) -> Iterator[None]:
    """For the time of a load the class takes shapes before weights, as a `PrunableModule` always does.

    A subclass made for the purpose would not do: a checkpoint of LightningCLI names the class it has to be.

    Args:
        cls: of what is loaded.
        undrawn: told when weights are next.
    """
    own = vars(cls).get("on_load_checkpoint")
    before = cls.on_load_checkpoint

    def on_load_checkpoint(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not isinstance(module, PrunableModule):
            take_shapes(module, checkpoint, values=undrawn is None)
        before(module, checkpoint)
        if undrawn is not None:
            undrawn.expect(module)

    cls.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        if own is None:
            del cls.on_load_checkpoint
        else:
            cls.on_load_checkpoint = own  # type: ignore[method-assign]


class PrunedCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that ranks only checkpoints at or under the budget.

    Args:
        max_flops_kept: a checkpoint counts once ``prune/flops_kept`` is at most this; None for no bound.
        max_density: likewise ``prune/density``.
        **settings: see `ModelCheckpoint`.
    """

    def __init__(self, max_flops_kept: float | None = None, max_density: float | None = None, **settings: Any) -> None:
        if max_flops_kept is None and max_density is None:
            raise ValueError("PrunedCheckpoint needs max_flops_kept= or max_density=; else use ModelCheckpoint")
        super().__init__(**settings)
        self.max_flops_kept = max_flops_kept
        self.max_density = max_density

    @override
    def check_monitor_top_k(self, trainer: pl.Trainer, current: torch.Tensor | None = None) -> bool:
        for key, bound in (("prune/flops_kept", self.max_flops_kept), ("prune/density", self.max_density)):
            if bound is None:
                continue
            value = trainer.callback_metrics.get(key)
            if value is None or float(value) > bound * (1 + 1e-9):
                return False
        return super().check_monitor_top_k(trainer, current)
