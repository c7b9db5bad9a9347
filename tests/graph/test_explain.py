"""What `explain` says, and that every reason the package can give has a remedy."""

import ast
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_prune
from lightning_prune.graph.explain import REMEDIES, compact, explain, listed, remedy
from lightning_prune.graph.groups import trace

PACKAGE = Path(lightning_prune.__file__).parent


class Residual(nn.Module):
    """A stream of 6 channels, two branches of 4 and 5 that read it and add to it, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 6)) for n in (4, 5))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


class Padded(nn.Module):
    """Six channels, to the middle four of which those of another layer are added."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.head = nn.Linear(3, 6), nn.Linear(3, 4), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.wide(x) + F.pad(self.narrow(x), (1, 1)))


class Sliced(nn.Module):
    """Two layers frozen at one line, one at another, and one that nothing reaches."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(3, 6)
        self.out, self.spare = nn.Linear(6, 2), nn.Linear(3, 3)

    def forward(self, x):
        y = sum(layer(x)[:, 2:5] for layer in (self.a, self.b))
        return self.out(torch.cat([y, self.c(x)[:, :3]], 1))


def described(value):
    """A reason as it stands in the source; what is filled in is a plain number, as a name would match anything."""
    if isinstance(value, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "7" for part in value.values]
        return "".join(parts)
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def either(value):
    """Both sides of a condition."""
    return [*either(value.body), *either(value.orelse)] if isinstance(value, ast.IfExp) else [value]


def reasons_in(source):
    """Reasons that a file can give: texts handed to freeze, and texts that end up in a dict of reasons."""
    tree = ast.parse(source)
    texts = {}  # name -> texts it is given, for reasons that are named first
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            texts.setdefault(node.targets[0].id, []).append(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            values = node.args[1:2] if node.func.attr in ("freeze", "_freeze", "setdefault") else []
            values = [*values, *(keyword.value for keyword in node.keywords if keyword.arg == "why")]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            values = [node.value]  # broken[g] = f"..."
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            values = node.value.elts if isinstance(node.value, ast.Tuple) else []  # seen, reason = None, f"..."
        else:
            continue
        for value in itertools.chain.from_iterable(map(either, values)):
            of_name = texts.get(value.id, []) if isinstance(value, ast.Name) else [value]
            yield from filter(None, map(described, of_name))


def reasons():
    found = []
    files = {*(PACKAGE / "graph").glob("*.py"), PACKAGE / "surgery.py"} - {PACKAGE / "graph" / "explain.py"}
    for path in sorted(files):
        found += [(path.name, text) for text in reasons_in(path.read_text("utf-8")) if " " in text]
    return found


REASONS = sorted(set(reasons()))


def test_the_scan_finds_reasons_of_every_shape():
    planted = (
        't.freeze(dims, "it is odd" if n % 2 else "it is nought")\n'
        't.freeze(dims, why="it is named")\n'
        "t._freeze(ids, f\"'{name}' is odd\")\n"
        'why = "it is even"\nt.freeze(dims, why)\n'
        'broken[g] = f"{form} is broken"\n'
        'reasons.setdefault(c, f"it missed {name}")\n'
        'seen, reason = None, f"it failed: {error}"\n'
    )
    assert sorted(reasons_in(planted)) == [
        "'7' is odd", "7 is broken", "it failed: 7", "it is even", "it is named", "it is nought",
        "it is odd", "it missed 7",
    ]  # fmt: skip
    assert len(REASONS) > 35


@pytest.mark.parametrize(("file", "reason"), REASONS)
def test_every_reason_has_a_remedy(file, reason):
    assert remedy(reason), f"a reason in {file} has no row in graph.explain.REMEDIES"
    assert "{" not in remedy(reason)


def test_every_remedy_is_for_a_reason_that_can_be_given():
    texts = [text for _, text in REASONS]
    matching = [next(i for i, (pattern, _) in enumerate(REMEDIES) if re.search(pattern, text)) for text in texts]
    assert sorted(set(matching)) == list(range(len(REMEDIES)))


def test_remedy_names_the_operator_and_an_unknown_reason_has_none():
    assert remedy("operator 'histc' has no rule (in head, net.py:4)").startswith("give operator 'histc' a rule")
    assert remedy("because") == ""


def test_a_group_is_worth_what_its_cut_saves():
    graph = trace(Residual(), torch.zeros(1, 3))
    said = explain(graph)
    assert (said.flops, said.params) == (graph.cost().flops, graph.cost().params)
    stream, four, five = said.groups
    # a channel of the stream: 3 columns in the stem, 4 + 4 and 5 + 5 in the branches, 2 in the head; 3 biases make it
    assert (stream.each.flops, stream.each.params) == (23, 26)
    assert (stream.whole.flops, stream.whole.params) == (5 * 23, 5 * 26)
    assert (four.each.flops, four.each.params) == (12, 13)
    assert (five.whole.flops, five.whole.params) == (4 * 12, 4 * 13)


def test_worth_of_a_whole_group_is_less_than_its_channels_where_one_layer_has_it_twice():
    square = nn.Parameter(torch.randn(4, 4))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.square, self.head = nn.Linear(3, 4), square, nn.Linear(4, 2)

        def forward(self, x):
            y = self.first(x)
            return self.head(y + y @ self.square)

    graph = trace(Twice(), torch.zeros(1, 3))
    (worth,) = explain(graph).groups
    # the square has 16 entries: 9 without one channel, 1 with one channel; 3 + 1 + 2 more for each channel
    assert worth.each.params == 16 - 9 + 6
    assert worth.whole.params == 16 - 1 + 3 * 6
    keep = {worth.group.name: torch.arange(4) == 0}
    assert graph.cost().params - graph.cost(graph.plan(keep)).params == worth.whole.params


def test_links_lead_from_what_a_layer_reads_to_what_it_makes():
    said = explain(trace(Residual(), torch.zeros(1, 3)))
    assert [worth.group.name for worth in said.groups] == ["stem", "branches.0.0", "branches.1.0"]
    assert said.links == ((0, 1), (0, 2), (1, 0), (2, 0))
    assert [frozen.reads for frozen in said.frozen] == [(0,)]


def test_what_is_frozen_is_gathered_by_reason_and_line():
    said = explain(trace(Sliced(), torch.zeros(2, 3)))
    by_names = {frozen.names: frozen for frozen in said.frozen}
    assert set(by_names) == {("a", "b"), ("c",), ("out",), ("spare.weight", "spare.bias")}
    both, spare = by_names["a", "b"], by_names["spare.weight", "spare.bias"]
    assert both.reason == "it is sliced at a number in the model's code"
    assert re.fullmatch(r"test_explain\.py:\d+", both.line)
    assert both.line != by_names["c",].line
    assert both.params == 2 * (18 + 6)
    assert both.remedy.startswith("split by equal parts")
    assert (spare.reason, spare.line, spare.params) == ("the example input did not reach it", "", 12)


def test_a_layer_frozen_in_part_is_told_with_how_many_channels_and_why():
    graph = trace(Padded(), torch.zeros(2, 3))
    said = explain(graph)
    (layer,) = said.partly
    assert (layer.name, layer.count, layer.channels) == ("wide", 2, 6)
    assert layer.reason.startswith("'add' pairs it with channels that no parameter makes")
    assert layer.remedy.startswith("use a layer that makes these channels")
    lines = str(said).splitlines()
    assert lines[-3] == "prunable in part:"
    assert lines[-2] == f"  wide: 2 of 6 frozen: {layer.reason}"
    assert said.to_dict()["partly"][0]["count"] == 2
    assert "wide" not in graph.frozen
    left = explain(graph.after(graph.plan({"wide": torch.tensor([True, False, True, False])}))).partly[0]
    assert (left.count, left.channels) == (2, 4)


def test_text_has_a_line_or_two_for_each_group_and_reason():
    lines = str(explain(trace(Residual(), torch.zeros(1, 3)))).splitlines()
    # 3 * 6 + 2 * (24 + 30) + 6 * 2 = 138 flops, 24 + 58 + 71 + 14 = 167 parameters; cut to one 115 and 130
    assert (
        lines[1] == "  stem: 6 channels, each 23 flops and 26 parameters; cut to one: -83.3% flops, -77.8% parameters"
    )
    assert lines[2] == (
        "      stem.weight[0], stem.bias[0], branches.{0-1}.0.weight[1], branches.{0-1}.2.weight[0], "
        "branches.{0-1}.2.bias[0], head.weight[1]"
    )
    assert lines[-3] == "frozen:"
    assert lines[-2] == "  head: it is an output of the model"
    assert lines[-1].startswith("      to free: ")
    assert len(lines) == 1 + 2 * 3 + 1 + 2


def test_text_says_how_many_are_frozen_and_where():
    text = str(explain(trace(Sliced(), torch.zeros(2, 3))))
    assert re.search(
        r"^  a, b \(2\): it is sliced at a number in the model's code \(in the model, test_e\S+\)$", text, re.M
    )


def test_text_is_the_same_each_time_and_short_for_many_groups():
    deep = nn.Sequential(*(nn.Linear(4, 4) for _ in range(120)))
    texts = [str(explain(trace(deep, torch.zeros(1, 4)))) for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 1 + 2 * 119 + 1 + 2
    assert max(map(len, texts[0].splitlines())) < 200


def test_a_failed_trial_and_an_inexact_group_are_told():
    graph = trace(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 5), nn.Linear(5, 2)), torch.zeros(1, 3))
    said = explain(graph.without({"2": "a trial cut failed: shape '[1, 5]' is invalid"}))
    assert [(w.group.name, w.group.exact) for w in said.groups] == [("0", False)]
    assert "; inexact: a norm runs across it (in 1)" in str(said)
    (failed,) = (frozen for frozen in said.frozen if "2" in frozen.names)
    assert failed.reason == "a trial cut failed: shape '[1, 5]' is invalid"
    assert failed.remedy.startswith("read the error")
    assert failed.reads == (0,)


def test_dict_is_what_json_says_back():
    said = explain(trace(Residual(), torch.zeros(1, 3))).to_dict()
    assert json.loads(json.dumps(said)) == said
    assert said["groups"][1]["each"] == {"flops": 12, "params": 13}
    assert said["groups"][1]["all_but_one"] == {"flops": 36, "params": 39}
    assert said["links"][0] == ["stem", "branches.0.0"]
    assert said["freezes"][0]["names"] == ["head"]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a.0", "a.1", "a.2", "a.7"], ["a.{0-2,7}"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], ["a.{0-1}.b.{0-1}"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], ["a.0.b.{0-1}", "a.1.b.0"]),  # joined any further, it would say a.1.b.1
        (["a.0.x", "a.1.y"], ["a.0.x", "a.1.y"]),
        (["a[0]", "a[1]", "b1[0]", "b2[0]", "b2[1]"], ["a[0]", "a[1]", "b{1-2}[0]", "b2[1]"]),
        (["a.9", "a.10"], ["a.{9-10}"]),
        (["a.0", "a.0"], ["a.0"]),
        ([], []),
    ],
)
def test_compact_joins_names_that_differ_in_one_number(names, short):
    assert compact(names) == short


def test_listed_says_how_many_names_did_not_fit():
    assert listed(["one", "two", "three"], width=8) == "one, two, and 1 more"
    assert listed(["a-long-name", "b"], width=4) == "a-long-name, and 1 more"
    assert listed(["a", "b"]) == "a, b"
