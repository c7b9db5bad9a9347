import json
import re
import shutil

import pytest

from lightning_prune.page import _STYLE, MOST_EVENTS, page, table
from lightning_prune.svg import Line, Point, bar, curve_chart, histogram_chart, key, scatter_chart, shape

BAD = "<script>alert(1)</script>\"'&"


def network(name="pruned", dense="dense", **changed):
    return {
        "name": name, "dense": dense, "flops": 500, "params": 80, "nonzero": 80, "flops_kept": 0.5, "params_kept": 0.8,
        "flops_sparse": 500, "bytes": 1234567, "latency_ms": {"1": times(1.0, 2.0)}, "tested": {"acc": 0.75}, **changed,
    }  # fmt: skip


def times(median, speed_up):
    return {"median": median, "p10": 0.9 * median, "p90": 1.1 * median, "speed_up": speed_up, "noisy": False}


def pruning(method="L1Filter", rows=None, **changed):
    rows = [{"step": 4.0, "prune/flops_kept": 0.5, "prune/flops": 500.0}] if rows is None else rows
    scores = {"conv1": {"low": 0.0, "high": 2.0, "kept": [0, 3], "gone": [2, 1]}}
    return {
        "network": "pruned", "method": method, "paper": "Li et al., 2017", "arguments": {"budget": "Budget(keep=0.5)"},
        "seed": "7", "steps": 8, "done": 1, "planned": 1, "seconds": 0.25, "rows": rows, "scores": scores, **changed,
    }  # fmt: skip


def report(groups=2, name="conv{}", **changed):
    rows = [{"name": name.format(n), "kept": 3, "dense": 4} for n in range(groups)]
    points = [
        {"method": f"Method{n}", "name": f"Method{n} 0.5", "cost": 10.0 + n, "accuracy": 90.0 + n, "spread": 0.5,
         "on_front": n % 2 == 0}
        for n in range(24)
    ]  # fmt: skip
    frozen = {"names": ["head"], "reason": "the output", "line": "net.py:7", "remedy": "", "params": 10}
    return {
        "title": "A report",
        "command": "lightning-prune report",
        "versions": {"torch": "9.9"},
        "networks": [network("dense", None, flops=1000, flops_kept=1.0, params_kept=1.0), network()],
        "notes": ["Nothing was timed."],
        "architectures": [{"network": "pruned", "of": "channels", "by": "group", "rows": rows}],
        "prunings": [pruning()],
        "explanations": [
            {"model": "dense", "params": 100, "prunable_share": 0.5, "groups": 2, "freezes": [frozen], "partly": []}
        ],
        "checkpoints": [{"name": "a.ckpt", "epoch": 1, "step": 8, "lightning": "2", "sha256": "0" * 64}],
        "compare": {
            "folder": "out", "lead": "24 runs", "panels": [{"cost": "flops", "dense": 95.0, "points": points}],
            "rows": [{"run": "Method1", "accuracy, %": "91.00 ± 0.50"}], "verdicts": [], "failed": [],
        },
        **changed,
    }  # fmt: skip


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_page_has_a_section_for_each_part_and_none_for_what_is_missing():
    titles = re.findall(r"<h2>(.*?)</h2>", page(report()))
    assert titles == [
        "Summary", "Cost and accuracy", "Architecture", "Events", "Scores", "What is frozen, and why", "Comparison",
        "How to do it again",
    ]  # fmt: skip
    assert re.findall(r"<h2>(.*?)</h2>", page({"compare": report()["compare"]})) == ["Comparison"]


def test_numbers_of_a_network_are_on_the_page():
    text = text_of(page(report()))
    for said in ("50.0 % of the flops kept", "80.0 % of the params", "2.00x as fast, batch of 1", "0.75 acc",
                 "1.000 (0.900 to 1.100)", "1,234,567", "6 of 8 channels kept (75.0%)", "3 / 4 75%",
                 "1 of 1 events in 8 optimizer steps", "the output", "net.py:7", "seed_everything(7)",
                 "budget=Budget(keep=0.5)", "front: Method0 0.5 (90.00), Method2 0.5 (92.00)"):  # fmt: skip
        assert said in text


def test_zeros_under_masks_are_said_apart_from_parameters():
    text = text_of(page(report(networks=[network(nonzero=20, flops_sparse=125.0)])))
    assert "25.0 % of these are not zero" in text
    assert "flops if zeros were free" in text
    assert "not zero" not in text_of(page(report(networks=[network()]))).split("Cost and accuracy")[0]


def strings_replaced(value, by):
    match value:
        case dict():
            return {by + str(k) if k == "conv1" else k: strings_replaced(v, by) for k, v in value.items()}
        case list():
            return [strings_replaced(each, by) for each in value]
        case str():
            return by + value
    return value


def test_a_speed_up_of_a_busy_machine_is_not_put_forward():
    busy = {"1": {**times(1.0, 2.0), "noisy": True}}
    text = text_of(page(report(networks=[network(latency_ms=busy)])))
    assert "2.00x" not in text
    assert "1.000 (0.900 to 1.100)" in text


def test_no_text_from_outside_becomes_markup():
    html = page(strings_replaced(report(), BAD))
    assert html.count("&lt;script&gt;alert(1)") > 25
    assert re.findall(r"<script|</script|alert\(1\)[^&]*<", html.replace("&lt;", "")) == []
    # whatever quote an attribute has, the text within cannot end it
    assert re.findall(r"=\"[^\"]*&lt;script&gt;alert\(1\)&lt;/script&gt;(?!&quot;)", html) == []


def test_page_asks_for_nothing_and_runs_nothing():
    html = page(report())
    assert "default-src 'none'" in html
    assert re.findall(r"<(?:script|link|img|iframe|object|embed|base|form)\b[^>]*>", html) == [
        '<link rel="icon" href="data:,">'
    ]
    assert re.findall(r"(?:https?:)?//[a-z]|url\(|@import|\bon\w+=", html) == []
    assert set(re.findall(r'href="([^"]*)"', html)) - {"data:,"} == {f"#s{n}" for n in range(8)}


def test_a_thousand_events_are_shown_in_part_with_the_first_and_the_last():
    rows = [{"step": float(n), "prune/flops_kept": 1 - n / 2000} for n in range(1, 1001)]
    html = page({"prunings": [pruning(rows=rows, scores={})]})
    steps = [int(n.replace(",", "")) for n in re.findall(r'<tr><th scope="row" class="n">([\d,]+)</th>', html)]
    assert (steps[0], steps[-1]) == (1, 1000)
    assert MOST_EVENTS / 2 < len(steps) <= MOST_EVENTS + 2
    assert f"{len(steps)} of 1000 events; all are in report.json" in html


def test_page_says_where_scores_are_if_the_checkpoint_has_none():
    assert "with a TensorBoard logger they are there as prune/score" in page({"prunings": [pruning(scores={})]})


def test_table_drops_empty_columns_and_sets_numbers_to_the_right():
    html = table([{"name": "a", "n": 1234, "none": None, "x": 0.5}, {"name": "b", "n": 5, "none": ""}])
    assert re.findall(r'<th scope="col" class="(\w+)">(\w+)</th>', html) == [("short", "name"), ("n", "n"), ("n", "x")]
    assert '<td class="n">1,234</td>' in html
    assert '<td class="n"></td>' in html


def test_bar_is_as_long_as_its_share_of_the_longest():
    # 8 of 16 channels where the longest group has 64: 8 / 64 = 12.5 %, 16 / 64 = 25 %
    assert re.findall(r'class="(\w+)" width="([\d.]+)"', bar(8, 16, 64)) == [("dense", "25.00"), ("kept", "12.50")]
    assert re.findall(r'width="([\d.]+)"', bar(0, 0, 0)) == ["0.00", "0.00"]


def test_histogram_stacks_what_goes_on_what_stays():
    svg = histogram_chart({"low": -1.0, "high": 3.0, "kept": [1, 4], "gone": [3, 0]}, "conv")
    bars = [
        (kind, float(y), float(h))
        for kind, y, h in re.findall(r'rect class="(\w+)" .*? y="([\d.]+)" .*?height="([\d.]+)"', svg)
    ]
    # four units, the tallest bin, are 88 high, and the foot is at 100
    assert bars == [("kept", 78, 22), ("gone", 12, 66), ("kept", 12, 88), ("gone", 12, 0)]
    assert "5 kept, 3 gone, from -1 to 3" in svg


def test_curve_falls_in_steps():
    svg = curve_chart([Line("flops", [(0.0, 1.0), (50.0, 0.5), (100.0, 0.5)])], [50.0], "kept")
    (path,) = re.findall(r'class="curve s0 dash0" d="M([^"]*)"', svg)
    places = [tuple(map(float, point.split())) for point in path.split(" L")]
    # before the event's step the old value holds, so that the line goes level first and then down
    assert places[1] == (places[2][0], places[0][1])
    assert places[2][1] > places[1][1]
    assert svg.count('class="event"') == 1


def test_scatter_joins_the_front_alone_and_draws_the_spread():
    points = [Point(1, 80, 0, "a", 2.0, True), Point(2, 70, 1, "b"), Point(3, 90, 2, "c", 0.0, True)]
    svg = scatter_chart(points, "flops", "accuracy", 85.0)
    (front,) = re.findall(r'class="front" d="M([^"]*)"', svg)
    assert front.count("L") == 1
    assert svg.count('class="spread"') == 1
    assert re.findall(r"<title>(.*?)</title>", svg) == ["a: 80 at 1", "b: 70 at 2", "c: 90 at 3"]


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e30, 1e-30])
def test_scatter_of_equal_points_has_axes(value):
    assert scatter_chart([Point(value, value, 0, "a")], "x", "y").count("<circle") == 1


def test_twenty_four_series_differ_in_colour_or_shape():
    assert len({shape(n) for n in range(24)}) == 24
    assert shape(3) in key(3)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_stand_out_from_the_ground(scheme):
    # WCAG 2: contrast (L1 + 0.05) / (L2 + 0.05) of at least 4.5 for text, and 3 for what a picture needs to be read
    blocks = re.findall(r":root\{(.*?)\}", _STYLE.replace("\n", ""))
    colours = dict(re.findall(r"--([\w-]+):(#\w+)", blocks[scheme == "dark"]))
    colours = {n: c if len(c) == 7 else "#" + "".join(2 * d for d in c[1:]) for n, c in colours.items()}

    def contrast(one, other):
        dark, light = sorted(luminance(colours[name]) for name in (one, other))
        return (light + 0.05) / (dark + 0.05)

    assert min(contrast(text, ground) for text in ("ink", "quiet", "link") for ground in ("ground", "raised")) >= 4.5
    marks = ["kept", "gone", *(f"series-{n}" for n in range(6))]
    assert {mark: contrast(mark, "ground") for mark in marks if contrast(mark, "ground") < 3} == {}
    assert contrast("kept", "pale") >= 2  # a bar's two parts; their numbers stand beside it


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium with a new profile that logs what it asks for."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    profile = tmp_path_factory.mktemp("profile")
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run",
                 "disable-component-update", "disable-sync", "hide-scrollbars",
                 f"user-data-dir={profile}"):  # fmt: skip
        options.add_argument(f"--{word}")
    options.add_argument("about:blank")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as started:
        yield started


def shown(browser, path, html, width, scheme="light"):
    """Open a page, and forget what was logged before."""
    path.write_text(html, encoding="utf-8")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.as_uri())


WIDE = """
const out = [], edge = document.documentElement.clientWidth;
for (const each of document.querySelectorAll("body *")) {
  const box = each.getBoundingClientRect(), inner = each.closest(".scroll, pre");
  if (!inner && box.width && (box.right > edge + 1 || box.left < -1)) out.push(each.outerHTML.slice(0, 80));
  if (each.matches("svg.chart text")) {
    const frame = each.closest("svg").getBoundingClientRect();
    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1)
      out.push("cut: " + each.textContent);
  }
}
return [document.documentElement.scrollWidth, edge, out];
"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", ["conv{}", "encoder.layers.{}.self_attention.output_projection_with_a_long_name"])
def test_nothing_stands_out_of_the_page_or_is_cut(browser, tmp_path, width, name):
    shown(browser, tmp_path / "report.html", page(report(groups=60, name=name)), width)
    reached, edge, out = browser.execute_script(WIDE)
    assert (reached, out) == (edge, [])


@pytest.mark.browser
def test_browser_asks_for_nothing_and_has_nothing_to_say(browser, tmp_path):
    path = tmp_path / "report.html"
    shown(browser, path, page(strings_replaced(report(), BAD + "<img src=x.png onerror=document.title='run'>")), 1280)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked == [path.as_uri()]
    assert browser.title.endswith("A report")


@pytest.mark.browser
def test_page_is_dark_where_the_reader_wants_it(browser, tmp_path):
    grounds = []
    for scheme in ("light", "dark"):
        shown(browser, tmp_path / "report.html", page(report()), 800, scheme)
        grounds.append(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(18, 23, 29)"]
