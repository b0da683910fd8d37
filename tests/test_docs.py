"""The pages of `docs` and README tell the truth: all code runs and prints what they show, and lists are those of the code."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dsp_auto
from docs import make_api, make_ops
from dsp_auto import errors
from dsp_auto.passes.rules import registered
from examples.transformer_2d import build as transformer_2d
from tests import pages
from tests.pages import ROOT, Page

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
# Blocks that are not run, by page and line of reason; each has its reason in the page too.
NOT_RUN: dict[str, list[str]] = {}


def test_ops_md_is_what_its_generator_writes():
    assert make_ops.PLACE.read_text() == make_ops.text(), "run `python -m docs.make_ops`"


def test_ops_md_has_a_line_for_every_rule():
    lines = make_ops.PLACE.read_text().splitlines()
    assert not [name for name in registered() if not any(line.startswith(f"| `{name}` |") for line in lines)]


def test_api_md_is_what_its_generator_writes():
    assert make_api.PLACE.read_text() == make_api.text(), "run `python -m docs.make_api`"


@pytest.mark.parametrize("name, own, known", [pytest.param(*entry, id=entry[0]) for entry in make_api.public()])
def test_docstrings_speak_of_every_argument_and_field(name, own, known):
    text = (own.fget if isinstance(own, property) else getattr(own, "__func__", own)).__doc__ or ""
    # A docstring that a dataclass is given is its signature.
    assert text and not text.startswith(f"{name}("), f"{name} has no docstring"
    if "as in `dsp_auto.plan`" in text:
        known = set(known) - set(make_api.parameters(make_api.dsp_auto.plan))
    missing = [one for one in known if not re.search(rf"\b{one}\b", text)]
    assert not missing, f"the docstring of {name} says nothing of {', '.join(missing)}"


@pytest.mark.parametrize("path", [path for path in PAGES if "```" in path.read_text()], ids=lambda path: path.stem)
def test_code_of_the_page_runs_and_prints_what_it_shows(path, world, tmp_path):
    Page.read(path).run(tmp_path, lambda ranks, *args: world(ranks).run(pages.run_script, *args))


def test_blocks_that_are_not_run_are_known_with_their_reasons():
    found = {path.name: [block.not_run for block in Page.read(path).blocks if block.not_run] for path in (*PAGES, README)}
    assert {name: reasons for name, reasons in found.items() if reasons} == NOT_RUN


def test_every_block_of_the_pages_is_of_a_kind_that_is_looked_at():
    """A misspelled language would not be run, and a `text` that follows nothing not be compared."""
    for path in PAGES:
        kinds = {block.language for block in Page.read(path).blocks}
        assert kinds <= ({"py"} if path == make_api.PLACE else {"python", "console", "sh"}), f"{path.name}: {kinds}"


@pytest.mark.parametrize("path", [*PAGES, README], ids=lambda path: path.stem)
def test_commands_in_the_prose_exist(path):
    page = Page.read(path)
    found = re.findall(r"`((?:dsp-auto|make) [^`]+)`", page.prose)
    for block in page.blocks:
        if block.language in ("", "sh"):
            found += [line for line in block.text.splitlines() if line.split(" ")[0] in pages.COMMANDS]
    for command in found:
        pages.check_command(re.sub(r"\s+# .*", "", command).split())


@pytest.mark.parametrize("path", [*PAGES, README], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    page = Page.read(path)
    for target in re.findall(r"\]\(([^)\s]+)\)", page.prose):
        if target.startswith(("http://", "https://")):
            continue
        file, _, heading = target.partition("#")
        other = path if not file else (path.parent / file).resolve()
        assert other.exists(), f"{path.name} links to {target}"
        assert not heading or heading in _anchors(other), f"{path.name} links to {target}"


def _anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", Page.read(path).prose, re.MULTILINE):
        own = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(own)}(-\d+)?", other) is not None for other in found)
        found.append(f"{own}-{again}" if again else own)
    return set(found)


# --- every error has an entry

TROUBLES = ROOT / "docs" / "troubleshooting.md"
ERRORS = {name for name, own in vars(errors).items() if inspect.isclass(own) and issubclass(own, errors.DspError)}
ERRORS |= {"OutOfTimeError"}  # a StrategyError that only `solve` and its callers know
# What the source takes from elsewhere: the words that begin it, as the page should have them.
FROM_ELSEWHERE = {
    "<asked>": (),  # given where the function is called, which is looked at too
    "<message>": ("the following arguments are required: …", "argument …", "unrecognized arguments: …"),  # argparse's
    "… …": ("-a …", "--dim-names …", "gpus …", "step …"),
}


def _message(node: ast.expr) -> str | None:
    """What a message says, with `…` for what is filled in; None for what is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(own.value if isinstance(own, ast.Constant) else "…" for own in node.values)
    return f"<{node.id}>" if isinstance(node, ast.Name) else None


def messages() -> dict[str, str]:
    """The words that begin each error, and where it is raised: what is given for `asked`, or alone."""
    found = {}
    for package in ("dsp_auto", "passes", "cost_models"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                own = None
                if isinstance(node, ast.Call):
                    given = {keyword.arg: keyword.value for keyword in node.keywords}
                    own = given.get("asked")
                    called = node.func.id if isinstance(node.func, ast.Name) else ""
                    if own is None and called in ERRORS and node.args:
                        own = node.args[0]
                    elif called == "failed" and len(node.args) > 1:  # of `failures`
                        own = node.args[1]
                elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "asked":
                    own = node.value
                text = None if own is None else _message(own)
                if text is not None:
                    found[text] = f"{path.relative_to(ROOT)}:{node.lineno}"
    found[inspect.signature(errors.InfeasibleError).parameters["asked"].default] = "dsp_auto/errors.py"
    return found


def entries() -> list[str]:
    """What the page has an entry for: code in its headings and in the first cells of its tables, but for PyTorch's errors."""
    text = Page.read(TROUBLES).prose.partition("## Errors of PyTorch")[0]
    lines = [line for line in text.splitlines() if line.startswith("### ")]
    tables = re.findall(r"^\| message \|.*?(?=\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    lines += [row.split(" | ")[0] for table in tables for row in table.splitlines()]
    return [entry for line in lines for entry in re.findall(r"`([^`]+)`", line)]


def _covers(entry: str, message: str) -> bool:
    """Whether a message may be what an entry says, where `…` in the entry stands for anything."""
    return re.fullmatch(re.escape(entry).replace(re.escape("…"), ".+"), message.replace("`", "")) is not None


MESSAGES = messages()


def test_messages_are_found_in_the_source():
    assert len(MESSAGES) > 100 and "no plan fits the memory capacity" in MESSAGES and "strategy …" in MESSAGES


@pytest.mark.parametrize("message", MESSAGES)
def test_every_error_has_an_entry(message):
    wanted = FROM_ELSEWHERE.get(message, (message,))
    missing = [own for own in wanted if not any(_covers(entry, own) for entry in entries())]
    assert not missing, f"{TROUBLES.name} has no entry for {missing} ({MESSAGES[message]})"


@pytest.mark.parametrize("message", ["a new error", "cannot do …", "…: something new", "the ranks …", "ring attention …"])
def test_an_error_without_an_entry_is_found(message):
    assert not any(_covers(entry, message) for entry in entries())


def test_every_entry_is_of_an_error():
    known = [own for message in MESSAGES for own in FROM_ELSEWHERE.get(message, (message,))]
    assert not [entry for entry in entries() if not any(_covers(entry, own) for own in known)]


# --- README, whose examples are of a model of the reader's


class _Video(nn.Module):
    """What README's examples call `model`."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, video: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(video) + t[:, None, None, None] + text.mean(1)[:, None, None]
        for n, block in enumerate(self.blocks):
            x = x + block["attn"](x).softmax(2 - n)
        return x


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _names_of_readme() -> dict[str, Any]:
    torch.manual_seed(0)
    if not hasattr(torch.ops.my, "attention"):
        torch.library.custom_op("my::attention", _attention, mutates_args=())
    call = {"video": torch.randn(2, 6, 10, 4), "t": torch.randn(2), "text": torch.randn(2, 5, 8)}
    return {"model": _Video(), "criterion": lambda found: found.square().mean(), **call}


def test_code_of_readme_runs_on_two_ranks(world):
    codes = [(block.line, block.text) for block in Page.read(README).blocks if block.language == "python"]
    world(2).run(pages.run_text, codes, str(README), _names_of_readme)


def test_the_demo_of_readme_is_what_it_plans():
    """But for seconds, and for what is measured."""
    shown = next(block.text for block in Page.read(README).blocks if "largest deviation from one device" in block.text)
    sizes = dict(layers=2, hidden=64, heads=4, frames=51, tokens=250, batch=1)
    assert shown.startswith(f"Transformer-2D ({', '.join(f'{name} {size}' for name, size in sizes.items())})")
    model, args, kwargs = transformer_2d(**sizes)
    args[0].requires_grad_()
    planned = str(dsp_auto.plan(model, "4", args, kwargs, dim_names=transformer_2d.dim_names))
    seconds = re.compile(r"(?<=; seconds: ).*")
    table = "mesh sp=4" + seconds.sub("", shown).partition("mesh sp=4")[2].partition("\n\nlargest")[0]
    assert pages.matches(table, seconds.sub("", planned)), f"README shows\n{table}\nand the plan is\n{planned}"


# --- the machinery itself


def test_a_page_that_shows_something_else_is_found(tmp_path):
    Page.of("```python\nprint(1, 2)\n```\nprints\n```text\n1 …\n```\n", README).run(tmp_path, None)
    with pytest.raises(AssertionError, match=r"block of line 2: the code prints\s+1 2\s+and the page shows\s+1 3"):
        Page.of("```python\nprint(1, 2)\n```\n```text\n1 3\n```\n", README).run(tmp_path, None)
    with pytest.raises(AssertionError, match=r"dsp-auto rules aten::relu prints"):
        Page.of("```console\n$ dsp-auto rules aten::relu\nno such rule\n```\n", README).run(tmp_path, None)
    with pytest.raises(ZeroDivisionError):
        Page.of("```python\n1 / 0\n```\n", README).run(tmp_path, None)


@pytest.mark.parametrize(
    "shown, printed, same",
    [
        ("a … c\nd", "a b c\nd\n", True),
        ("a … c", "a b\nx c\n", False),  # within a line
        ("a\n…\nd", "a\nb\nc\nd\n", True),
        ("a\n…\nd", "a\nd", True),
        ("a\n…", "b\nc", False),
        ("a", "a\nb", False),
        ("a.c", "abc", False),
        ("a  \nb", "a\nb  ", True),  # what ends a line in spaces is not seen
    ],
)
def test_what_is_left_out_stands_for_anything(shown, printed, same):
    assert pages.matches(shown, printed) is same


@pytest.mark.parametrize(
    "shown, printed, now",
    [
        ("a 1\nb …\n", "a 2\nb 3\nc\n", "a 2\nb …\nc\n"),
        ("gap 0%; seconds: …\n", "gap 1%; seconds: plan 0.1\n", "gap 1%; seconds: …\n"),
        ("…\nb\n", "c\n", None),
    ],
)
def test_what_is_left_out_stays_left_out_when_a_page_is_written_anew(shown, printed, now):
    assert pages.renewed(shown, printed) == now and (now is None or pages.matches(now, printed))


@pytest.mark.parametrize(
    "command",
    [
        *("make nothing", "dsp-auto explode", "dsp-auto explain x:y --mash 8", "torchrun --nproc-per-node 2 none.py"),
        *("python -m dsp_auto.none", "rm -rf /", "pip download x"),
    ],
)
def test_commands_that_do_not_exist_are_found(command):
    with pytest.raises(AssertionError):
        pages.check_command(command.split())
