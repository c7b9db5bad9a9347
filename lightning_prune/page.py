"""One page of HTML that needs nothing else: what was pruned, what it saved, how to do it again.

The page holds no script and asks for no file, no font and no address, which its content security policy holds it to.
Whatever text it is made of is escaped. It follows the reader's light or dark setting and any width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lightning_prune.svg import SERIES, SHAPES, Line, Point, bar, curve_chart, histogram_chart, key, scatter_chart

Data = Mapping[str, Any]
CURVES = (("prune/flops_kept", "flops"), ("prune/params_kept", "parameters"), ("prune/density", "density"))
MOST_EVENTS = 60  # rows of a table of events; a fine schedule has thousands
MOST_HISTOGRAMS = 60


def page(report: Data) -> str:
    """Lay a report out.

    Args:
        report: what ``report.json`` holds, see docs/report.md; a section whose part is missing or empty is left out.

    Returns:
        A whole HTML document, in which all text of the report is escaped.
    """
    sections = [(title, body) for title, make in _SECTIONS if (body := make(report))]
    links = "".join(f'<a href="#s{number}">{escape(title)}</a>' for number, (title, _) in enumerate(sections))
    bodies = "".join(
        f'<section id="s{number}"><h2>{escape(title)}</h2>{body}</section>'
        for number, (title, body) in enumerate(sections)
    )
    title = escape(str(report.get("title", "Pruning report")))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><header><h1>{title}</h1><nav>{links}</nav></header>"
        f"<main>{bodies}</main></body></html>\n"
    )


def table(rows: Sequence[Data], columns: Sequence[str] | None = None) -> str:
    """Rows as an HTML table that scrolls within itself; numbers to the right, the first column stays in sight.

    Args:
        rows: one mapping a line; a missing value, or None, is an empty cell.
        columns: which keys, in order; all of them in order of first appearance if None.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row)) if columns is None else columns
    columns = [name for name in columns if any(row.get(name) not in (None, "") for row in rows)]
    looks = {name: _look([row.get(name) for row in rows]) for name in columns}
    head = "".join(f'<th scope="col" class="{looks[name]}">{escape(name)}</th>' for name in columns)
    body = "".join(
        "<tr>" + "".join(_cell(row.get(name), looks[name], first=not i) for i, name in enumerate(columns)) + "</tr>"
        for row in rows
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _summary(report: Data) -> str:
    """A few large numbers for each pruned network."""
    parts = []
    for network in report.get("networks", ()):
        if network["dense"] is None or network.get("engine"):
            continue
        tiles = [
            (_share(network["flops_kept"]), "of the flops kept"),
            (_share(network["params_kept"]), "of the params"),
        ]
        if network["params"] and network["nonzero"] < network["params"]:
            tiles.append((_share(network["nonzero"] / network["params"]), "of these are not zero"))
        tiles += [
            (faster, f"as fast, batch of {batch}")
            for batch, times in network["latency_ms"].items()
            if (faster := _faster(times)) is not None
        ]
        tiles += [(f"{value:.4g}", name) for name, value in network["tested"].items() if value is not None]
        boxes = "".join(
            f"<div class='tile'><b>{escape(big)}</b><span>{escape(small)}</span></div>" for big, small in tiles
        )
        parts.append(f"<h3>{escape(network['name'])}</h3><div class='tiles'>{boxes}</div>")
    return "".join(parts)


def _costs(report: Data) -> str:
    networks = report.get("networks", ())
    rows: list[dict[str, Any]] = []
    for network in networks:
        row = {"network": network["name"], "flops": network["flops"], "flops kept": network["flops_kept"]}
        if any(other["flops_sparse"] not in (None, other["flops"]) for other in networks):
            row["flops if zeros were free"] = network["flops_sparse"]
        row |= {"params": network["params"], "params kept": network["params_kept"]}
        if any(other["nonzero"] != other["params"] for other in networks):
            row["not zero"] = network["nonzero"]
        row["bytes"] = network["bytes"]
        for batch, times in network["latency_ms"].items():
            row[f"ms, batch of {batch}"] = f"{times['median']:.3f} ({times['p10']:.3f} to {times['p90']:.3f})"
            row[f"as fast, {batch}"] = _faster(times)
        rows.append({**row, **network["tested"]})
    if not rows:
        return ""
    return table(rows) + f"<p class='note'>{escape(' '.join([_COSTS, *report.get('notes', ())]))}</p>"


def _faster(times: Data) -> str | None:
    """How many times as fast as the dense network; nothing where the machine was too busy to tell."""
    return None if times["speed_up"] is None or times["noisy"] else f"{times['speed_up']:.2f}x"


def _architecture(report: Data) -> str:
    parts = []
    for one in report.get("architectures", ()):
        kept, dense = (sum(row[which] for row in one["rows"]) for which in ("kept", "dense"))
        # layers of weights differ by orders of magnitude: there each bar is the layer's own
        longest = None if one["of"] == "weights" else max(row["dense"] for row in one["rows"])
        bars = "".join(_bar_row(row, longest) for row in one["rows"])
        parts.append(
            f"<h3>{escape(one['network'])}</h3><p>{kept:,} of {dense:,} {escape(one['of'])} kept "
            f"({kept / max(1, dense):.1%}), by {escape(one['by'])}, in data-flow order. "
            f"{_swatch('kept', 'kept')} {_swatch('dense', 'dense')}</p><div class='bars'>{bars}</div>"
        )
    return "".join(parts)


def _bar_row(row: Data, longest: float | None) -> str:
    kept, dense = row["kept"], row["dense"]
    picture = bar(kept, dense, dense if longest is None else longest)
    return (
        f"<div class='name'>{escape(row['name'])}</div>{picture}<div class='count'>{kept:,} / {dense:,}"
        f"<i>{kept / max(1, dense):.0%}</i></div>"
    )


def _history(report: Data) -> str:
    parts = []
    for one in report.get("prunings", ()):
        rows = one["rows"]
        lines, end = [], max(0, one["steps"], *(row["step"] for row in rows))
        for name, title in CURVES:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                lines.append(Line(title, [(0.0, 1.0), *points, (end, points[-1][1])]))
        parts.append(f"<h3>{escape(one['method'])} <small>{escape(one['network'])}</small></h3>")
        parts.append(
            f"<p>{one['done']} of {one['planned']} events in {one['steps']:,} optimizer steps; scoring and cutting "
            f"took {one['seconds'] or 0:.2f} s.</p>"
        )
        if lines:
            legend = "".join(
                f"<span><svg class='stroke' viewBox='0 0 30 10' aria-hidden='true'><path "
                f"class='curve s{n} dash{n % 3}' d='M0 5 L30 5'/></svg>"
                f"{escape(line.name)}: {line.points[-1][1]:.4f}</span>"
                for n, line in enumerate(lines)
            )
            what = f"what {one['method']} kept while training"
            chart = curve_chart(lines, [row["step"] for row in rows], what)
            parts.append(f"<figure class='wide'>{chart}<figcaption class='legend'>{legend}</figcaption></figure>")
            parts.append(_events(rows))
    return "".join(parts)


def _events(rows: Sequence[Data]) -> str:
    every = max(1, -(-len(rows) // MOST_EVENTS))
    shown = [row for n, row in enumerate(rows, 1) if n % every == 0 or n in (1, len(rows))]
    names = {"step": "step", "prune/flops": "flops", "prune/flops_kept": "flops kept", "prune/params": "params",
             "prune/params_kept": "params kept", "prune/density": "density",
             "prune/seconds": "seconds so far"}  # fmt: skip
    lines = [{title: _whole(row.get(name)) for name, title in names.items()} for row in shown]
    count = (
        f"{len(rows)} event{'s' * (len(rows) != 1)}"
        if every == 1
        else f"{len(shown)} of {len(rows)} events; all are in report.json"
    )
    return f"<details><summary>{count}</summary>{table(lines)}</details>"


def _scores(report: Data) -> str:
    parts = []
    for one in report.get("prunings", ()):
        if not one["scores"]:
            continue
        shown = list(one["scores"].items())[:MOST_HISTOGRAMS]
        more = len(one["scores"]) - len(shown)
        parts.append(
            f"<h3>{escape(one['method'])} <small>{escape(one['network'])}</small></h3><p>Of the last event; "
            f"larger = keep. {_swatch('kept', 'stays')} {_swatch('gone', 'goes')}</p><div class='grid'>"
        )
        parts += [
            f"<figure>{histogram_chart(dict(found), name)}<figcaption>{escape(name)}</figcaption></figure>"
            for name, found in shown
        ]
        parts.append("</div>" + (f"<p class='note'>{more} more are in report.json</p>" if more else ""))
    if report.get("prunings") and not parts:
        return "<p>The checkpoint holds none; with a TensorBoard logger they are there as prune/score.</p>"
    return "".join(parts)


def _frozen(report: Data) -> str:
    parts = []
    for one in report.get("explanations", ()):
        lead = f"{one['prunable_share']:.1%} of {one['params']:,} parameters can go in part, in {one['groups']} groups."
        parts.append(f"<h3>{escape(one['model'])}</h3><p>{lead}</p>")
        rows = [
            {
                "frozen": ", ".join(entry["names"]),
                "why": entry["reason"],
                "where": entry["line"],
                "to free": entry["remedy"],
                "params": entry["params"],
            }
            for entry in one["freezes"]
        ]
        rows += [
            {
                "frozen": f"{entry['name']}: {entry['count']} of {entry['channels']} channels",
                "why": entry["reason"],
                "to free": entry["remedy"],
            }
            for entry in one["partly"]
        ]
        parts.append(table(rows) if rows else "<p>Nothing is frozen.</p>")
    return "".join(parts)


def _comparison(report: Data) -> str:
    compared = report.get("compare")
    if not compared:
        return ""
    methods = list(dict.fromkeys(p["method"] for panel in compared["panels"] for p in panel["points"]))
    number = {name: n % (SERIES * SHAPES) for n, name in enumerate(methods)}
    charts = []
    for panel in compared["panels"]:
        points = [
            Point(p["cost"], p["accuracy"], number[p["method"]], p["name"], p["spread"] or 0.0, p["on_front"])
            for p in panel["points"]
        ]
        front = ", ".join(
            f"{point.name} ({point.y:.2f})" for point in sorted(points, key=lambda p: p.x) if point.on_front
        )
        chart = scatter_chart(points, panel["cost"], "accuracy, %", panel["dense"])
        charts.append(f"<figure class='half'>{chart}<figcaption>front: {escape(front)}</figcaption></figure>")
    legend = "".join(f"<span>{key(number[name])}{escape(name)}</span>" for name in methods)
    parts = [
        f"<p>{escape(compared['lead'])}</p><p class='legend'>{legend}</p><div class='halves'>{''.join(charts)}</div>",
        table(compared["rows"]),
    ]
    if compared["verdicts"]:
        parts.append(f"<h3>Are the weights worth more than the architecture?</h3>{table(compared['verdicts'])}")
    if compared["failed"]:
        parts.append(f"<h3>Failed</h3>{table(compared['failed'])}")
    return "".join(parts)


def _again(report: Data) -> str:
    parts = []
    for one in report.get("prunings", ()):
        given = ",\n".join(f"    {name}={value}" for name, value in one["arguments"].items())
        call = f"seed_everything({one['seed']})\n{one['method']}(\n{given},\n)" if given else one["method"]
        source = f" <small>{escape(one['paper'])}</small>" if one["paper"] else ""
        parts.append(f"<h3>{escape(one['method'])} in {escape(one['network'])}{source}</h3>{_code(call)}")
    files = [
        {"checkpoint": one["name"], "epoch": one["epoch"], "step": one["step"], "Lightning": one["lightning"],
         "SHA-256": one["sha256"]}
        for one in report.get("checkpoints", ())
    ]  # fmt: skip
    parts.append(table(files) if files else "")
    if report.get("command"):
        parts.append(f"<p>This page:</p>{_code(report['command'])}")
    versions = [{"": name, "version": value} for name, value in report.get("versions", {}).items()]
    return "".join(parts) + (table(versions) if versions else "")


_SECTIONS: tuple[tuple[str, Callable[[Data], str]], ...] = (
    ("Summary", _summary),
    ("Cost and accuracy", _costs),
    ("Architecture", _architecture),
    ("Events", _history),
    ("Scores", _scores),
    ("What is frozen, and why", _frozen),
    ("Comparison", _comparison),
    ("How to do it again", _again),
)

_COSTS = "flops are multiply-accumulates of one sample in eval mode, as executed. Bytes are of the saved state dict."


def _swatch(look: str, word: str) -> str:
    return f"<span class='swatch'><i class='{look}'></i>{word}</span>"


def _code(text: str) -> str:
    return f"<pre tabindex='0'>{escape(text)}</pre>"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) > 1 else value


def _look(values: Sequence[object]) -> str:
    """Class of a column: numbers, words that stay on one line, or text that needs room."""
    if all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values):
        return "n"
    longest = max(len(str(value)) for value in values)
    return "short" if longest <= 26 else "wordy"


def _cell(value: object, look: str, first: bool) -> str:
    match value:
        case None:
            text = ""
        case bool():
            text = "yes" if value else "no"
        case int():
            text = f"{value:,}"
        case float():
            text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        case _:
            text = str(value)
    tag = 'th scope="row"' if first else "td"
    return f'<{tag} class="{look}">{escape(text)}</{tag.split()[0]}>'


def rows_of(groups: Iterable[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """Rows of an architecture: name, kept and dense of each group or layer."""
    return [{"name": name, "kept": kept, "dense": dense} for name, kept, dense in groups]


_STYLE = (
    """
:root{--ground:#fff;--raised:#f4f6f8;--ink:#1c2530;--quiet:#56626f;--rule:#d5dbe1;--pale:#c9d5df;--kept:#0072b2;
--gone:#d55e00;--link:#005a8e;--series-0:#0072b2;--series-1:#d55e00;--series-2:#00795a;--series-3:#b0508a;
--series-4:#a86f00;--series-5:#2b8cc4}
@media (prefers-color-scheme:dark){:root{--ground:#12171d;--raised:#1b222a;--ink:#e6ebf0;--quiet:#a3afbb;--rule:#35404b;
--pale:#3d4a57;--kept:#56b4e9;--gone:#f08a3c;--link:#7cc4f0;--series-0:#56b4e9;--series-1:#f08a3c;--series-2:#3ccba0;
--series-3:#e08cc0;--series-4:#e6b040;--series-5:#a9b6ff}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
header,main{max-width:1160px;margin:0 auto;padding:0 20px}
h1{font-size:1.7rem;line-height:1.25;margin:28px 0 8px;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:44px 0 8px;padding-top:10px;border-top:1px solid var(--rule)}
h3{font-size:1.05rem;margin:22px 0 6px;overflow-wrap:anywhere}
small,.note,figcaption{color:var(--quiet);font-size:.86rem;font-weight:400}
p{margin:6px 0 10px;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 18px}
a{color:var(--link)}
.tiles{display:flex;flex-wrap:wrap;gap:10px}
.tile{background:var(--raised);border-radius:8px;padding:10px 16px;min-width:120px;max-width:100%}
.tile b{display:block;font-size:1.5rem;line-height:1.3}
.tile span{color:var(--quiet);font-size:.86rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto;max-width:100%;margin:10px 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px 5px 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top;max-width:360px;
overflow-wrap:anywhere}
td{min-width:64px}td.wordy{min-width:230px}td.short{white-space:nowrap}
thead th{color:var(--quiet);font-weight:600;vertical-align:bottom;overflow-wrap:normal}
tbody th{font-weight:600;position:sticky;left:0;background:var(--ground);min-width:165px;max-width:min(360px,44vw)}
.n{text-align:right;overflow-wrap:normal;white-space:nowrap}
thead .n{white-space:normal}
.bars{display:grid;grid-template-columns:minmax(90px,max-content) minmax(80px,1fr) max-content;gap:3px 12px;
align-items:center;font-size:.88rem}
.name{overflow-wrap:anywhere;max-width:320px}
.count{font-variant-numeric:tabular-nums;text-align:right;white-space:nowrap}
.count i{display:inline-block;min-width:3.2em;color:var(--quiet);font-style:normal}
.bar{width:100%;height:14px;display:block}
.swatch{white-space:nowrap;margin-left:8px}.swatch i{display:inline-block;width:14px;height:12px;margin-right:5px}
i.kept{background:var(--kept)}i.dense{background:var(--pale)}i.gone{background:var(--gone)}
rect.dense{fill:var(--pale)}rect.kept{fill:var(--kept)}rect.gone{fill:var(--gone)}
figure{margin:0}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(240px,100%),1fr));gap:18px}
.halves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(460px,100%),1fr));gap:22px}
.wide{max-width:720px}
figcaption{overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:.88rem}
.legend span{display:inline-flex;align-items:center;gap:6px;overflow-wrap:anywhere}
.key{width:14px;height:14px;flex:none}.stroke{width:30px;height:10px;flex:none}
.chart{width:100%;height:auto;display:block}
.chart text{fill:var(--ink);font:14px system-ui,sans-serif}
.axis{stroke:var(--quiet)}.grid line.grid,.chart .grid{stroke:var(--rule)}
.event{stroke:var(--quiet);stroke-dasharray:2 4}.spread{stroke:var(--quiet);stroke-width:1.5}
.front{fill:none;stroke:var(--ink);stroke-width:1.5;stroke-dasharray:6 4}
.curve{fill:none;stroke-width:2.5}.dash1{stroke-dasharray:8 4}.dash2{stroke-dasharray:2 4}
"""
    + "".join(f".mark.s{n}{{fill:var(--series-{n})}}.curve.s{n}{{stroke:var(--series-{n})}}" for n in range(SERIES))
    + """
pre{background:var(--raised);padding:12px 14px;border-radius:8px;overflow-x:auto;font-size:.86rem;margin:8px 0;
white-space:pre-wrap;overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--link)}
@media (max-width:520px){header,main{padding:0 12px}.bars{grid-template-columns:minmax(0,1fr) max-content;gap:0 8px}
.bars .bar{grid-column:1/-1;margin-bottom:7px}.bars .name{max-width:none}.bars .count{grid-column:2;grid-row:auto}
.bars{grid-auto-flow:dense}.tile{flex:1 1 120px}.wide .chart text,.half .chart text{font-size:18px}}
@media print{.scroll{overflow:visible}nav{display:none}}
"""
)
