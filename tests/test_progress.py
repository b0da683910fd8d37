"""Planning logs one line on the first rank and details where they are asked for, and talks to terminals alone."""

from __future__ import annotations

import io
import logging
import sys

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import dsp_auto
from dsp_auto import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def model():
    return nn.Sequential(nn.Softmax(1), nn.Softmax(2)), (torch.randn(2, 4, 6),)


def records(caplog, level):
    return [r for r in caplog.records if r.name.partition(".")[0] == "dsp_auto" and r.levelno == level]


def test_a_plan_is_one_line_with_seconds_bytes_and_peak_and_details_are_at_debug(caplog):
    net, args = model()
    with caplog.at_level(logging.DEBUG, logger="dsp_auto"):
        plan = dsp_auto.plan(net, "2", args)
    (line,) = records(caplog, logging.INFO)
    text = line.getMessage()
    assert text.startswith("planned dsp for mesh sp=2 in ") and "wire bytes per device" in text and "at the peak" in text
    details = [record.getMessage() for record in records(caplog, logging.DEBUG)]
    assert any(str(plan) in text for text in details) and any("capture of Sequential took" in text for text in details)


def test_nothing_is_printed_by_default_and_nothing_into_a_pipe(capfd, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    net, args = model()
    dsp_auto.plan(net, "2", args)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_terminal_of_the_first_rank_is_told_what_takes_long(monkeypatch, rank):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress.threading, "Timer", _AtOnce)
    monkeypatch.setenv("RANK", rank)
    net, args = model()
    dsp_auto.plan(net, "2", args)
    lines = terminal.getvalue().splitlines()
    if rank == "0":
        assert lines[0] == "dsp_auto: capture of Sequential …" and lines[1].startswith("dsp_auto: capture of Sequential: ")
        assert lines[2] == "dsp_auto: solving for sp=2 …"
    else:
        assert not lines


class _AtOnce:
    """A timer whose time is over when it starts."""

    def __init__(self, seconds, function) -> None:
        self.function = function

    def start(self) -> None:
        self.function()

    def cancel(self) -> None:
        pass


def _logged(rank, ranks):
    net, args = model()
    heard: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("dsp_auto")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        dsp_auto.parallelize(net, init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",)))(*args)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return heard


def test_only_the_first_rank_logs_its_plan(world):
    first, second = world(2).run(_logged)
    assert len(first) == 1 and first[0].startswith("planned ") and not second
