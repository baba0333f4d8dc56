"""tools.reports.runlog: what a log says of its run, whether as JSON lines, as this program's lines, or as
the challenge's.
"""

import hashlib
import json
import math
import subprocess
from pathlib import Path

import pytest

import train_gpt
from tests import tiny
from tools.reports.runlog import Stage, events_of_text, final_score, latest, parse_log, read_events, read_log
from train_gpt import FIELDS, RunError, show

ROOT = Path(train_gpt.__file__).resolve().parent
SOURCE = Path(train_gpt.__file__).read_text("utf-8")


def committed(path):
    """The text of a file of this project as it was committed, if it was: `make demo` writes its logs anew."""
    command = ["git", "show", f"HEAD:./{path}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return found.stdout if found.returncode == 0 else (ROOT / path).read_text("utf-8")


CHANGED = {
    "RUN_ID": "sketch",
    "SEED": "7",
    "NUM_LAYERS": "4",
    "VE_LAYERS": "2,3",
    "TRAIN_BATCH_TOKENS": "4096",
    "EVAL_STRIDE": "32",
    "DATA_PATH": "/a folder/shards",
    "ARTIFACT_PATH": "/a folder/sketch.bin",
}
PRINTED = """\
machine processes:8 hardware:NVIDIA H100 80GB HBM3 torch:2.9.1+cu128 \
python:3.12.3 hooks:watch,audit
data parameters:3327044 validation_tokens:120001 training_tokens:3967231
warming_up left:17300
warm_up reserve:10337 took:24.2
step:0/20000 val_loss:6.9310 val_bpb:3.8816 train_time:0ms step_avg:0.00ms
step:10/20000 train_loss:6.8938 train_time:7661ms step_avg:766.09ms tokens/s:5347 memory:687MiB left:24s
swa step:30
progress: training 72%, 8 s left
step:40/20000 val_loss:5.5553 val_bpb:3.1111 train_time:20000ms step_avg:500.00ms
average average:raw holdout_loss:5.558981
average average:ema holdout_loss:5.510468
average average:swa holdout_loss:5.597565
chosen average:ema
trained steps:40 train_time:20000 with_calibration:38106 memory:687
averaged eval_time:5000ms, peak memory 687 MiB
averaged_exact val_loss:5.50527908 val_bpb:3.08305629
quantized knob:1 took:1.5
Total submission size int+rans: 2923801 bytes
no_graphs fault:CUDA error: operation not permitted
compiled took:61.3 graphs:False
final_int6_roundtrip eval_time:7853ms, peak memory 1687 MiB
final_int6_roundtrip_exact val_loss:5.51504779 val_bpb:3.08852676
final_int6_sliding_window eval_time:29142ms, peak memory 1702 MiB
final_int6_sliding_window_exact val_loss:5.49760670 val_bpb:3.07875962
ttt_chunk [1/2] bpb=2.902560 time=2.8s
ttt_chunk [2/2] bpb=3.070921 time=75.5s
legal_ttt eval_time:75456ms, peak memory 2687 MiB
legal_ttt_exact val_loss:5.48361088 val_bpb:3.07092080
"""
CHALLENGE = """\
This is the log of our submission; scores are exact.
model_params:26928220
world_size:8 grad_accum_steps:1
train_batch_tokens:786432 train_seq_len:2048 iterations:20000
seed:1337
step:0/20000 val_loss:6.9310 val_bpb:4.1049 train_time:0ms step_avg:0.01ms
step:500/20000 train_loss:2.4012 train_time:41733ms step_avg:83.47ms
step:1000/20000 train_loss:nan train_time:83466ms step_avg:83.47ms
swa:start step:6450
late_qat:enabled step:6680 scale:0.1499
step:7189/20000 val_loss:1.9208 val_bpb:1.1376 train_time:600031ms step_avg:83.47ms
stopping_early: wallclock_cap train_time:600031ms step:7189/20000
Code size: 93038 bytes
Total submission size int6+lzma: 15944410 bytes
final_int6_roundtrip val_loss:1.9331 val_bpb:1.1449 eval_time:6000ms
final_int6_roundtrip_exact val_loss:1.93312345 val_bpb:1.14490000
final_int6_sliding_window_exact val_loss:1.89340000 val_bpb:1.12140000
  ttt_chunk [1893/1893] bpb=1.117700 time=478.0s
legal_ttt val_loss:1.8871 val_bpb:1.1177 eval_time:478500ms
legal_ttt_exact val_loss:1.88712345 val_bpb:1.11770000
"""


def make_log(printed: str = PRINTED, source: str = SOURCE, **changed: str) -> str:
    """A log as train_gpt.py writes it."""
    values = {name: show(f.default) for name, f in FIELDS.items()} | CHANGED | changed
    settings = " ".join(f"{name}={value}" for name, value in values.items())
    return f"{source}\n{'=' * 100}\nsettings: {settings}\n{printed}"


def make_events() -> list[dict]:
    """The events of a log, with those values that only the .jsonl has."""
    more = {"settings": {"changed": list(CHANGED)}, "step": {"multiplier": 1.0}, "size": {"side_bytes": 1000}}
    return [
        event | more.get(event["event"], {}) | {"time": 1.5 * i}
        for i, event in enumerate(events_of_text(make_log()))
    ]


def json_lines(events: list[dict]) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


def write_run(folder: Path, events: list[dict]) -> Path:
    """A run as a .jsonl, whose events count, and a .txt that tells nothing but the source."""
    (folder / "sketch.jsonl").write_text(json_lines(events))
    (folder / "sketch.txt").write_text(make_log("these lines are prose\n"), "utf-8")
    return folder / "sketch.txt"


def test_each_figure_is_read_from_its_line():
    log = parse_log(make_log(), "sketch")
    assert log.source == SOURCE and log.bytes_code == len(SOURCE.encode())
    assert log.source_sha256 == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert log.hardware == "8 x NVIDIA H100 80GB HBM3"
    assert (log.torch, log.python) == ("2.9.1+cu128", "3.12.3")
    assert (log.parameters, log.steps, log.bytes_total) == (3327044, 40, 2923801)
    assert log.holdout_losses == {"raw": 5.558981, "ema": 5.510468, "swa": 5.597565} and log.chosen == "ema"
    assert log.stages == {
        "training": Stage(5.5553, 3.1111, 20.0, 687),
        "averaged": Stage(5.50527908, 3.08305629, 18.106, 687),
        "roundtrip": Stage(5.51504779, 3.08852676, 7.853, 1687),
        "sliding": Stage(5.4976067, 3.07875962, 29.142, 1702),
        "ttt": Stage(5.48361088, 3.0709208, 75.456, 2687),
    }
    assert log.final == log.stages["ttt"]


def test_each_line_is_the_event_that_it_stands_for():
    found = {event["event"]: event for event in events_of_text(make_log())}
    assert found["data"] == {
        "event": "data",
        "parameters": 3327044,
        "validation_tokens": 120001,
        "training_tokens": 3967231,
    }
    assert found["warm_up"] == {"event": "warm_up", "took": 24.2, "reserve": 10337}
    assert found["step"] == {
        "event": "step",
        "step": 10,
        "iterations": 20000,
        "train_loss": 6.8938,
        "train_time": 7661,
        "step_avg": 766.09,
        "tokens_per_second": 5347,
        "memory": 687,
        "left": 24,
    }
    assert found["swa"] == {"event": "swa", "step": 30}
    assert found["progress"] == {"event": "progress", "stage": "training", "done": 0.72, "left": 8}
    assert found["quantized"] == {"event": "quantized", "took": 1.5, "knob": 1}
    assert found["size"] == {
        "event": "size",
        "total": 2923801,
        "artifact_bytes": 2923801 - len(SOURCE.encode()),
        "code_bytes": len(SOURCE.encode()),
    }
    assert found["no_graphs"] == {"event": "no_graphs", "fault": "CUDA error: operation not permitted"}
    assert found["compiled"] == {"event": "compiled", "took": 61.3, "graphs": "False"}
    assert found["ttt_chunk"] == {
        "event": "ttt_chunk",
        "chunk": 2,
        "chunks": 2,
        "bpb": 3.070921,
        "seconds": 75.5,
    }
    assert found["stage"] == {
        "event": "stage",
        "stage": "legal_ttt",
        "eval_time": 75456,
        "memory": 2687,
        "val_loss": 5.48361088,
        "val_bpb": 3.0709208,
    }


def test_a_stream_that_learns_is_one_stage():
    """One that does not is a stage, too, which older logs have before it."""
    printed = "".join(line for line in PRINTED.splitlines(True) if "sliding_window" not in line)
    log = parse_log(make_log(printed, EVAL_MODE="streaming"), "sketch")
    assert list(log.stages) == ["training", "averaged", "roundtrip", "ttt"]
    with pytest.raises(RunError, match="sketch: has no score of final_int6_streaming"):
        parse_log(make_log(printed, EVAL_MODE="streaming", TTT_ENABLED="0"), "sketch")


def test_every_value_the_program_logs_is_known_by_its_name():
    """One that is not would be taken for a part of the value before it."""
    names = ["machine", "data", "warm_up", "trained", "quantized", "audit"]
    printed = events_of_text(committed("logs/demo.txt"))
    written = [json.loads(line) for line in committed("logs/demo.jsonl").splitlines()]
    for name in names:
        [found], [event] = ([e for e in events if e["event"] == name] for events in (printed, written))
        del event["time"]
        assert found.keys() == event.keys()
        assert all(found[key] == value for key, value in event.items() if isinstance(value, str))


def test_names_and_values_are_an_events_line_too():
    events = events_of_text(make_log())
    own = ("settings", "step", "validation", "stage", "size", "ttt_chunk", "progress")
    written = {
        json.dumps(e): " ".join(f"{k}:{v}" if k != "event" else v for k, v in e.items())
        for e in events
        if e["event"] not in own
    }
    assert (
        any(
            line == "machine processes:8 hardware:NVIDIA H100 80GB HBM3 "
            "torch:2.9.1+cu128 python:3.12.3 hooks:watch,audit"
            for line in written.values()
        )
        and len(written) == 13
    )
    assert events_of_text("\n".join(written.values())) == [json.loads(event) for event in written]
    assert events_of_text(
        "resumed step:20 took:1.5e-05\nerror message:disk full: 3 bytes\naudit share:much\nstep by step"
    ) == [
        {"event": "resumed", "step": 20, "took": 1.5e-05},
        {"event": "error", "message": "disk full: 3 bytes"},
        {"event": "audit"},
    ]


def test_the_json_lines_and_the_text_tell_the_same_run(tmp_path):
    path = write_run(tmp_path, make_events())
    log, plain = read_log(path), parse_log(make_log(), "sketch")
    assert log == plain == read_log(path.with_suffix(".jsonl"))
    assert log.changed_settings == plain.changed_settings == CHANGED
    assert latest(log.events, "step")["multiplier"] == 1 and "multiplier" not in latest(plain.events, "step")
    path.unlink()
    assert (
        alone := read_log(path.with_suffix(".jsonl"))
    ).source == "" and alone.source_sha256 == log.source_sha256


def test_changed_settings_are_those_that_differ_from_the_logged_sources_defaults():
    assert parse_log(make_log(), "sketch").changed_settings == CHANGED
    source = SOURCE.replace("seed: int = setting(1337,", "seed: int = setting(7,")
    assert source != SOURCE
    changed = parse_log(make_log(source=source), "sketch").changed_settings
    assert changed == {name: value for name, value in CHANGED.items() if name != "SEED"}
    for source in (
        "no Python!",
        "SETTINGS = 3",
        "print()",
        "class Settings:\n    seed: int = setting(open('t'))",
    ):
        with pytest.raises(RunError, match="run sketch: the source in its log is no train_gpt.py"):
            _ = parse_log(make_log(source=source), "sketch").changed_settings


def test_without_ttt_the_sliding_score_is_the_last():
    log = parse_log(make_log(PRINTED[: PRINTED.index("ttt_chunk")], TTT_ENABLED="0"), "sketch")
    assert log.final.val_bpb == 3.07875962 and "ttt" not in log.stages


def test_a_log_cut_after_any_line_is_refused(tmp_path):
    text = make_log()
    for end in [i for i, character in enumerate(text) if character == "\n"][SOURCE.count("\n") : -1]:
        with pytest.raises(RunError, match="^sketch: "):
            parse_log(text[:end], "sketch")
    for end in range(text.rindex("legal_ttt_exact"), len(text) - 1):
        with pytest.raises(RunError, match="has no score of legal_ttt, so the run did not finish"):
            parse_log(text[:end], "sketch")
    lines = json_lines(make_events()).splitlines(keepends=True)
    path = write_run(tmp_path, [])
    for count in range(len(lines)):
        path.with_suffix(".jsonl").write_text("".join(lines[:count]))
        with pytest.raises(RunError, match="sketch.txt: has no .*, so the run did not finish"):
            read_log(path)
        assert len(read_events(path)) == count


def test_a_score_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(RunError, match="no score of legal_ttt"):
        parse_log(make_log(PRINTED.replace("val_bpb:3.07092080", "val_bpb:nan")), "sketch")
    events = make_events()
    for value in (math.nan, None):
        path = write_run(tmp_path, events[:-1] + [events[-1] | {"val_bpb": value}])
        with pytest.raises(RunError, match="no score of legal_ttt"):
            read_log(path)
        with pytest.raises(RunError, match="has no exact score"):
            final_score(path)


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda text: text[:-30], "its last line is cut"),
        (lambda text: text[:-1], "its last line is cut"),
        (lambda text: text.replace('"event": "machine"', '"event"'), "line 2: no JSON"),
        (lambda text: text.replace('"event": "machine"', '"bench": "train"'), "line 2: no event"),
        (
            lambda text: text.replace("3327044", '"3327044"'),
            "line 3: parameters of the event 'data' is '3327044'",
        ),
        (
            lambda text: text.replace('"NVIDIA H100 80GB HBM3"', "8"),
            "line 2: hardware of the event 'machine' is 8",
        ),
        (lambda text: text.replace('"changed": [', '"changed": ["NO_SUCH", '), "line 1: it lacks settings"),
        (lambda text: text.replace('"processes": 8, ', ""), "has no line on the machine"),
        (lambda text: text.replace('"steps": 40', '"steps": null'), "has no end of training"),
        (lambda text: text.replace('"source_sha256": "', '"source_sha256": "0'), "its source is not the one"),
        (
            lambda text: text.replace('"EVAL_ONLY": "0"', '"EVAL_ONLY": "1"'),
            "EVAL_ONLY=1; give the log of the run that trained",
        ),
        (
            lambda text: (
                text[: text.rindex('{"event": "stage"')] + '{"event": "error", "message": "disk full"}\n'
            ),
            "no score of legal_ttt.*it ended in: disk full",
        ),
    ],
)
def test_a_damaged_jsonl_is_told(tmp_path, damage, told):
    text = json_lines(make_events())
    path = write_run(tmp_path, [])
    path.with_suffix(".jsonl").write_text(damage(text))
    assert damage(text) != text
    with pytest.raises(RunError, match=told):
        read_log(path)


def test_what_is_no_log_is_told(tmp_path):
    path = tmp_path / "a.txt"
    for data, told in (
        (b"# notes\n", "no log of train_gpt.py"),
        (b"", "no log of train_gpt.py"),
        (b"\xff\xfe", "no log of train_gpt.py; it is no UTF-8"),
        (None, "cannot be read .No such file or directory"),
    ):
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(RunError, match=f"^{path}: {told}"):
            read_log(path)
    with pytest.raises(RunError, match="a.jsonl: cannot be read"):
        read_events(tmp_path / "a.jsonl")


def test_of_what_a_resumed_run_did_again_the_later_counts(tmp_path):
    def step(number: int, loss: float) -> dict:
        return {"event": "step", "step": number, "train_loss": loss}

    def chunk(number: int, bpb: float) -> dict:
        return {"event": "ttt_chunk", "chunk": number, "bpb": bpb}

    path = write_run(
        tmp_path,
        [
            step(100, 3.0),
            step(200, 2.5),
            {"event": "swa", "step": 250},
            {"event": "validation", "step": 300, "val_bpb": 1.5},
            step(350, 2.2),
            {"event": "resumed", "step": 150},
            step(200, 2.4),
            step(300, 2.1),
            {"event": "validation", "step": 300, "val_bpb": 1.4},
            chunk(1, 1.3),
            chunk(2, 1.2),
            {"event": "resumed", "chunk": 1},
            chunk(2, 1.1),
        ],
    )
    events = read_events(path)
    assert [(e["step"], e["train_loss"]) for e in events if e["event"] == "step"] == [
        (100, 3.0),
        (200, 2.4),
        (300, 2.1),
    ]
    assert [e["val_bpb"] for e in events if e["event"] == "validation"] == [1.4] and not latest(events, "swa")
    assert [(e["chunk"], e["bpb"]) for e in events if e["event"] == "ttt_chunk"] == [(1, 1.3), (2, 1.1)]


@pytest.mark.parametrize("source", ["", f"import torch\n{'=' * 100}\nRunning PyTorch\n{'=' * 100}\n"])
def test_a_log_of_the_challenge_gives_events_and_a_score(tmp_path, source):
    path = tmp_path / "train.log"
    path.write_text(source + CHALLENGE)
    events = read_events(path)
    assert final_score(path) == (1.88712345, 1.1177)
    assert latest(events, "settings")["settings"] == {
        "SEED": "1337",
        "TRAIN_BATCH_TOKENS": "786432",
        "TRAIN_SEQ_LEN": "2048",
        "ITERATIONS": "20000",
    }
    assert [e["train_loss"] for e in events if e["event"] == "step"] == [2.4012]
    assert [(e["step"], e["val_bpb"]) for e in events if e["event"] == "validation"] == [
        (0, 4.1049),
        (7189, 1.1376),
    ]
    assert latest(events, "size") == {
        "event": "size",
        "total": 15944410,
        "artifact_bytes": 15851372,
        "code_bytes": 93038,
    }
    assert latest(events, "trained") == {"event": "trained", "train_time": 600031, "steps": 7189}
    assert [(e["stage"], e.get("eval_time"), e["val_bpb"]) for e in events if e["event"] == "stage"] == [
        ("final_int6_roundtrip", 6000, 1.1449),
        ("final_int6_sliding_window", None, 1.1214),
        ("legal_ttt", 478500, 1.1177),
    ]
    assert latest(events, "swa")["step"] == 6450 and not latest(events, "late_qat")
    assert latest(events, "ttt_chunk")["seconds"] == 478
    with pytest.raises(RunError, match="no log of train_gpt.py|has no line on the machine"):
        read_log(path)
    path.write_text(CHALLENGE.replace("Code size", "Size"))
    assert latest(read_events(path), "size") == {"event": "size", "total": 15944410}


@pytest.mark.parametrize(
    "name, steps, bpb", [("experiment", 545, 2.14967174), ("eval_model", 602, 2.15381994)]
)
def test_logs_of_older_versions_can_be_read(name, steps, bpb):
    log = read_log(ROOT / f"logs/{name}.txt")
    assert log.steps == steps and log.final.val_bpb == bpb == final_score(ROOT / f"logs/{name}.txt")[1]
    assert log.changed_settings["RUN_ID"] == name and "ADAM_WD" not in log.changed_settings


def test_what_a_run_writes_can_be_read(tmp_path):
    tiny.make_data(tmp_path)
    assert not tiny.run(tmp_path).status
    log = read_log(tmp_path / "logs/tiny.txt")
    assert log.source == SOURCE and log.steps == tiny.SETTINGS["ITERATIONS"] and log.chosen == "ema"
    assert (
        log.changed_settings.items()
        >= {"RUN_ID": "tiny", "NUM_LAYERS": "2", "TRAIN_BATCH_TOKENS": "512"}.items()
    )
    assert "EMA_DECAY" not in log.changed_settings
    assert list(log.stages) == ["training", "averaged", "roundtrip", "sliding", "ttt"]
    assert log.bytes_total == log.bytes_code + (tmp_path / "logs/tiny.bin").stat().st_size
    bits = [stage.val_bpb / stage.val_loss for stage in log.stages.values()]  # of the same text
    assert bits == pytest.approx([bits[0]] * 5, rel=1e-3)
