"""tools/extras.py: events, progress, and what a resumed run makes of a log that was cut."""

import io
import json
import re
import sys
import time
from pathlib import Path

import pytest
import tiny
import tools.extras
from test_checkpoint import data, folder  # noqa: F401

README = Path(__file__).parents[1] / "README.md"


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Program:
    """Keeps what is logged."""

    def __init__(self):
        self.lines = []

    def log(self, event, template, **values):
        self.lines.append(template.format_map(values))


def test_a_terminal_shows_a_bar_that_makes_room_for_lines(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar, program = tools.extras.Progress(), Program()
    bar.report(program, "training", 0.0)
    time.sleep(0.2)  # tqdm draws ten times a second at most
    bar.report(program, "training", 0.25)
    bar.clear()
    bar.report(program, "scoring", 0.5)
    bar.close()
    drawn = sys.stderr.getvalue()
    assert re.search(r"training +0%.*training +25%.*scoring", drawn, re.S)
    assert program.lines == [] and sys.stdout.getvalue() == ""


def test_elsewhere_there_is_a_line_every_ten_seconds_with_the_seconds_left(monkeypatch):
    bar, program, now = tools.extras.Progress(), Program(), 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    for second in range(41):
        now = float(second)
        bar.report(program, "training", second / 100)
    assert program.lines == [f"progress: training {done}%, {100 - done} s left" for done in (11, 22, 33)]
    bar.report(program, "scoring", 0.5)  # another stage starts anew
    assert len(program.lines) == 3


def test_every_event_of_a_run_is_in_the_readme_with_its_values(folder):
    settings = dict(ITERATIONS=12, WARMDOWN_ITERS=12, VAL_LOSS_EVERY=2, AUDIT=1, CHECKPOINT_EVERY=0.001)
    assert tiny.run(folder, **settings).status == 0
    events = [json.loads(line) for line in (folder / "logs/tiny.jsonl").read_text().splitlines()]
    table = {
        name: line
        for line in README.read_text("utf-8").splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert {event["event"] for event in events} > {
        "settings",
        "step",
        "swa",
        "stage",
        "ttt_chunk",
        "checkpoint",
        "audit",
    }
    for event in events:
        names = set(re.findall(r"`(\w+)`", table[event["event"]].split("|")[2]))
        assert event.keys() - {"event", "time"} <= names
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)


def test_a_resumed_run_drops_a_line_that_was_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    for text, kept in (("a\nb\nc", "a\nb\n"), ("a\nb\n", "a\nb\n"), ("a", ""), ("", "")):
        path.write_text(text)
        tools.extras.drop_torn_line(path)
        assert path.read_text() == kept
    tools.extras.drop_torn_line(tmp_path / "none")
