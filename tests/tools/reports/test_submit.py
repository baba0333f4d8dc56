"""tools.reports.submit: three runs become a submission's folder, or all that is wrong with them is told."""

import hashlib
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest

import train_gpt
from tests import tiny
from tests.commands import error_of
from tools.reports import submit
from tools.reports.runlog import SEPARATOR, latest, read_events

SOURCE = Path(train_gpt.__file__).read_text("utf-8")
SEEDS = [7, 42, 1337]
LOGS = [f"logs/run{seed}.txt" for seed in SEEDS]
WHO = ["--name", "A sketch: 1/2", "--author", "Ada", "--github-id", "ada", "--date", "2025-03-01"]
FOLDER = Path("records/track_10min_16mb/2025-03-01_A_sketch_1_2")
STAGES = ["final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt"]


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory):
    """A folder with what three runs with different seeds left in logs/."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.make_data(folder)
    for seed in SEEDS:
        assert tiny.run(folder, SEED=seed, RUN_ID=f"run{seed}").status == 0
    return folder


@pytest.fixture
def folder(real_runs, tmp_path, monkeypatch):
    """The current folder, with a copy of those runs."""
    shutil.copytree(real_runs / "logs", tmp_path / "logs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder="."):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def refused(*arguments):
    """The lines of the reasons; nothing is written."""
    before = files()
    first, *reasons = error_of(submit.main, *arguments).split("\n")
    assert files() == before
    return [line for line in reasons if not line.startswith("--non-record writes")] or [first]


def edit(path, kind="", source=SOURCE, **changed):
    """Write logs/X.jsonl anew with values of its last event of a kind, or of the kind at its end, changed;
    settings by their names in capitals. logs/X.txt stays, but for its source.
    """
    events = read_events(Path(path))
    event = latest(events, kind)
    if kind and not event:
        events.append({"event": kind, "time": 1.0} | changed)
    event.update({name: value for name, value in changed.items() if name.islower()})
    settings = latest(events, "settings")
    settings["settings"] |= {name: value for name, value in changed.items() if name.isupper()}
    settings |= {
        "source_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "code_bytes": len(source.encode()),
    }
    Path(path).with_suffix(".jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    old = Path(path).read_text("utf-8")
    Path(path).write_text(source + old[old.index(SEPARATOR) :], "utf-8")


def audit(path, violations=(), **hashes):
    """Write the audit beside a log."""
    actual = {
        "code": hashlib.sha256(SOURCE.encode()).hexdigest(),
        "artifact": hashlib.sha256(Path(path).with_suffix(".bin").read_bytes()).hexdigest(),
    }
    found = {"violations": list(violations), "hashes": actual | hashes, "stages": {"legal_ttt": {}}}
    Path(path).with_suffix(".audit.json").write_text(json.dumps(found | {"share": 0.03}))


def without_last_stage(path):
    edit(path)
    record = Path(path).with_suffix(".jsonl")
    record.write_text(
        "".join(line for line in record.read_text().splitlines(True) if '"legal_ttt"' not in line)
    )


def rows_of(readme, first):
    """Cells of the rows of the table whose first column has that title."""
    part = readme[readme.index(f"\n| {first} ") :]
    return [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in part.split("\n\n")[0].strip().split("\n")
    ]


def test_every_number_of_a_submission_is_the_logs(folder, capsys):
    submit.main([*LOGS, *WHO])
    s = json.loads((FOLDER / "submission.json").read_text("utf-8"))
    assert s["seeds"] == SEEDS and "non_record" not in s
    assert (s["name"], s["author"], s["github_id"], s["date"], s["track"]) == (
        "A sketch: 1/2",
        "Ada",
        "ada",
        "2025-03-01",
        "track_10min_16mb",
    )
    figures = []
    for path, seed in zip(LOGS, SEEDS, strict=False):
        events = read_events(Path(path))
        scores = {event["stage"]: event for event in events if event["event"] == "stage"}
        trained, size = latest(events, "trained"), latest(events, "size")
        expected = {
            "val_loss": scores["legal_ttt"]["val_loss"],
            "val_bpb": scores["legal_ttt"]["val_bpb"],
            "val_bpb_before_quantization": scores["averaged"]["val_bpb"],
            "val_bpb_after_quantization": scores["final_int6_roundtrip"]["val_bpb"],
            "steps": 3,
            "ms_per_step": trained["train_time"] / 3,
            "train_seconds": trained["with_calibration"] / 1000,
            "eval_seconds": sum(scores[stage]["eval_time"] for stage in STAGES) / 1000,
            "bytes_total": len(SOURCE.encode()) + Path(path).with_suffix(".bin").stat().st_size,
        }
        assert size["artifact_bytes"] + len(SOURCE.encode()) == expected["bytes_total"]
        found = s["seed_results"][str(seed)]
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=6e-4)
        assert found["val_bpb"] == round(expected["val_bpb"], 8) and found["log"] == f"train_seed{seed}.txt"
        figures.append(expected)
    for name in ("val_loss", "val_bpb"):
        values = [figure[name] for figure in figures]
        mean = sum(values) / 3
        assert len(set(values)) == 3 and s[name] == pytest.approx(mean, abs=1e-8)
        assert s[f"{name}_std"] == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in values) / 2))
    assert s["bytes_total"] == max(figure["bytes_total"] for figure in figures)
    assert (
        s["bytes_code"] == len(SOURCE.encode())
        and s["source_sha256"] == hashlib.sha256(SOURCE.encode()).hexdigest()
    )

    readme = (FOLDER / "README.md").read_text("utf-8")
    header, *rows = rows_of(readme, "seed")
    assert header[1:] == [
        "steps",
        "ms a step",
        "val_bpb before quantization",
        "after",
        "final val_loss",
        "final val_bpb",
        "bytes",
        "train s",
        "eval s",
    ]
    columns = [
        "steps",
        "ms_per_step",
        "val_bpb_before_quantization",
        "val_bpb_after_quantization",
        "val_loss",
        "val_bpb",
        "bytes_total",
        "train_seconds",
        "eval_seconds",
    ]
    table = [[figure[name] for name in columns] for figure in figures]
    means = [sum(column) / 3 for column in zip(*table, strict=False)]
    deviations = [
        math.sqrt(sum((value - mean) ** 2 for value in column) / 2)
        for column, mean in zip(zip(*table, strict=False), means, strict=False)
    ]
    assert [row[0] for row in rows[1:]] == [*map(str, SEEDS), "mean", "deviation"]
    for row, values in zip(rows[1:], [*table, means, deviations], strict=False):
        for cell, value in zip(row[1:], values, strict=False):
            digits = len(cell.partition(".")[2])
            assert float(cell.replace(",", "")) == pytest.approx(
                value, abs=0.501 * 10**-digits + 6e-4 * (digits < 4)
            )
    assert f"**val_bpb {s['val_bpb']:.5f}**, mean of 3 seeds" in readme and "Not a record" not in readme
    assert (
        capsys.readouterr().out
        == f"wrote {FOLDER}: val_bpb {s['val_bpb']:.4f} of 3 runs, {s['bytes_total']:,} bytes\n"
    )


def test_the_folder_has_source_requirements_and_all_that_the_runs_left(folder):
    for path in LOGS:
        edit(path)  # makes the .jsonl
        audit(path)
    submit.main([*LOGS, *WHO])
    made = files(FOLDER)
    assert made.pop("train_gpt.py") == SOURCE.encode()
    assert made.pop("requirements.txt") == Path(train_gpt.__file__).with_name("requirements.txt").read_bytes()
    assert made.pop("README.md") and made.pop("submission.json")
    assert made == {
        f"train_seed{seed}{suffix}": Path(f"logs/run{seed}{suffix}").read_bytes()
        for seed in SEEDS
        for suffix in (".txt", ".jsonl", ".audit.json")
    }
    assert {path.name for path in folder.rglob(".*")} == set() and len(files()) == len(files("logs")) + len(
        files(FOLDER)
    )


def test_its_commands_run_the_same_settings_and_it_names_no_place(folder):
    others = {"DATA_PATH": "/home/ada/my shards", "ARTIFACT_PATH": "/home/ada/a.bin", "VE_LAYERS": ""}
    for path in LOGS:
        edit(path, "settings", changed=[*tiny.SETTINGS, *others, "SEED"], **others)
    submit.main([*LOGS, *WHO])
    readme = (FOLDER / "README.md").read_text("utf-8")
    assert "/home" not in readme and "/home" not in (FOLDER / "submission.json").read_text("utf-8")
    assert (
        json.loads((FOLDER / "submission.json").read_text("utf-8"))["data"]
        == "my shards, vocabulary of 512 tokens"
    )
    commands = [line for line in readme.split("\n") if "torchrun" in line]
    for command, path in zip(commands, LOGS, strict=True):
        words = shlex.split(command)
        assert words[-4:] == ["torchrun", "--standalone", "--nproc_per_node=1", "train_gpt.py"]
        again = train_gpt.parse_settings(dict(word.split("=", 1) for word in words[:-4]))
        logged = latest(read_events(Path(path)), "settings")["settings"]
        names = [name for name in train_gpt.FIELDS if name != "RUN_ID" and not name.endswith("_PATH")]
        assert {name: train_gpt.show(getattr(again, name.lower())) for name in names} == {
            name: logged[name] for name in names
        }
    assert {row[0].strip("`"): row[1].strip("`") for row in rows_of(readme, "setting")[2:]} == {
        name: "empty" if value == "" else str(value)
        for name, value in (tiny.SETTINGS | others).items()
        if name != "RUN_ID" and not name.endswith("_PATH")
    }


LAST = LOGS[2]


@pytest.mark.parametrize(
    "spoil, told",
    [
        (
            lambda: edit(LAST, source=SOURCE + "# other\n"),
            "logs/run1337.txt: of another train_gpt.py than logs/run7.txt",
        ),
        (
            lambda: edit(LAST, TTT_LR="0.01"),
            "logs/run1337.txt: TTT_LR=0.01, but logs/run7.txt has TTT_LR=0.002",
        ),
        (lambda: edit(LAST, SEED="42"), "logs/run1337.txt: SEED=42, as in logs/run42.txt"),
        (
            lambda: edit(LAST, "machine", hardware="NVIDIA H200"),
            "logs/run1337.txt: hardware: 1 x NVIDIA H200, torch",
        ),
        (lambda: edit(LAST, "machine", torch="2.9.0"), ", torch 2.9.0, Python"),
        (
            lambda: edit(LAST, "data", validation_tokens=9),
            "logs/run1337.txt: validation tokens: 9, but 1500 in logs/run7.txt",
        ),
        (
            lambda: audit(LAST, code="0"),
            "logs/run1337.txt: the audit beside it is of another code (SHA-256 0, not ",
        ),
        (
            lambda: audit(LAST, artifact="0"),
            "logs/run1337.txt: the audit beside it is of another artifact (SHA-256 0, not ",
        ),
        (
            lambda: Path("logs/run1337.audit.json").write_text(
                '{"violations": [], "hashes": {}, "stages": {}}'
            ),
            "logs/run1337.audit.json: no audit of",
        ),
        (
            lambda: without_last_stage(LAST),
            "logs/run1337.txt: has no score of legal_ttt, so the run did not finish",
        ),
        (
            lambda: edit(LAST, "stage", val_bpb=1.0),
            "logs/run1337.txt: lacks the last score of the .jsonl beside it",
        ),
        (
            lambda: edit(LAST) or Path(LAST).unlink(),
            "logs/run1337.txt: the source is in the .txt of the run, which is not",
        ),
        (
            lambda: [path.unlink() for path in Path("logs").glob("run1337.*")],
            "logs/run1337.txt: cannot be read (No such file",
        ),
    ],
)
def test_runs_that_are_not_of_one_submission_are_refused_even_as_non_record(folder, spoil, told):
    spoil()
    for extra in ([], ["--non-record"]):
        (reason,) = refused(*LOGS, *WHO, *extra)
        assert told in reason
    assert not Path("records").exists()


@pytest.mark.parametrize(
    "spoil, told",
    [
        (
            lambda: edit(LAST, "trained", with_calibration=600001.0),
            r"run1337.txt: training with calibration took 600\.001 s, 0\.001 over the limit of 600",
        ),
        (
            lambda: edit(LAST, "stage", eval_time=700000.0),
            r"run1337.txt: scoring took 700\.\d+ s, 100\.\d+ over the limit of 600",
        ),
        (
            lambda: edit(LAST, "size", artifact_bytes=16000001 - len(SOURCE.encode())),
            "run1337.txt: code and artifact took 16,000,001 bytes, 1 over the limit of 16,000,000",
        ),
        (lambda: audit(LAST, ["read /home/ada/val.bin"]), "run1337.txt: violations that its audit names: 1"),
        (
            lambda: edit(LAST, "error", message="/home/ada: disk full"),
            "run1337.txt: the run ended in an error that it names",
        ),
    ],
)
def test_what_keeps_a_run_from_being_a_record_is_refused_or_stated(folder, spoil, told):
    spoil()
    (reason,) = refused(*LOGS, *WHO)
    assert re.fullmatch(told, reason)
    submit.main([*LOGS, *WHO, "--non-record"])
    made = Path("records/track_non_record_16mb", FOLDER.name)
    assert json.loads((made / "submission.json").read_text("utf-8"))["non_record"] == [reason]
    assert f"\n## Not a record\n\n- {reason}\n\n" in (made / "README.md").read_text("utf-8")
    assert not any(b"/home" in (made / name).read_bytes() for name in submit.DESCRIPTIONS)


def test_what_is_exactly_at_the_limits_is_a_record(folder):
    events = read_events(Path(LAST))
    before = sum(
        event["eval_time"] for event in events if event["event"] == "stage" and event["stage"] in STAGES[:2]
    )
    edit(LAST, "trained", with_calibration=600000.0)
    edit(LAST, "size", artifact_bytes=16000000 - len(SOURCE.encode()))
    edit(LAST, "stage", eval_time=600000.0 - before)
    submit.main([*LOGS, *WHO])
    s = json.loads((FOLDER / "submission.json").read_text("utf-8"))
    assert s["bytes_total"] == 16000000
    assert s["seed_results"]["1337"]["train_seconds"] == s["seed_results"]["1337"]["eval_seconds"] == 600


def test_an_error_that_was_got_over_is_no_reason(folder):
    edit(LAST)
    record = Path(LAST).with_suffix(".jsonl")
    record.write_text(
        json.dumps({"event": "error", "time": 1.0, "message": "killed"}) + "\n" + record.read_text()
    )
    submit.main([*LOGS, *WHO])


def test_a_missing_audit_is_told_where_the_run_was_to_make_one(folder):
    for path in LOGS:
        edit(path, AUDIT="1")
        audit(path)
    Path("logs/run42.audit.json").unlink()
    assert refused(*LOGS, *WHO) == ["run42.txt: AUDIT=1, but run42.audit.json is not beside it"]
    audit(LOGS[1])
    submit.main([*LOGS, *WHO])


def test_all_reasons_are_told_at_once(folder):
    edit(LOGS[1], "trained", with_calibration=601000.0)
    edit(LOGS[1], TTT_LR="0.01")
    assert refused(*LOGS[:2], "logs/none.txt", "--name", "sketch") == [
        "logs/none.txt: cannot be read (No such file or directory)",
        "logs/run42.txt: TTT_LR=0.01, but logs/run7.txt has TTT_LR=0.002",
        "--author is missing",
        "--github-id is missing",
        "run42.txt: training with calibration took 601.0 s, 1.0 over the limit of 600",
    ]
    assert refused(LOGS[0], "--name", "sketch") == [
        "--author is missing",
        "--github-id is missing",
        "1 seed, where 3 or more are needed",
    ]


@pytest.mark.parametrize(
    "option, value, told",
    [
        ("--date", "yesterday", "--date yesterday: no date"),
        ("--track", "../x", "--track ../x: name a folder"),
        ("--name", "../..", "has no letter or digit"),
    ],
)
def test_arguments_that_make_no_folder_are_refused(folder, option, value, told):
    assert told in refused(*LOGS, *WHO, option, value)[0]


def test_the_same_runs_may_be_described_anew_but_others_are_kept(folder):
    submit.main([*LOGS, *WHO])
    submit.main([*LOGS, *WHO, "--blurb", "Better words."])
    assert "Better words." in (FOLDER / "README.md").read_text("utf-8")
    assert [path.name for path in FOLDER.parent.iterdir()] == [FOLDER.name]
    kept = files("logs")
    edit(LAST, "stage", eval_time=1.0)
    assert (
        "is there already, of another submission (train_seed1337.jsonl differs); give another --name"
        in refused(*LOGS, *WHO)[0]
    )
    shutil.rmtree("logs")
    Path("logs").mkdir()
    for name, data in kept.items():
        Path("logs", name).write_bytes(data)
    (FOLDER / "notes.txt").write_text("mine")
    assert "(notes.txt differs)" in refused(*LOGS, *WHO)[0]


@pytest.mark.parametrize("method, calls", [("write_bytes", 5), ("rename", 0), ("rename", 1)])
def test_a_failed_write_leaves_what_was_there(folder, monkeypatch, method, calls):
    if method == "rename":
        submit.main([*LOGS, *WHO])
    true, count = getattr(Path, method), 0

    def fail(self, *arguments):
        nonlocal count
        count += 1
        if count == calls + 1:
            raise OSError("disk full")
        return true(self, *arguments)

    monkeypatch.setattr(Path, method, fail)
    assert refused(*LOGS, *WHO, "--blurb", "Better words.") == ["disk full"]
    assert count > calls


def test_one_runs_submission_json_names_its_log_and_begins_with_a_note(folder, monkeypatch):
    arguments = [
        LOGS[0],
        "--name",
        "Sketch",
        "--data",
        "a  sketch",
        "--non-record",
        "--note",
        "A demo, not an entry.",
        "--only-json",
        "results/submission.json",
    ]
    submit.main(arguments)
    s = json.loads(Path("results/submission.json").read_text("utf-8"))
    assert s["seed_results"]["7"]["log"] == "../logs/run7.txt"
    assert [*s.items()][0] == ("note", "A demo, not an entry.")
    assert s["source_sha256"] == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert (
        s["val_bpb"] == s["seed_results"]["7"]["val_bpb"]
        and s["val_bpb_std"] is None
        and s["data"] == "a sketch"
    )
    assert s["non_record"] == [
        "--author is missing",
        "--github-id is missing",
        "1 seed, where 3 or more are needed",
    ]
    assert (
        s["blurb"] == "3 steps of 512 tokens, weights quantized by gptq and entropy-coded, "
        "score-first test-time training"
    )
    assert [path.name for path in Path("results").iterdir()] == ["submission.json"]

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    assert refused(*arguments) == ["disk full"]
