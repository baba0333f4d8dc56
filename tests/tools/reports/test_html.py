"""tools.reports.html: the page of a run shows what its events say, loads nothing, and opens in a browser."""

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from html import unescape
from html.parser import HTMLParser

import pytest

from tests import commands
from tests.tools.reports.test_runlog import CHALLENGE, PRINTED, json_lines, make_events, make_log
from tools.common.cli import ROOT
from tools.reports import html

CHARTS = ("scores", "training-loss-by-time", "training-loss-by-tokens", "learning-rate", "ttt--score-so-far")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=10000 --dump-dom"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sketch.txt").write_text(make_log(), "utf-8")
    (tmp_path / "sketch.jsonl").write_text(json_lines(make_events()), "utf-8")
    return tmp_path


def page(*logs, out="page.html"):
    with redirect_stdout(io.StringIO()):
        html.main([*map(str, logs), "--out", out])
    with open(out, encoding="utf-8") as file:
        return file.read()


def charts(text):
    """The traces of each chart by the name of its place."""
    found = {}
    for match in re.finditer(r'Plotly\.newPlot\(\s*"chart-([\w-]+)",\s*(?=\[)', text):
        found[match[1]] = json.JSONDecoder().raw_decode(text[match.end() :])[0]
    return found


def cells(text):
    """The rows of all tables."""
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    return [[unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def body(text):
    return text[text.index("<body>") :]


def test_the_page_of_a_run_shows_what_its_events_say(folder):
    text = body(page("sketch.txt"))
    drawn = charts(text)
    assert drawn["training-loss-by-time"][0]["x"] == [7.661]
    assert drawn["training-loss-by-tokens"][0]["x"] == [10 * 4096 / 1e6]
    assert drawn["training-loss-by-tokens"][0]["y"] == [6.8938]
    rate, swa = drawn["learning-rate"]
    assert (rate["y"], swa["x"]) == ([1.0], [30])
    so_far, without = drawn["ttt--score-so-far"]
    assert (so_far["x"], so_far["y"], without["y"]) == ([50, 100], [2.90256, 3.070921], [3.07875962] * 2)
    assert drawn["scores"][0]["x"] == ["trained", "averaged", "roundtrip", "sliding", "TTT"]
    seconds = {
        trace["name"]: trace["x"] for trace in drawn["seconds--of-600-for-training-and-600-for-scoring"]
    }
    assert seconds["TTT"] == [0, 75.456, 0] and seconds["steps"] == [20, 0, 0]
    assert seconds["free"][1] == pytest.approx(600 - 7.853 - 29.142 - 75.456)
    rows = cells(text)
    assert ["sketch", "3.1111", "3.0831", "3.0885", "3.0788", "3.0709"] in rows
    assert ["NUM_LAYERS", "4"] in rows and not any(row[0] == "NUM_HEADS" for row in rows)
    assert "val_bpb 3.0709" in text and "no audit lies beside the log" in text


def test_the_page_loads_nothing_and_is_the_same_each_time(folder):
    text = page("sketch.txt")
    assert text == page("sketch.txt", out="again.html")

    class Loads(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("link", "img", "iframe", "base"), tag
            assert not {"src", "href", "data"} & {name for name, _ in attrs}, (tag, attrs)

    Loads().feed(body(text))
    assert not re.search(r"<script[^>]+src=", text)


def test_what_a_log_says_is_text_on_the_page(folder):
    bad = "<script>alert('x')</script> & \"more\""
    events = make_events()
    for event in events:
        if event["event"] == "settings":
            event["settings"]["DATA_PATH"] = bad
            event["changed"].append("DATA_PATH")
    events.append({"event": "error", "time": 1.0, "message": bad})
    (folder / "<b>run.jsonl").write_text(json_lines(events), "utf-8")
    text = body(page("<b>run.jsonl"))
    assert "<script>alert" not in text and "<b>run" not in text
    assert ["DATA_PATH", bad] in cells(text) and text.count("&lt;script&gt;alert(") == 2


def test_several_runs_are_shown_over_each_other(folder):
    (folder / "other.txt").write_text(make_log(PRINTED.replace("3.07092080", "3.06000000")), "utf-8")
    text = body(page("sketch.txt", "other.txt"))
    drawn = charts(text)
    assert [trace["name"] for trace in drawn["training-loss-by-time"]] == ["sketch", "other"]
    assert len({trace["line"]["color"] for trace in drawn["training-loss-by-time"]}) == 2
    assert [row[-1] for row in cells(text) if row[0] in ("sketch", "other")][:2] == ["3.0709", "3.0600"]
    assert "not in the log of other" in text  # a plain log has no learning rates


def test_runs_that_go_on_and_logs_of_the_challenge_are_shown_as_far_as_they_go(folder):
    events = [event for event in make_events() if event["event"] in ("settings", "machine", "step")]
    (folder / "going.jsonl").write_text(json_lines(events), "utf-8")
    text = body(page("going.jsonl"))
    assert "not scored: the run goes on or broke off" in text and "No stage has a score yet" in text
    assert "<p><b>TTT: score so far</b></p><p class=note>not in the log</p>" in text
    (folder / "challenge.txt").write_text(CHALLENGE, "utf-8")
    assert "val_bpb" in body(page("challenge.txt"))


def test_the_audit_beside_a_log_is_shown(folder):
    found = {"violations": [], "share": 0.034, "hashes": {}}
    found["stages"] = {"legal_ttt": {"val_bpb": 3.07, "checks": {"reads": 7, "positions": 12345}}}
    (folder / "sketch.audit.json").write_text(json.dumps(found))
    text = body(page("sketch.txt"))
    assert "no violation</span>, in 3.4% of the time of scoring" in text
    assert ["legal_ttt", "7", "12,345"] in cells(text)
    (folder / "sketch.audit.json").write_text(json.dumps(found | {"violations": ["read <ahead>"]}))
    assert "<span class=bad>read &lt;ahead&gt;</span>" in body(page("sketch.txt"))
    (folder / "sketch.audit.json").write_text("{}")
    assert "sketch.audit.json: no audit" in commands.fails(html.main, "sketch.txt")


def test_bad_input_ends_in_one_line_and_writes_nothing(folder, monkeypatch):
    before = sorted(folder.iterdir())
    assert "cannot be read" in commands.fails(html.main, "absent.txt")
    assert "must end in .html" in commands.fails(html.main, "sketch.txt", "--out", "a.txt")
    assert "there is no folder" in commands.fails(html.main, "sketch.txt", "--out", "b/a.html")
    assert "at most 6" in commands.fails(html.main, *["sketch.txt"] * 7)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setattr(html, "find_spec", lambda name: None)
    assert "pip install -r tools/requirements.txt" in commands.fails(html.main, "sketch.txt")
    assert sorted(folder.iterdir()) == before


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium here: apt-get install chromium")
def test_a_browser_draws_all_charts(tmp_path):
    page(ROOT / "logs/demo.txt", out=str(tmp_path / "demo.html"))
    flags = [*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    found = subprocess.run(
        [BROWSER, *flags, f"file://{tmp_path / 'demo.html'}"], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0 and not re.search(r"CONSOLE.*(Uncaught|Error)", found.stderr), found.stderr
    for name in CHARTS:
        place = found.stdout[found.stdout.index(f'id="chart-{name}"') :]
        drawn = place[: place.index("</svg>")]
        assert 'class="main-svg"' in drawn and "<path" in drawn, name
