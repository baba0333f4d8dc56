"""tools/measure/bench_eval.py: ways to score, side by side, on the same weights and tokens."""

import json
from contextlib import chdir

import pytest

import train_gpt as T
from tests import tiny
from tests.commands import fails
from tools.measure import bench_eval

pytestmark = pytest.mark.slow

ROWS = [
    "TTT_ENABLED=0",
    "EVAL_MODE=streaming TTT_EPOCHS=1 TTT_ENTROPY_ADAPT=0 TTT_DECAY=0.005 TTT_ENABLED=0",
    "TTT_CHUNK_TOKENS=256",
    "EVAL_MODE=streaming TTT_EPOCHS=1 TTT_ENTROPY_ADAPT=0 TTT_DECAY=0.005 TTT_CHUNK_TOKENS=64 TTT_LR=0.01",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny run: logs/tiny.bin, logs/tiny.txt and its data."""
    folder = tmp_path_factory.mktemp("bench_eval")
    tiny.make_data(folder)
    result = tiny.run(folder)
    assert result.status == 0, result.err
    return folder


def run(folder, monkeypatch, *arguments, rows=ROWS):
    """The figures, and what was printed."""
    for name in T.FIELDS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOKENIZER_PATH", "tokenizer.model")
    with chdir(folder):
        bench_eval.main(
            [
                "logs/tiny.bin",
                "data/fineweb_val_000000.bin",
                "--json",
                "found.json",
                *arguments,
                *(word for row in rows for word in ("--row", row)),
            ]
        )
        return json.loads((folder / "found.json").read_text())


def test_it_scores_as_the_run_did(folder, monkeypatch, capsys):
    log = (folder / "logs/tiny.txt").read_text()
    found = run(folder, monkeypatch, rows=["TTT_ENABLED=0", ""])["rows"]
    assert [row["stage"] for row in found] == ["final_int6_sliding_window", "legal_ttt"]
    for row in found:
        assert f"{row['stage']}_exact val_loss:{row['val_loss']:.8f} val_bpb:{row['val_bpb']:.8f}" in log
        assert row["tokens"] == 1499 and len(row["seconds"]) == 1


def test_the_table_shows_each_way_with_the_settings_it_depends_on(folder, monkeypatch, capsys):
    found = run(folder, monkeypatch, "--tokens", "700", "--repeat", "2")
    text = capsys.readouterr().out
    assert [row["mode"] for row in found["rows"]] == [
        "sliding",
        "streaming",
        "sliding + TTT",
        "streaming + TTT",
    ]
    assert {row["tokens"] for row in found["rows"]} == {700}
    assert all(len(row["seconds"]) == 2 and row["val_bpb"] > 0 for row in found["rows"])
    assert found["rows"][0]["settings"] == "EVAL_STRIDE=16 EVAL_SEQ_LEN=32"
    assert found["rows"][1]["settings"] == "EVAL_SEQ_LEN=32"
    assert (
        "TTT_CHUNK_TOKENS=64" in found["rows"][3]["settings"]
        and "TTT_LR=0.01" in found["rows"][3]["settings"]
    )
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 5
    for row, line in zip(found["rows"], lines[1:], strict=False):
        assert row["mode"] in line and f"{row['val_bpb']:.5f}" in line
    again = run(folder, monkeypatch, "--tokens", "700")  # each row starts from the file's weights
    assert [row["val_bpb"] for row in again["rows"]] == [row["val_bpb"] for row in found["rows"]]


@pytest.mark.parametrize(
    "arguments, rows, said",
    [
        (["--tokens", "0"], [], "--tokens"),
        (["--repeat", "x"], [], "--repeat"),
        (["--json", "nowhere/found.json"], [], "nowhere/found.json: there is no folder nowhere"),
        ([], ["TTT_LRR=1"], "TTT_LRR is no setting"),
        ([], ["TTT_LR=fast"], "TTT_LR='fast'"),
        ([], ["NUM_LAYERS=3"], "NUM_LAYERS=3, but the artifact has 2"),
    ],
)
def test_what_makes_no_sense_is_named(folder, monkeypatch, capsys, arguments, rows, said):
    with pytest.raises(SystemExit) as failure:
        run(folder, monkeypatch, *arguments, rows=rows)
    text = capsys.readouterr().err
    assert failure.value.code == 2 and text.startswith("error: ") and said in text
    assert text.strip().count("\n") == 0


def test_other_files_are_refused(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENIZER_PATH", str(folder / "tokenizer.model"))
    (tmp_path / "no.bin").write_bytes(b"GPT16MB2 but no more")
    shard = str(folder / "data/fineweb_val_000000.bin")
    for arguments in (
        [str(tmp_path / "no.bin"), shard],
        [str(folder / "logs/tiny.bin"), str(tmp_path / "no.bin")],
        [str(folder / "missing.bin"), shard],
    ):
        fails(bench_eval.main, *arguments)
