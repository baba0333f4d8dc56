"""tools/run/: events, progress, how hooks are grouped, and what a resumed run makes of a log that was cut."""

import inspect
import io
import json
import re
import sys
import time

import pytest
import torch

import train_gpt as T
from tests import tiny
from tools.run import HookGroup, make_hooks
from tools.run.events import Events, drop_torn_line
from tools.run.progress import Progress

EVENTS = tiny.SCRIPT.parent / "docs/events.md"


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Log(T.Log):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def event(self, name, line="", **values):
        self.lines.append(line.format_map(values))


def progress():
    """Progress of a run, and the lines that the run logs."""
    hook, log = Progress(), Log()
    hook.on_start(T.Run(T.Settings(), None, hook, log))
    return hook, log.lines


class Recorder(T.Hooks):
    """Keeps the names of its calls, perhaps in a list of others' calls, too, and returns what it is told."""

    def __init__(self, calls=None, name="", **results):
        self.calls, self.name, self.results = [] if calls is None else calls, name, results


def recorder_of(method):
    def record(self, *args, **named):
        self.calls.append((self.name, method, args, named))
        result = self.results.get(method, getattr(T.NO_HOOKS, method)(*args, **named))
        if isinstance(result, Exception):
            raise result
        return result

    return record


METHODS = {
    name: method
    for name, method in vars(HookGroup).items()
    if name.startswith(("on_", "before_", "restore_", "should_"))
}
for method in METHODS:
    setattr(Recorder, method, recorder_of(method))


def call(hooks, method):
    """Call a method by made-up arguments; return these and its result."""
    if method == "should_stop":
        return (), dict(in_loop=True), hooks.should_stop(in_loop=True)
    args = [object() for _ in list(inspect.signature(METHODS[method]).parameters)[1:]]
    return tuple(args), {}, getattr(hooks, method)(*args)


def test_the_program_calls_these_hooks_and_no_others():
    """A hook of another name would do nothing, and nobody would know."""
    called = set(re.findall(r"hooks\.((?:on|before|restore|should)_\w+)", tiny.SCRIPT.read_text()))
    assert called == METHODS.keys()
    with pytest.raises(AttributeError):
        _ = T.NO_HOOKS.onstart


@pytest.mark.parametrize("method", METHODS)
def test_a_group_passes_on_every_hook_in_order_and_the_end_in_reverse_order(method):
    calls = []
    group = HookGroup([Recorder(calls, "a"), Recorder(calls, "b")])
    group.run = T.Run(T.Settings(), None, T.NO_HOOKS, Log())
    args, named, _ = call(group, method)
    order = "ba" if method in ("on_end", "on_stopped", "on_error") else "ab"
    assert calls == [(name, method, args, named) for name in order]


def test_of_a_group_the_first_state_wins_and_any_stops():
    results = dict(restore_phase="scoring", restore_training={}, restore_scoring={"a": 1}, should_stop=True)
    nothing, one = Recorder(), Recorder(**results)
    two = Recorder(restore_phase="training", restore_training={"b": 2}, restore_scoring={"c": 3})
    for method, expected in results.items():
        assert call(HookGroup([nothing, one, two]), method)[2] == expected
        assert not call(HookGroup([nothing]), method)[2]


def test_all_of_a_group_hear_of_an_error_even_if_one_fails():
    first, second = Recorder(), Recorder(on_error=ValueError("b"), on_stopped=ValueError("b"))
    for method in ("on_error", "on_stopped"):
        with pytest.raises(ValueError, match="b"):
            call(HookGroup([first, second]), method)
    assert [name for _, name, _, _ in first.calls] == ["on_error", "on_stopped"]


def test_hooks_are_those_that_the_settings_ask_for():
    def names(**settings):
        return [type(hook).__name__ for hook in make_hooks(T.Settings(**settings)).hooks]

    assert names() == ["Inputs", "Ownership", "Events", "Progress"]
    assert (
        names(resume="auto")
        == names(checkpoint_every=1.0)
        == ["Inputs", "Ownership", "Events", "Progress", "Checkpoints"]
    )
    assert names(audit=True) == ["Inputs", "Ownership", "Events", "Progress", "Audit"]


def test_a_full_disk_costs_the_events_and_is_told_by_the_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    events, log = Events(T.NO_HOOKS.restore_phase), Log()
    events.on_start(T.Run(T.Settings(run_id="a"), torch.device("cpu"), events, log))
    for _ in range(2):  # there is no folder
        events.on_event("step", {})
    assert "No such file" in log.lost and not list(tmp_path.iterdir())


def test_a_terminal_shows_a_bar_that_makes_room_for_lines(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    hook, lines = progress()
    hook.on_progress("training", 0.0)
    time.sleep(0.2)  # tqdm draws ten times a second at most
    hook.on_progress("training", 0.25)
    hook.on_event("step", {})
    hook.on_progress("scoring", 0.5)
    hook.on_end()
    drawn = sys.stderr.getvalue()
    assert re.search(r"training +0%.*training +25%.*scoring", drawn, re.S)
    assert lines == [] and sys.stdout.getvalue() == ""


def test_elsewhere_there_is_a_line_every_ten_seconds_with_the_seconds_left(monkeypatch):
    (hook, lines), now = progress(), 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    for second in range(41):
        now = float(second)
        hook.on_progress("training", second / 100)
    assert lines == [f"progress: training {done}%, {100 - done} s left" for done in (11, 22, 33)]
    hook.on_progress("scoring", 0.5)  # another stage starts anew
    assert len(lines) == 3


def test_every_event_of_a_run_is_in_the_documents_with_its_values(folder):
    settings = dict(ITERATIONS=12, WARMDOWN_ITERS=12, VAL_LOSS_EVERY=2, AUDIT=1, CHECKPOINT_EVERY=0.001)
    assert tiny.run(folder, **settings).status == 0
    events = [json.loads(line) for line in (folder / "logs/tiny.jsonl").read_text().splitlines()]
    listed, explained = (
        {name: row for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
        for table in re.findall(r"((?:^\| `.*\n)+)", EVENTS.read_text("utf-8"), re.M)
    )
    assert {event["event"] for event in events} > {
        "settings",
        "step",
        "stage",
        "ttt_chunk",
        "checkpoint",
        "audit",
    }
    for event in events:
        names = set(re.findall(r"`(\w+)`", listed[event["event"]].split("|")[2]))
        assert event.keys() - {"event", "time"} <= names <= explained.keys()
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)


def test_a_resumed_run_drops_a_line_that_was_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    for text, kept in (("a\nb\nc", "a\nb\n"), ("a\nb\n", "a\nb\n"), ("a", ""), ("", "")):
        path.write_text(text)
        drop_torn_line(path)
        assert path.read_text() == kept
    drop_torn_line(tmp_path / "none")
