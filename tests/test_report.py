"""Promises of the page that `report` writes: every number of the plan, nothing from outside, nothing run that a model's names
say, an honest account of what was not worked out; and in a browser, readable on a screen and on a phone, light and dark."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import html5lib
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dsp_auto
from dsp_auto import DspError, Plan, PlanError, Report, StrategyError, cli
from dsp_auto import report as make_report
from dsp_auto.alternatives import figures
from examples.transformer_2d import build as transformer_2d

NAMES = {"video": "B T S C"}
SIZES = {"layers": 2, "hidden": 16, "heads": 4, "frames": 8, "tokens": 16}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SOME = ["dsp", "ulysses", "megatron-sp"]
EVIL = "<script>evil = 1</script>"


def reported(mesh="4", training=True, sizes=None, **options):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, args, kwargs = transformer_2d(**{**SIZES, **(sizes or {})})
    with torch.set_grad_enabled(training):
        return make_report(model, mesh, args, kwargs, **{"dim_names": NAMES, "strategies": ["dsp"], "seconds": 3600, **options})


class Evil(nn.Module):
    """Names that a page must not take for its own, and long ones."""

    def __init__(self):
        super().__init__()
        self.add_module(EVIL, nn.Linear(6, 6))
        self.add_module("a_name_without_any_place_to_break_it_" * 4, nn.Linear(6, 6))

    def forward(self, video):  # [B, T, S, C]
        for module in self.children():
            video = module(video.softmax(1)).softmax(2)
        return video


def evil():
    model = type("Evil<img src=x onerror=alert(1)>", (Evil,), {})()
    names = {"video": 'B <b>T</b> S"onclick="x C'}
    return make_report(model, "2", (torch.ones(1, 4, 6, 6),), dim_names=names, strategy="dsp", strategies=["dsp"])


def tight():
    """Of a plan that has to recompute some blocks."""
    large = {"frames": 32, "tokens": 64}
    needed = reported(sizes=large, capacity=10**9, seconds=0).plan.memory["peak_bytes"]
    found = reported(sizes=large, capacity=needed * 3 // 4, seconds=0)
    assert found.plan.recomputed
    return found


def many():
    """Of a plan with more stages than a phone has pixels."""
    plan = reported(seconds=0).plan
    stages = [replace(plan.stages[1 + n % 2], index=n) for n in range(400)]
    return Report.of_plan(replace(plan, stages=tuple(stages)))


# All that a page has to show.
KINDS = {
    "free": lambda: reported(strategies=SOME),
    "tight": tight,
    "two mesh dims": lambda: reported("2x2", objective="time", capacity="1GB", sizes={"layers": 1}),
    "parts": lambda: reported(strategy="megatron-sp", seconds=0),
    "one device": lambda: reported("1", training=False),
    "plan alone": lambda: Report.of_plan(Plan.from_json(reported(seconds=0).plan.to_json())),
    "many stages": many,
    "evil": evil,
}


@pytest.fixture(scope="module")
def report_of():
    """`report_of(kind)`: each is made once, when a test asks for it."""
    return functools.cache(lambda kind: KINDS[kind]())


@pytest.fixture
def free(report_of):
    return report_of("free")


def parsed(text):
    """The page's tree. Raises where it is no valid HTML."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)


def values(element):
    return [float(data.get("value")) for data in element.iter("data")]


def text_of(element):
    return " ".join("".join(element.itertext()).split())


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_the_plan_is_on_the_page(report_of, kind):
    plan, tree = report_of(kind).plan, parsed(report_of(kind).to_html())
    named = {element.get("id"): element for element in tree.iter()}
    for stage in plan.stages:
        rows = named[f"stage-{stage.index}"]
        sent = [amount for entry in stage.enter for amount in (entry.forward_bytes, entry.backward_bytes)]
        assert values(rows) == pytest.approx(sent) and stage.name in text_of(rows)
        assert all(entry.tensor in text_of(rows) for entry in stage.enter)
    everywhere, text = set(values(tree)), text_of(tree)
    totals, memory = plan.communication, plan.memory
    known = [totals[name] for name in ("forward_bytes", "backward_bytes", "paper_forward_volume")]
    known += [own[name] for own in totals["by_primitive"].values() for name in ("forward_bytes", "backward_bytes")]
    known += [memory[name] for name in ("peak_bytes", "activation_bytes", "parameter_bytes", "input_bytes")]
    known += [memory["capacity_bytes"]] if memory["capacity_bytes"] is not None else []
    for number in filter(None, known):
        assert number in everywhere
    assert values(named["verdict"])[0] == figures(plan)["wire"] or not figures(plan)["wire"]
    assert plan.digest[:12] in text and all(f"{name}={size}" in text for name, size in plan.mesh.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_needs_and_loads_nothing_from_outside(report_of, kind):
    text = report_of(kind).to_html()
    for element in parsed(text).iter():
        for name in ("src", "href", "srcset", "action", "data", "poster", "style"):
            value = element.get(name, "")
            assert "url(" not in value and (name == "style" or not value or value.startswith("#") or value == "data:,")
        assert element.tag not in ("iframe", "object", "embed", "img", "base") and not element.get("onclick")
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text


def test_what_a_model_is_called_is_text_and_no_part_of_the_page(report_of):
    text = report_of("evil").to_html()
    tree = parsed(text)
    assert len(list(tree.iter("script"))) == 1 and not list(tree.iter("img"))
    assert EVIL not in text and EVIL in text_of(tree) and "<b>T</b>" in text_of(tree)
    assert "Evil<img src=x onerror=alert(1)>" in text_of(tree)


def test_two_pages_of_one_model_are_equal(report_of, free):
    assert reported(strategies=SOME).to_html() == free.to_html()
    assert report_of("plan alone").to_html() == Report.of_plan(free.plan).to_html()


def test_strategies_and_the_prediction_are_those_of_compare(free):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, args, kwargs = transformer_2d(**SIZES)
    others = ["dsp", "ulysses"]
    found = dsp_auto.compare(model, "4", args, kwargs, dim_names=NAMES, strategies=others)
    for name in others:
        there, here = found[name], free.comparison[name]
        assert there.prediction == here.prediction and there.collectives == here.collectives
    assert free.own is free.comparison["dsp"] and found.blocks == free.comparison.blocks
    shown = values(parsed(free.to_html()))
    assert all(figures(one.plan)["wire"] in shown and figures(one.plan)["peak"] in shown for one in free.comparison.runnable)


def test_each_stage_has_what_its_other_layouts_cost_in_all(free):
    text, shown = free.to_html(), values(parsed(free.to_html()))
    entries = [entry for own in free.alike if own.alternatives for entry in own.alternatives.entries]
    assert sorted(index for own in free.alike for index in own.stages) == list(range(len(free.plan.stages)))
    assert any(not entry.is_plan and entry.plan is not None for entry in entries)
    for entry in entries:
        if entry.plan is not None:
            assert {figures(entry.plan)["wire"], figures(entry.plan)["peak"]} <= set(shown)
    # Of a stage of whole blocks it is what the modules say.
    first = next(own for own in free.alike if free.plan.stages[own.stages[0]].name == "blocks.1")
    asked = {entry.factor: entry for entry in planned().explain("blocks.1").entries}
    for entry in first.alternatives.entries:
        assert figures(entry.plan)["wire"] == pytest.approx(figures(asked[entry.factor].plan)["wire"])
    assert "next best" in text and "at most 5% above its best" not in text


def test_what_was_not_solved_to_the_end_says_at_most(free):
    first = free.alike[0]
    rough = [
        replace(entry, plan=replace(entry.plan, solver={**entry.plan.solver, "gap": 0.05}))
        for entry in first.alternatives.entries
        if entry.plan is not None and not entry.is_plan
    ]
    alternatives = replace(first.alternatives, entries=tuple(rough))
    text = replace(free, alike=(replace(first, alternatives=alternatives), *free.alike[1:])).to_html()
    assert re.search("next best: S, at most .* more sent", text) and "at most 5% above its best" in text


def planned():
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, args, kwargs = transformer_2d(**SIZES)
    return dsp_auto.plan(model, "4", args, kwargs, dim_names=NAMES)


def test_stages_that_are_alike_have_the_answer_that_each_would_have(monkeypatch):
    sizes = {"layers": 4}
    folded = reported(sizes=sizes)
    assert len(folded.alike) < len(folded.plan.stages)
    module = importlib.import_module("dsp_auto.report")  # the name dsp_auto.report is the function
    several = [own for own in folded.alike if len(own.stages) > 1]
    monkeypatch.setattr(module, "_alike", lambda *_: [(index,) for own in several for index in own.stages[1:]])
    apart = {own.stages[0]: own for own in reported(sizes=sizes).alike}
    assert len(apart) > 1
    for own in several:
        for index in own.stages[1:]:
            one, each = ({e.factor: figures(e.plan)["wire"] for e in x.alternatives.entries} for x in (own, apart[index]))
            assert one == pytest.approx(each)


def test_what_there_was_no_time_for_is_told_as_such():
    found = reported(strategies=None, seconds=0)
    text = text_of(parsed(found.to_html()))
    assert found.own is found.comparison["dsp"] and not any(own.alternatives for own in found.alike)
    assert text.count("is missing: not planned, because the time for this page was up") == 5
    assert "not worked out, because the time for this page was up" in text and "had 0 s" in text


def test_a_plan_that_was_made_before_is_reported_without_solving_again(free, tmp_path):
    free.plan.save(tmp_path / "plan.json")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, args, kwargs = transformer_2d(**SIZES)
    found = make_report(model, "4", args, kwargs, plan=tmp_path / "plan.json", strategies=["dsp"], seconds=0)
    assert found.plan.digest == free.plan.digest and found.own is found.comparison["dsp"]
    with pytest.raises(StrategyError, match="a plan is given, and strategy"):
        make_report(model, "4", args, kwargs, plan=free.plan, strategy="ring")
    with pytest.raises(PlanError, match="another model or call"):
        make_report(model, "4", (args[0][:, :5],), kwargs, plan=free.plan)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seconds": float("nan")}, "seconds nan"),
        ({"seconds": -1}, "seconds -1"),
        ({"strategies": ["magic"]}, "magic"),
        ({"hardware": "abacus"}, "abacus"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(DspError, match=re.escape(says)):
        reported(**options)


ARGV = ["report", "examples.transformer_2d:build", "--mesh", "2", "--seconds", "0", "-a", "layers=1", "hidden=16", "heads=2"]


@pytest.fixture
def in_the_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])


def run(capsys, *argv):
    code = cli.main(list(argv))
    return code, *capsys.readouterr()


def test_the_command_writes_a_page_and_replaces_it(capsys, tmp_path, in_the_repository):
    page = tmp_path / "plan.html"
    code, out, _ = run(capsys, *ARGV, "--out", str(page))
    assert code == 0 and out.startswith(f"{page}: mesh sp=2, strategy dsp") and len(out.splitlines()) == 1
    assert "Plan of Transformer2D" in text_of(parsed(page.read_text(encoding="utf-8")))
    assert run(capsys, *ARGV, "--inference", "--out", str(page))[0] == 0
    assert "a forward without gradients" in page.read_text(encoding="utf-8")


def test_the_command_tells_what_a_plan_alone_can(capsys, tmp_path, free):
    plan, page = tmp_path / "plan.json", tmp_path / "plan.html"
    free.plan.save(plan)
    assert run(capsys, "report", "--plan", str(plan), "--out", str(page))[0] == 0
    assert page.read_text(encoding="utf-8") == Report.of_plan(free.plan).to_html()
    code, out, err = run(capsys, "report", "--plan", str(plan), "--strategy", "ring", "--out", str(page))
    assert (code, out) == (2, "") and "a plan is given, and strategy" in err


def test_a_file_that_is_no_page_is_not_replaced_and_nothing_is_planned_first(capsys, tmp_path, monkeypatch, free):
    mine = tmp_path / "notes.html"
    mine.write_text("<!doctype html><title>mine</title>")
    monkeypatch.setattr(cli, "capture", lambda *args: pytest.fail("planned first"))
    places = {mine: "no report of dsp-auto", tmp_path: "a folder", tmp_path / "no" / "x.html": "there is no folder"}
    for place, says in places.items():
        code, out, err = run(capsys, *ARGV, "--out", str(place))
        assert (code, out) == (2, "") and says in err and len(err.splitlines()) == 1
    with pytest.raises(DspError, match="no report of dsp-auto"):
        free.save(mine)
    assert mine.read_text() == "<!doctype html><title>mine</title>"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("report",), "neither TARGET nor --plan"),
        (("report", "examples.transformer_2d:build"), "--mesh"),
        (("report", "--plan", "none.json"), "none.json"),
        ((*ARGV, "--strategies", "magic"), "magic"),
        ((*ARGV, "--seconds", "nan"), "seconds nan"),
    ],
)
def test_bad_input_is_told_and_writes_nothing(capsys, tmp_path, in_the_repository, argv, says):
    page = tmp_path / "plan.html"
    code, out, err = run(capsys, *argv, "--out", str(page))
    assert (code, out) == (2, "") and says in err and len(err.splitlines()) == 1 and not page.exists()


def test_where_no_plan_fits_what_would_stands_below_the_error(capsys, tmp_path, in_the_repository, monkeypatch):
    monkeypatch.setattr(cli, "what_would_fit", lambda *args: ["on 4 ranks"])
    page = tmp_path / "plan.html"
    code, out, err = run(capsys, *ARGV, "--capacity", "1KB", "--out", str(page))
    assert (code, out) == (2, "") and not page.exists()
    assert "no plan fits" in err.splitlines()[0] and err.splitlines()[1:] == ["    on 4 ranks"]


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium: the one that DSP_AUTO_CHROMIUM names, that is installed, or that playwright brought."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        named = os.environ.get("DSP_AUTO_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
        place = named or playwright.chromium.executable_path
        if not Path(place).exists():
            pytest.skip("no Chromium is installed")
        found = playwright.chromium.launch(executable_path=place)
        yield found
        found.close()


@pytest.fixture
def page_of(report_of, tmp_path):
    """`page_of(kind)`: where the page lies."""

    def of(kind):
        report_of(kind).save(tmp_path / "plan.html")
        return (tmp_path / "plan.html").as_uri()

    return of


def opened(browser, uri, **options):
    """A page, and what it said and asked for while it was loaded."""
    page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(uri)
    return page, said, asked


# Of each element with text of its own that is shown: what is cut off, and where its colours are too near to each other.
LOOK = """() => {
  const found = {clipped: [], pale: []};
  const channels = (text) => text.match(/[0-9.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const own = [r, g, b].map((x) => x / 255).map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * own[0] + 0.7152 * own[1] + 0.0722 * own[2];
  };
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join("");
    if (!own || ["SCRIPT", "STYLE"].includes(element.tagName) || !element.checkVisibility()) continue;
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    if (!box.width || element.classList.contains("hidden")) continue;
    const scrolls = element.closest(".scroll");
    const outside = !scrolls && (box.right > innerWidth + 0.5 || box.left < -0.5);
    const cut = style.overflow === "hidden" && !element.title && element.scrollWidth > element.clientWidth + 1;
    if (outside || cut) found.clipped.push(own.slice(0, 40));
    let behind = element;
    while (behind && channels(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const ground = behind ? getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)";
    const two = [luminance(channels(style.color)), luminance(channels(ground))].sort((a, b) => b - a);
    if ((two[0] + 0.05) / (two[1] + 0.05) < 4.5) found.pale.push(`${own.slice(0, 40)}: ${style.color} on ${ground}`);
  }
  return found;
}"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_readable_on_a_screen_and_on_a_phone_light_and_dark_and_asks_for_nothing(browser, page_of, kind):
    uri = page_of(kind)
    # What fits depends on the width, what can be read on the colours; both at once once.
    every = itertools.product((1280, 390), ("light", "dark"))
    for width, scheme in every if kind == "free" else ((1280, "light"), (390, "dark")):
        page, said, asked = opened(browser, uri, viewport={"width": width, "height": 844}, color_scheme=scheme)
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width, (width, scheme)
        assert page.evaluate(LOOK) == {"clipped": [], "pale": []}, (width, scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'") == (scheme == "light")
        assert said == [] and asked == [uri] and page.evaluate("window.evil") is None
        page.close()


def test_a_tap_on_a_stage_shows_what_enters_it_and_so_do_the_keys(browser, page_of, free):
    page, said, _ = opened(browser, page_of("free"), viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    box = page.locator("#strip").bounding_box()
    count = len(free.plan.stages)
    page.locator("#strip").tap(position={"x": box["width"] * 2.5 / count, "y": box["height"] / 2})
    shown = page.locator("#detail").inner_text()
    assert "Stage 2 blocks.2" in shown and "switch S → T" in shown and "Next best" in shown
    page.locator("#choice").press("ArrowRight")
    assert "Stage 3 blocks.3" in page.locator("#detail").inner_text() and page.locator("#chosen").inner_text() == "3"
    page.locator("#detail a").tap()
    assert page.locator("details.kind[open] table").last.is_visible() and said == []
    page.close()


def test_without_scripts_and_on_paper_everything_that_matters_is_there(browser, page_of):
    page, _, _ = opened(browser, page_of("free"), java_script_enabled=False)
    shown = page.locator("body").inner_text()
    assert "The solver proved" in shown and "next best" in shown and "switch T → S" in shown and "megatron-sp" in shown
    assert not page.locator("#chooser").is_visible() and not page.locator("#detail").is_visible()
    page.emulate_media(media="print")
    kinds = page.locator("details.kind table")
    assert kinds.count() > 1 and all(kinds.nth(n).bounding_box()["height"] > 0 for n in range(kinds.count()))
    page.close()
