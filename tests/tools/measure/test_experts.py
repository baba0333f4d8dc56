"""tools/measure/experts.py: experts alone, kept, and mixed."""

import json
from contextlib import chdir

import pytest

import train_gpt as T
from tests import tiny
from tests.commands import fails
from tools.measure import experts

pytestmark = pytest.mark.slow
EXPERTS = "lr=0;lr=0.02;lr=0.05,chunk=64"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny run with these experts."""
    folder = tmp_path_factory.mktemp("experts")
    tiny.make_data(folder)
    result = tiny.run(folder, EVAL_MODE="streaming", TTT_CHUNK_TOKENS=256, TTT_EXPERTS=EXPERTS)
    assert result.status == 0, result.err
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    for name in T.FIELDS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOKENIZER_PATH", "tokenizer.model")
    with chdir(folder):
        yield folder


WHAT = ["logs/tiny.bin", "data/fineweb_val_000000.bin"]


def test_experts_and_their_mixture_score_as_in_a_run(here, monkeypatch, capsys):
    """And what has read is not run again."""
    arguments = [
        *WHAT,
        "--experts",
        EXPERTS,
        "--keep",
        "kept",
        "--json",
        "found.json",
        "--mix",
        "0,1,2",
        "--mix",
        "1",
    ]
    experts.main(arguments)
    found, events = json.loads((here / "found.json").read_text()), (here / "logs/tiny.jsonl").read_text()
    logged = [event for event in map(json.loads, events.splitlines()) if event["event"] == "expert"]
    assert (
        [one["expert"] for one in found["experts"]] == [one["expert"] for one in logged] == EXPERTS.split(";")
    )
    for one, other in zip(found["experts"], logged, strict=True):
        assert one["bpb"] == pytest.approx(other["bpb"], rel=1e-6)
        assert len(other["weights"]) == 50
    assert all(
        sum(part) == pytest.approx(1) for part in zip(*(one["weights"] for one in logged), strict=True)
    )
    final = json.loads(next(line for line in reversed(events.splitlines()) if '"legal_ttt"' in line))
    whole, alone = found["mixtures"]
    assert whole["bpb"] == pytest.approx(final["val_bpb"], rel=1e-6)
    assert alone["bpb"] == pytest.approx(found["experts"][1]["bpb"], rel=1e-6)
    assert "| 0,1,2      |   0.2 |       100 |     0 |" in capsys.readouterr().out
    monkeypatch.setattr(experts, "read_alone", None)
    experts.main(arguments)
    again = json.loads((here / "found.json").read_text())
    for row in found["mixtures"] + again["mixtures"]:
        assert row.pop("seconds") >= 0
    assert again == found


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([*WHAT, "--experts", "lr=0", "--mix", "0,1"], "--mix: 1 is no number of an expert"),
        ([*WHAT, "--experts", "rate=0"], "TTT_EXPERTS: 'rate' is none of"),
        ([*WHAT, "--experts", "lr=0", "--json", "none/x.json"], "there is no folder none"),
        (["none.bin", WHAT[1], "--experts", "lr=0"], "none.bin: No such file"),
    ],
)
def test_bad_arguments_are_told_in_one_line(here, arguments, said):
    assert said in fails(experts.main, *arguments)


def test_a_cache_is_mixed_in_as_in_a_run(here, capsys):
    only = dict(EVAL_ONLY=1, EVAL_MODE="streaming", TTT_CHUNK_TOKENS=256, TTT_EXPERTS="lr=0", TTT_CACHE=3)
    result = tiny.run(here, ARTIFACT_PATH="logs/tiny.bin", **only)
    assert result.status == 0, result.err
    experts.main([*WHAT, "--experts", "lr=0", "--cache", "0", "3", "--json", "found.json"])
    plain, mixed = json.loads((here / "found.json").read_text())["mixtures"]
    assert (plain["cache"], mixed["cache"], len(mixed["weights"])) == (0, 3, 4)
    final = float(result.out.rsplit("val_bpb:", 1)[1].split()[0])
    assert mixed["bpb"] == pytest.approx(final, rel=1e-6) and mixed["bpb"] < plain["bpb"]
    assert "| 0          |   0.2 |       100 |     3 |" in capsys.readouterr().out
    assert "TTT_CACHE='17'" in fails(experts.main, *WHAT, "--experts", "lr=0", "--cache", "17")
