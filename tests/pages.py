"""Pages: runs the code blocks of a Markdown page, and holds what they print against what the page shows.

    ```python     run, all of a page in one namespace. One whose first line is `# name.py` is written as that file
    ```text       right after a block that is run: what it prints
    ```console    `$ command`, and what it prints, if that is shown: `dsp-auto` runs in this process, `torchrun` runs a file of
                  the page on as many gloo processes as asked for. What is for the reader's own computer (`make`, `pip`, more
                  GPUs than this one has) is only checked to name targets, files and options that exist
    others        only looked at: what is written there of commands must exist too

In what a page shows, `…` stands for anything on a line, and alone for any lines. A block below a comment
`<!-- not run: reason -->` is not run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import device_mesh

from docs.make_api import commands as commands_of
from dsp_auto import cli
from dsp_auto.passes.rules import registered_by_user

ROOT = Path(__file__).parents[1]
ANYTHING = "…"
MOST_RANKS = 2  # of a `torchrun` that is run
COMMANDS = ("dsp-auto", "torchrun", "python", "pip", "make")
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.DOTALL | re.MULTILINE)
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z", re.DOTALL)
_NAMED = re.compile(r"# ([\w/]+\.py)\n")


@dataclass(frozen=True)
class Block:
    """One code block. line: where its code begins. not_run: why it is not, where a comment says so. shown: what it prints, as
    the page has it; None where nothing is said."""

    line: int
    language: str
    text: str
    not_run: str = ""
    shown: str | None = None

    @property
    def file(self) -> str:
        """The name of the file that the block is, if it is one."""
        found = _NAMED.match(self.text) if self.language == "python" else None
        return found[1] if found else ""


@dataclass(frozen=True)
class Page:
    path: Path
    blocks: tuple[Block, ...]
    prose: str  # what is between the blocks

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls.of(path.read_text(encoding="utf-8"), path)

    @classmethod
    def of(cls, text: str, path: Path) -> Page:
        blocks: list[Block] = []
        end = 0
        for fence in _FENCE.finditer(text):
            code = fence["text"]
            between, line = text[end : fence.start()], text[: fence.start("text")].count("\n") + 1
            end = fence.end()
            if fence["language"] == "text" and blocks and blocks[-1].shown is None and "\n\n" not in between.strip("\n"):
                last = blocks[-1]
                if last.language == "python" and not between.strip().startswith("#"):
                    blocks[-1] = Block(last.line, last.language, last.text, last.not_run, code)
                    continue
            not_run = _NOT_RUN.search(between)
            blocks.append(Block(line, fence["language"], code, " ".join(not_run[1].split()) if not_run else ""))
        return cls(path, tuple(blocks), _FENCE.sub("", text))

    def run(self, folder: Path, on_ranks: Callable[..., list[str]]) -> None:
        """Runs all blocks in `folder`. on_ranks: `World.run` of so many ranks. Raises AssertionError where a page shows
        something else than its code prints."""
        for block, what, shown, printed in self.outcomes(folder, on_ranks):
            place = f"{self.path.name}, block of line {block.line}"
            assert matches(shown, printed), f"{place}: {what} prints\n\n{printed}\n\nand the page shows\n\n{shown}"

    def outcomes(self, folder: Path, on_ranks: Callable[..., list[str]]) -> Iterator[tuple[Block, str, str, str]]:
        """Runs all blocks, and gives for each thing that is shown the block, what prints it, what is shown, and what is
        printed."""
        namespace: dict[str, Any] = {"__name__": self.path.stem}
        for block in self.blocks:
            if block.file:
                (folder / block.file).write_text(block.text, encoding="utf-8")
        with _in(folder):
            for block in self.blocks:
                if block.not_run:
                    continue
                if block.language == "python" and not block.file:
                    code = compile("\n" * (block.line - 1) + block.text, self.path.name, "exec")
                    printed = _printed(lambda code=code: exec(code, namespace))
                    if block.shown is not None:
                        yield block, "the code", block.shown, printed
                elif block.language == "console":
                    for command, shown in commands(block.text):
                        printed = _run_command(command, folder, on_ranks)
                        if printed is not None and shown:
                            yield block, command, shown, printed


def matches(shown: str, printed: str) -> bool:
    """Whether `printed` is what a page shows, where `…` stands for anything on its line, and alone for any lines."""
    lines = [line.rstrip() for line in shown.strip("\n").split("\n")]
    pattern = "".join(
        r"(?:[^\n]*\n)*?" if line.strip() == ANYTHING else re.escape(line).replace(re.escape(ANYTHING), r"[^\n]*") + r"[ ]*\n"
        for line in lines
    )
    return re.fullmatch(pattern, printed.strip("\n") + "\n") is not None


def renewed(shown: str, printed: str) -> str | None:
    """What a page should show in place of `shown` where something else is printed by now, with what is left out there left out
    again, and seconds. None where whole lines are left out: that is for a person."""
    left_out = [line.rstrip() for line in shown.split("\n") if ANYTHING in line]
    if any(line.strip() == ANYTHING for line in left_out):
        return None
    found = []
    for line in printed.strip("\n").split("\n"):
        line = re.sub(r"(?<=; seconds: ).*", ANYTHING, line.rstrip())
        found.append(next((own for own in left_out if matches(own, line)), line))
    return "\n".join(found) + "\n"


def commands(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, and what each prints."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.replace("\\\n", " ").partition("\n")
        yield command, shown


def _run_command(command: str, folder: Path, on_ranks: Callable[..., list[str]]) -> str | None:
    """What a command prints; None where it is for another computer, or its file is no file of the page."""
    words = shlex.split(command)
    check_command(words, folder)
    if words[0] == "dsp-auto":
        codes: list[int] = []
        printed = _printed(lambda: codes.append(cli.main(words[1:])))
        wanted = 2 if printed.startswith("dsp-auto: ") else 0
        assert codes == [wanted], f"{command} ends with exit code {codes[0]}:\n{printed}"
        return printed
    scripts = [n for n, word in enumerate(words) if word.endswith(".py") and (folder / word).exists()]
    if words[0] == "torchrun" and scripts:
        ranks = int(words[words.index("--nproc-per-node") + 1])
        if ranks <= MOST_RANKS:
            # Processes that start now stay for other tests, and would inherit these.
            with contextlib.chdir(ROOT), mock.patch.object(sys, "path", [own for own in sys.path if own != str(folder)]):
                return on_ranks(ranks, str(folder), words[scripts[0] :])[0]
    return None


def check_command(words: list[str], folder: Path = ROOT) -> None:
    """Raises AssertionError where a command names something that does not exist."""
    name, *rest = words
    assert name in COMMANDS, f"{name}: none of {', '.join(COMMANDS)}"
    if name == "dsp-auto":
        _check_options(rest)
    elif name == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), f"{' '.join(words)}: the Makefile has {', '.join(targets)}"
    elif name == "pip":
        assert rest and rest[0] == "install", f"{' '.join(words)}: not an installation"
    else:
        files = [word for word in rest if word.endswith(".py")]
        modules = [rest[n + 1] for n, word in enumerate(rest) if word == "-m"]
        assert files or modules, f"{' '.join(words)}: runs nothing"
        for file in files:
            assert (folder / file).exists() or (ROOT / file).exists(), f"there is no {file}"
        for module in modules:
            assert importlib.util.find_spec(module) is not None, f"there is no module {module}"


def _check_options(words: list[str]) -> None:
    """Of a call of the command line, perhaps only its beginning: whether there are such a command and such options."""
    found = commands_of()
    if not words or words[0].startswith("-"):
        return
    assert words[0] in found, f"dsp-auto {words[0]}: the commands are {', '.join(found)}"
    known = {name for action in found[words[0]]._actions for name in action.option_strings}
    unknown = [word for word in words[1:] if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]
    assert not unknown, f"dsp-auto {words[0]} has no option {', '.join(unknown)}"


def run_script(rank: int, ranks: int, folder: str, words: list[str]) -> str:
    """Runs on a rank: a script as `torchrun` would, in a process group that is there already. What it prints."""
    with _in(Path(folder)), _group_stays(), mock.patch.object(sys, "argv", words):
        # What torchrun tells a process.
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
        with mock.patch.dict(os.environ, {name: str(value) for name, value in told.items()}):
            return _printed(lambda: runpy.run_path(words[0], run_name="__main__"))


def run_text(rank: int, ranks: int, codes: list[tuple[int, str]], path: str, made: Callable[[], Mapping[str, Any]]) -> None:
    """Runs on a rank: pieces of code, each with the line of a page that it begins in, where the names that `made` gives are
    known, on this world in place of the GPUs that the page speaks of."""

    def mesh_of_this_world(kind: str, shape: tuple[int, ...], **names: Any) -> Any:
        return device_mesh.DeviceMesh("cpu", torch.arange(ranks).reshape(*(1 for _ in shape[1:]), ranks), **names)

    before = dict(registered_by_user())
    try:
        with mock.patch.object(device_mesh, "init_device_mesh", mesh_of_this_world):
            namespace = {"__name__": "page", **made()}
            for line, code in codes:
                exec(compile("\n" * (line - 1) + code, path, "exec"), namespace)
    finally:
        registered_by_user().clear()
        registered_by_user().update(before)


@contextlib.contextmanager
def _in(folder: Path) -> Iterator[None]:
    """In a folder whose files can be imported and are forgotten afterwards, as are rules that are registered."""
    before, rules = Path.cwd(), dict(registered_by_user())
    path, modules = list(sys.path), set(sys.modules)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(f"{folder}{os.sep}"):
                del sys.modules[name]
        registered_by_user().clear()
        registered_by_user().update(rules)


@contextlib.contextmanager
def _group_stays() -> Iterator[None]:
    """For a script that starts and ends the process group itself: it is there already, and is of gloo."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    with (
        mock.patch.object(dist, "init_process_group", nothing),
        mock.patch.object(dist, "destroy_process_group", nothing),
        mock.patch.object(torch.cuda, "is_available", lambda: False),
    ):
        yield


def _printed(run: Callable[[], Any]) -> str:
    """What `run` writes to stdout and stderr."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        run()
    return told.getvalue()
