"""What a comparison runs: one protocol for all, and the runs it takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from lightning_prune.budget import Budget
from lightning_prune.cli import told
from lightning_prune.methods import discover, find

Variant = Literal["dense", "finetuned", "scratch_e", "scratch_b"]
Start = Literal["trained", "initial"]
RANDOM = {"channels": "RandomChannels", "weights": "RandomWeights"}  # ranks have no random baseline
DIGITS: dict[str, Any] = {
    "model": {"class_path": "lightning_prune.commands.digits.DigitsNet"},
    "data": {"class_path": "lightning_prune.commands.digits.DigitsData"},
    "trainer": {"accelerator": "cpu"},
}
_OURS = {
    "callbacks": "the comparison adds the methods itself",
    "max_epochs": "--epochs and --finetune say it",
    "logger": "the rows are the log",
    "enable_checkpointing": "the comparison keeps what it needs",
    "default_root_dir": "--out says it",
}


@dataclass(frozen=True)
class Run:
    """One row of a comparison.

    Attributes:
        method: class name; "dense" for the network as it is.
        variant: the method with its fine-tuning, or its plan trained from new weights for as many epochs (E), or for as
            many flops (B).
        keep: of the budget.
        of: of the budget.
        seed: of weights, data order and method.
    """

    method: str
    variant: Variant
    keep: float
    of: str
    seed: int

    @property
    def key(self) -> str:
        """Its name, also that of its files."""
        return f"{self.method}-{self.variant}-{self.keep:g}-{self.of}-seed{self.seed}"

    @property
    def plan_key(self) -> str:
        """The name of the plan that the method's own run leaves."""
        return Run(self.method, "finetuned", self.keep, self.of, self.seed).key

    def __str__(self) -> str:
        if self.method == "dense":
            return f"dense, seed {self.seed}"
        names = {"scratch_e": "Scratch-E of ", "scratch_b": "Scratch-B of "}
        return f"{names.get(self.variant, '')}{self.method}, {self.keep:g} of the {self.of}, seed {self.seed}"


@dataclass(frozen=True)
class Protocol:
    """What is the same for all runs.

    Args:
        config: sections ``model`` and ``data`` as LightningCLI has them, and ``trainer``: plain settings.
        epochs: E, of the dense network that methods begin with, one for each seed.
        finetune: F, that every method has from there on; one that trains sparse from the start has E + F.
        metric: what ``trainer.test`` returns and is larger where better; None for the only one with "acc" in its name.
        start: method -> "trained" or "initial", over what the method says of itself.
        cap: bound on the epochs of Scratch-B, in those of Scratch-E; None for no bound.
        repeats: timed runs of each network; 0 measures no latency.
        threads: CPU threads within an operator.

    Raises:
        ValueError: if a section is missing, a trainer setting is the comparison's own, or a number makes no sense.
    """

    config: Mapping[str, Any] = field(default_factory=lambda: DIGITS)
    epochs: int = 15
    finetune: int = 10
    metric: str | None = None
    start: Mapping[str, Start] = field(default_factory=dict)
    cap: float | None = 2.0
    repeats: int = 20
    threads: int = 1

    def __post_init__(self) -> None:
        for section in ("model", "data"):
            if not self.config.get(section):
                raise ValueError(f"the config has no {section!r} section; there are {', '.join(self.config) or 'none'}")
        for key, why in _OURS.items():
            if key in (self.config.get("trainer") or {}):
                raise ValueError(f"the config's trainer section sets {key!r}; leave it out: {why}")
        for name, value, least in (("epochs", self.epochs, 1), ("finetune", self.finetune, 1),
                                   ("repeats", self.repeats, 0), ("threads", self.threads, 1)):  # fmt: skip
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.cap is not None and self.cap < 1:
            raise ValueError(f"cap must be at least 1, got {self.cap}")
        for name, start in self.start.items():
            find(name)
            if start not in ("trained", "initial"):
                raise ValueError(f"start of {name} must be 'trained' or 'initial', got {start!r}")

    def to_dict(self) -> dict[str, Any]:
        """What has to be the same for rows to be of one table."""
        return asdict(self)

    def start_of(self, method: str) -> Start:
        """The weights a method begins with."""
        return self.start.get(method, find(method).start)

    def build(self, seed: int) -> tuple[pl.LightningModule, pl.LightningDataModule]:
        """Module and data of a seed; a data module that takes a ``seed`` gets it, unless the config says one.

        Raises:
            ValueError: if a section cannot be read, or the module has no ``example_input_array``.
        """
        data = self._parsed(dict(self.config)).data
        module, _, name = data.class_path.rpartition(".")
        takes = inspect.signature(getattr(import_module(module), name)).parameters
        sections = {key: dict(self.config[key]) for key in ("model", "data")}
        given = sections["data"].get("init_args") or {}
        if "seed" in takes and "seed" not in given:
            sections["data"]["init_args"] = {**given, "seed": seed}
        pl.seed_everything(seed, workers=True, verbose=False)
        parser = _parser()
        # renamed on the way, and the old name warns
        make = getattr(parser, "instantiate", None) or parser.instantiate_classes
        made = make(self._parsed(sections))
        if made.model.example_input_array is None:
            raise ValueError(
                f"{type(made.model).__name__} has no example_input_array, on which costs are counted; set it in "
                "__init__"
            )
        return made.model, made.data

    @staticmethod
    def _parsed(config: Mapping[str, Any]) -> Any:
        from jsonargparse import ArgumentError

        try:
            return _parser().parse_object({key: config[key] for key in ("model", "data")})
        except (ArgumentError, ValueError) as error:
            raise ValueError(f"the config: {told(str(error))}") from error

    def trainer(self, epochs: int, callbacks: Sequence[pl.Callback], folder: Path) -> pl.Trainer:
        """One for a run, on one device unless the config says otherwise, that leaves nothing behind."""
        settings: dict[str, Any] = {
            "devices": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **(self.config.get("trainer") or {}),
        }
        fixed: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "default_root_dir": folder}
        return pl.Trainer(**settings, **fixed, max_epochs=epochs, callbacks=list(callbacks))


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model", fail_untyped=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data", fail_untyped=False)
    return parser


def read_config(path: Path) -> dict[str, Any]:
    """Sections of a YAML file.

    Raises:
        ValueError: if it holds no sections.
        FileNotFoundError: if there is no such file.
    """
    config = import_module("yaml").safe_load(path.read_text("utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no sections; compare wants model: and data: as LightningCLI has them")
    return config


def wanted(
    methods: Sequence[str] | None,
    budgets: Mapping[str, Sequence[Budget | float]],
    seeds: Sequence[int],
    scratch: Sequence[str] | Literal["all", "none"] = "all",
) -> list[Run]:
    """All runs: dense, random, the methods, and their plans from scratch; those that others wait for come first.

    Args:
        methods: class or file names; None for all.
        budgets: kind ("channels", "weights", "ranks") -> what may be kept.
        seeds: each is a dense network of its own.
        scratch: the methods whose plans are also trained from new weights.

    Raises:
        ValueError: for an unknown method, one that is a control itself, or a method without a budget for its kind.
    """
    every = discover()
    if methods is None:
        chosen = [name for name, cls in every.items() if cls.kind != "control" and budgets.get(cls.kind)]
    else:
        chosen = [find(name).__name__ for name in methods]
    for name in chosen:
        if every[name].kind == "control":
            raise ValueError(f"{name} is a control of other methods; name those, and see --scratch")
        if not budgets.get(every[name].kind):
            raise ValueError(f"{name} removes {every[name].kind}, for which no budget was given")
    named = (
        {"all": chosen, "none": []}.get(scratch) if isinstance(scratch, str) else [find(n).__name__ for n in scratch]
    )
    assert named is not None
    if strangers := [name for name in named if name not in chosen]:
        raise ValueError(f"--scratch names {strangers[0]}, which is not compared; there are {', '.join(chosen)}")
    if scratch == "all":  # chance has no plan worth a second look, unless asked
        named = [name for name in named if name not in RANDOM.values()]
    randoms = [RANDOM[kind] for kind in RANDOM if any(every[name].kind == kind for name in chosen)]
    chosen = list(dict.fromkeys([*randoms, *chosen]))
    runs = [Run("dense", "dense", 1.0, "flops", seed) for seed in seeds]
    pairs = [(name, b) for name in chosen for b in _resolved(budgets[every[name].kind], every[name].default_of)]
    runs += [Run(name, "finetuned", b.keep, str(b.of), seed) for name, b in pairs for seed in seeds]
    variants: tuple[Variant, ...] = ("scratch_e", "scratch_b")
    return runs + [
        Run(name, variant, b.keep, str(b.of), seed)
        for name, b in pairs
        if name in named
        for variant in variants
        for seed in seeds
    ]


def _resolved(budgets: Sequence[Budget | float], of: Any) -> list[Budget]:
    return [Budget.of_any(budget).resolved(of) for budget in budgets]
