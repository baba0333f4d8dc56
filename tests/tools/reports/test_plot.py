"""tools.reports.plot: what is drawn of a run is what its events say; one PNG holds one run or several."""

import io
from contextlib import redirect_stdout

import numpy as np
import pytest

from tests import commands
from tests.tools.reports.test_runlog import CHALLENGE, PRINTED, SOURCE, json_lines, make_events, make_log
from tools.reports import curves, plot
from tools.reports.runlog import events_of_text

CODE = len(SOURCE.encode())


def drawn(text: str | None = None, events: list[dict] | None = None) -> dict:
    return curves.curves(events_of_text(text) if events is None else events)


def steps(*events: tuple[int, float, float]) -> list[dict]:
    """Events of steps (number, loss, ms)."""
    return [
        {"event": "step", "step": step, "train_loss": loss, "train_time": ms} for step, loss, ms in events
    ]


def test_what_is_drawn_of_a_run_is_what_its_events_say():
    run = drawn(events=make_events())
    assert run["loss_by_time"].tolist() == [[7.661, 6.8938]]
    assert run["loss_by_tokens"].tolist() == [[10 * 4096, 6.8938]]
    assert run["multiplier"].tolist() == [[10, 1.0]] and run["moments"] == {"SWA": 30} and run["steps"] == 40
    assert run["validations"].tolist() == [[0, 3.8816], [40, 3.1111]]
    assert [*run["scores"].items()] == [
        ("trained", 3.1111),
        ("averaged", 3.08305629),
        ("roundtrip", 3.08852676),
        ("sliding", 3.07875962),
        ("TTT", 3.0709208),
    ]
    assert run["ttt"].tolist() == [[0.5, 2.90256], [1, 3.070921]] and run["without_ttt"] == 3.07875962
    assert run["training"] == {"steps": 20, "averages, calibration": pytest.approx(18.106)}
    assert run["scoring"] == {"roundtrip": 7.853, "sliding": 29.142, "TTT": 75.456}
    assert run["outside"] == {"warm-up": 24.2, "score of averaged": 5, "quantizing": 1.5, "compiling": 61.3}
    assert run["size"] == {"code": CODE, "integers' code": 2923801 - CODE - 1000, "side information": 1000}


def test_a_text_log_draws_the_same_but_for_what_only_events_tell():
    run, plain = drawn(events=make_events()), drawn(make_log())
    assert not len(plain["multiplier"]) and plain["size"] == {"code": CODE, "artifact": 2923801 - CODE}
    for name in run.keys() - {"multiplier", "size"}:
        np.testing.assert_equal(plain[name], run[name])


def test_a_log_of_the_challenge_is_drawn_as_far_as_it_goes():
    run = drawn(CHALLENGE)
    assert run["loss_by_tokens"].tolist() == [[500 * 786432, 2.4012]] and run["loss_by_time"].tolist() == [
        [41.733, 2.4012]
    ]
    assert run["scores"] == {"trained": 1.1376, "roundtrip": 1.1449, "sliding": 1.1214, "TTT": 1.1177}
    assert (
        run["training"] == {"steps": 600.031}
        and run["scoring"] == {"roundtrip": 6, "TTT": 478.5}
        and not run["outside"]
    )
    assert run["size"] == {"code": 93038, "artifact": 15851372} and run["without_ttt"] == 1.1214
    other = drawn(
        CHALLENGE.replace("train_batch_tokens", "batch")
        .replace("Code size", "Size")
        .replace("final_int6_", "final_int8_zlib_")
    )
    assert not len(other["loss_by_tokens"]) and other["size"] == {"code and artifact": 15944410}
    assert other["scores"] == run["scores"]


def test_a_run_without_ttt_has_no_running_score():
    run = drawn(make_log(PRINTED[: PRINTED.index("ttt_chunk")]))
    assert not len(run["ttt"]) and [*run["scores"]][-1] == "sliding" and "TTT" not in run["scoring"]


def test_a_run_that_goes_on_is_drawn_and_numbers_that_are_none_are_left_out():
    run = drawn(events=steps((1, 7.0, 100), (2, float("nan"), 200), (3, 6.0, None)))
    assert (
        run["loss_by_time"].tolist() == [[0.1, 7.0]]
        and not run["scores"]
        and run["training"] == {"steps": 0.2}
    )
    assert curves.is_empty(drawn("prose\n")) and not curves.is_empty(run)


def run_plot(*arguments) -> str:
    with redirect_stdout(io.StringIO()) as out:
        plot.main([*map(str, arguments)])
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run as text, one as events that goes on, one of the challenge."""
    folder = tmp_path_factory.mktemp("logs")
    (folder / "text.txt").write_text(make_log())
    (folder / "events.jsonl").write_text(json_lines(make_events()[:8]) + '{"event": "st')
    (folder / "challenge.log").write_text(CHALLENGE)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("names", [["text.txt"], ["text.txt", "events.jsonl", "challenge.log"]])
def test_one_png_of_any_number_of_logs_always_the_same(folder, names):
    out = folder / f"{len(names)}.png"
    assert run_plot(*[folder / name for name in names], "--out", out).startswith(f"wrote {out}, ")
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and 20_000 < len(data) < 200_000
    assert int.from_bytes(data[16:20]) == 1400 and 900 < int.from_bytes(data[20:24]) < 1200  # pixels
    if len(names) == 1:
        run_plot(folder / names[0], "--out", out)
        assert out.read_bytes() == data


def test_bad_input_ends_in_one_line_and_writes_nothing(folder, tmp_path, monkeypatch):
    empty, good, out = folder / "empty.txt", folder / "text.txt", tmp_path / "a.png"
    empty.write_text("prose\n")

    def fails(*arguments) -> str:
        line = commands.fails(plot.main, *arguments)
        assert not [*tmp_path.iterdir()]
        return line

    assert f"{empty}: nothing to show" in fails(good, empty, "--out", out)
    assert "cannot be read" in fails(folder / "absent.txt", "--out", out)
    assert "must end in .png" in fails(good, "--out", tmp_path / "a.txt")
    assert "there is no folder" in fails(good, "--out", tmp_path / "b/a.png")
    assert "given twice" in fails(good, good, "--out", out)
    assert "at most 6" in fails(*[good] * 7, "--out", out)
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert "pip install -r tools/requirements.txt" in fails(good, "--out", out)


def test_looks_can_be_told_apart_in_colour_and_in_grey():
    for looks in zip(*curves.LOOKS, strict=False):
        assert len({*looks}) == len(curves.LOOKS)
    parts = [*curves.PARTS]
    for panel in (parts[: parts.index("code")] + ["free"], parts[parts.index("code") :]):
        assert len({curves.PARTS[part] for part in panel}) == len(panel)
