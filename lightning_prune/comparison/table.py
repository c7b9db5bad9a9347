"""Rows -> means and spreads, verdicts, and the page that says them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from lightning_prune.report import markdown_table

Row = Mapping[str, Any]
COLUMNS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("method", "variant", "kind"), str),
    "keep": float,
    "of": str,
    "seed": int,
    "start": str,
    **dict.fromkeys(("epochs", "epochs_total"), int),
    "metric": str,
    **dict.fromkeys(("accuracy", "best_accuracy"), float),
    "best_epoch": int,
    "params": int,
    "params_kept": float,
    **dict.fromkeys(("nnz", "flops"), int),
    **dict.fromkeys(("flops_kept", "flops_sparse"), float),
    **dict.fromkeys(("bytes", "act_peak"), int),
    **dict.fromkeys(("latency_ms", "latency_p10_ms", "latency_p90_ms", "latency_kept"), float),
    "device": str,
    **dict.fromkeys(("train_flops", "train_flops_sparse"), float),
    "prune_flops": int,
    "score_seconds": float,
    "score_peak_bytes": int,
    "seconds": float,
    **dict.fromkeys(("versions", "notes", "error"), str),
}
"""Columns of rows.csv, and how each is read."""

MEANS = ("best_accuracy", "params", "nnz", "flops", "flops_kept", "flops_sparse", "bytes", "act_peak", "latency_ms",
         "latency_kept", "train_flops", "train_flops_sparse", "prune_flops", "score_seconds",
         "score_peak_bytes")  # fmt: skip
_NAMES = {"scratch_e": "Scratch-E of ", "scratch_b": "Scratch-B of "}


def label(row: Row) -> str:
    """What a table calls a row's method."""
    return f"{_NAMES.get(row['variant'], '')}{row['method']}"


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation, n - 1 below; None of fewer than two."""
    return stdev(values) if len(values) > 1 else None


def summarised(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line for each method, variant and budget, over seeds; deltas are to the dense row of the same seed.

    Args:
        rows: of a comparison; those with an error are left out, and counted.
    """
    dense = {row["seed"]: row["accuracy"] for row in rows if row["variant"] == "dense" and not row["error"]}
    out = []
    for key, every in _grouped(rows).items():
        good = [row for row in every if not row["error"]]
        line = {**dict(zip(("method", "variant", "keep", "of"), key, strict=True)), "kind": every[0]["kind"],
                "runs": len(good), "failed": len(every) - len(good)}  # fmt: skip
        if good:
            accuracies = [row["accuracy"] for row in good]
            deltas = [row["accuracy"] - dense[row["seed"]] for row in good if row["seed"] in dense]
            line |= {"accuracy": mean(accuracies), "accuracy_std": spread(accuracies)}
            line |= {"delta": mean(deltas) if deltas else None, "delta_std": spread(deltas)}
            line["epochs"] = sorted({row["epochs"] for row in good})
            line |= {name: _mean(row.get(name) for row in good) for name in MEANS}
            for name in ("latency_ms", "latency_kept", "bytes", "flops", "nnz"):
                line[f"{name}_std"] = spread([row[name] for row in good if row.get(name) is not None])
        out.append(line)
    return out


def verdicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Whether the weights that a method kept are worth more than its architecture, by Liu et al.

    They matter only if the fine-tuned network exceeds Scratch-B by more than the combined standard deviation,
    ``sqrt(s1^2 + s2^2)``, over seeds that both have. One seed has none, and no verdict.
    """
    groups, out = _grouped([row for row in rows if not row["error"]]), []
    for (method, variant, keep, of), scratch in groups.items():
        if variant != "scratch_b":
            continue
        tuned = {row["seed"]: row["accuracy"] for row in groups.get((method, "finetuned", keep, of), [])}
        short = [row["accuracy"] for row in groups.get((method, "scratch_e", keep, of), [])]
        both = [(tuned[row["seed"]], row["accuracy"]) for row in scratch if row["seed"] in tuned]
        if not both:
            continue
        first, second = ([pair[i] for pair in both] for i in (0, 1))
        combined = math.hypot(stdev(first), stdev(second)) if len(both) > 1 else None
        gain = mean(first) - mean(second)
        said = "one seed, no verdict" if combined is None else "weights matter" if gain > combined else "no evidence"
        out.append(
            {"method": method, "keep": keep, "of": of, "runs": len(both), "finetuned": mean(first),
             "scratch_e": mean(short) if short else None, "scratch_b": mean(second), "gain": gain,
             "combined_std": combined, "verdict": said}
        )  # fmt: skip
    return out


def markdown(rows: Sequence[Row], summary: Sequence[Row], verdict: Sequence[Row], protocol: Row) -> str:
    """The page: protocol, results, verdicts, what failed, and how each figure was measured."""
    seeds = sorted({row["seed"] for row in rows})
    metrics = sorted({row["metric"] for row in rows if row.get("metric")})
    whole = protocol["epochs"] + protocol["finetune"]
    cap = "" if protocol["cap"] is None else f", at most {protocol['cap']:g} times the epochs"
    parts = [
        "# Comparison",
        f"Dense networks are trained for {protocol['epochs']} epochs, one for each seed ({_listed(seeds)}). Methods "
        f"start from them and have {protocol['finetune']} epochs; those that train sparse from the start have {whole} "
        f"from the same initial weights. The data come in the same order. Scratch-E trains a method's plan from new "
        f"weights for {whole} epochs, Scratch-B for the flops that the dense network would take for as many{cap}. "
        f"Accuracy is {_listed(metrics)} of the last epoch; means and sample standard deviations over seeds.",
        "## Results",
        markdown_table([_shown(line) for line in summary]),
        "## Are the weights worth more than the architecture?",
        "Only where fine-tuning exceeds Scratch-B by more than the combined standard deviation.",
        markdown_table([_percent(line) for line in verdict]) or "No plan was trained from scratch.",
        "## What it cost",
        markdown_table([_cost(line) for line in summary if line["runs"]]),
        _MEASURED,
    ]
    if bad := [row for row in rows if row["error"]]:
        parts += ["## Failed", markdown_table([{"run": label(row), "keep": row["keep"], "seed": row["seed"],
                                                "error": row["error"].replace("|", "/")} for row in bad])]  # fmt: skip
    if noted := {(label(row), note) for row in rows for note in (row.get("notes") or "").split(" | ") if note}:
        parts += ["## Warnings", "\n".join(f"- {name}: {note}" for name, note in sorted(noted))]
    parts += ["## Versions", "\n".join(f"- {text}" for text in sorted({row["versions"] for row in rows}))]
    return "\n\n".join(parts) + "\n"


_MEASURED = """\
`flops` are multiply-accumulates of one sample in eval mode, as executed: zeros under masks cost what they cost;
`if zeros were free` is a theory. Training flops are of the whole path (dense phase, pruning, fine-tuning), a step
counted as three forward passes at the cost the network has then; of a scratch row they are of its own fit, without what
finding the plan took. Flops of pruning are counted in its events, operator by operator, backward passes included; that
slows the events of a small network down, and so the seconds. Peak memory is what an event takes over what was there
before: the allocator's on CUDA, the resident set's on Linux. The best epoch is the best on validation after the last
event; it is for the curious, and no row is ranked by it. Latencies of runs that share a machine disturb each other; the
ratio is to the dense network, measured in turn."""


def _grouped(rows: Iterable[Row]) -> dict[tuple[str, str, float, str], list[Row]]:
    groups: dict[tuple[str, str, float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["variant"], row["keep"], row["of"]), []).append(row)
    return groups


def _mean(values: Iterable[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _plus(value: float | None, std: float | None, sign: str = "") -> str | None:
    if value is None:
        return None
    return f"{100 * value:{sign}.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def _shown(line: Row) -> dict[str, Any]:
    budget = "" if line["variant"] == "dense" else f"{line['keep']:g} of the {line['of']}"
    shown = {"method": label(line), "removes": line["kind"], "budget": budget, "runs": line["runs"]}
    if not line["runs"]:
        return shown
    return {
        **shown,
        "epochs": _listed(line["epochs"]),
        "accuracy %": _plus(line["accuracy"], line["accuracy_std"]),
        "to dense": _plus(line["delta"], line["delta_std"], "+"),
        "best epoch %": _plus(line["best_accuracy"], None),
        "flops kept": _rounded(line["flops_kept"], 4),
        "not zero": _whole(line["nnz"]),
        "bytes": _whole(line["bytes"]),
        "latency kept": _rounded(line["latency_kept"], 3),
    }


def _cost(line: Row) -> dict[str, Any]:
    return {
        "method": label(line),
        "budget": "" if line["variant"] == "dense" else f"{line['keep']:g} of the {line['of']}",
        "training, Gflops": line["train_flops"] / 1e9,
        "if zeros were free": line["train_flops_sparse"] / 1e9,
        "pruning, Gflops": line["prune_flops"] / 1e9,
        "events, s": _rounded(line["score_seconds"], 2),
        "peak, MB": None if line["score_peak_bytes"] is None else round(line["score_peak_bytes"] / 1e6, 1),
        "activations, bytes": _whole(line["act_peak"]),
    }


def _percent(line: Row) -> dict[str, Any]:
    shown = {"method": line["method"], "budget": f"{line['keep']:g} of the {line['of']}", "runs": line["runs"]}
    for name, title in (("finetuned", "fine-tuned %"), ("scratch_e", "Scratch-E %"), ("scratch_b", "Scratch-B %")):
        shown[title] = _plus(line[name], None)
    return {
        **shown,
        "gain": _plus(line["gain"], None, "+"),
        "combined std": _plus(line["combined_std"], None),
        "verdict": line["verdict"],
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
