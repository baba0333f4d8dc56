"""tools/measure/gpu_checks.py: its entries run on a CPU too, at a tiny size; what fails is told."""

import json
import lzma
import re
import sys
import time
from dataclasses import replace

import pytest
import torch

import train_gpt as T
from tests import commands
from tests.tiny import VOCAB_SIZE, text, train_tokenizer
from tools.common.machine import short_name
from tools.measure import gpu_checks
from tools.measure.gpu_checks import DRY, ENTRIES, FULL, Checks, Command, run_commands
from tools.measure.same_results import copy_program

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A copy of the program, which has data once an entry has made them."""
    folder = tmp_path_factory.mktemp("program")
    copy_program(folder)
    return folder


@pytest.fixture
def root(program, monkeypatch):
    """That copy as the project's root, with a corpus beside it."""
    monkeypatch.setattr(gpu_checks, "ROOT", program)
    for name in {*T.FIELDS, "RANK", "LOCAL_RANK", "WORLD_SIZE"}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VOCAB_SIZE", str(VOCAB_SIZE))
    train_tokenizer(program / "tokenizer.model")
    for name in ("train", "val"):
        with lzma.open(program / f"{name}.jsonl.xz", "wt", preset=0) as file:
            file.writelines(json.dumps({"text": part}) + "\n" for part in text().split("\n\n"))
    return program


def dry(root, out, *arguments):
    """Run an entry, and see that the paths of this machine are not in what it leaves."""
    given = ("--corpus", root, "--tokenizer", root / "tokenizer.model", "--out", out, "--dry")
    gpu_checks.main([str(word) for word in (*given, "--machine", "h9", *arguments)])
    for path in [*out.glob("*.txt"), *out.glob("*.jsonl")]:
        assert not re.search("|".join((str(root), str(out), sys.prefix)), path.read_text())


def test_the_bring_up_runs_on_a_cpu_and_leaves_log_and_events(root, tmp_path, capfd):
    dry(root, tmp_path / "out", "1")
    log = (tmp_path / "out/h9_bringup.txt").read_text()
    assert log.startswith("settings: DATA_PATH=data/gpu_checks_dry ") and " validation_tokens:3001 " in log
    assert " AUDIT=1 " in log and " MAX_WALLCLOCK_SECONDS=100 " in log and " WARMDOWN_ITERS=75 " in log
    assert log.splitlines()[-2].startswith("legal_ttt_exact val_loss:")
    assert log.splitlines()[-1].startswith("audit violations:0 ")
    events = [json.loads(line) for line in (tmp_path / "out/h9_bringup.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3]
    said = capfd.readouterr().out
    assert "== 1 of 1: RUN_ID=check_bringup MAX_WALLCLOCK_SECONDS=100 " in said and "\n== took " in said


def test_a_step_is_profiled(root, tmp_path, capfd):
    dry(root, tmp_path / "out", "2")
    lines = (tmp_path / "out/h9_step.txt").read_text().splitlines()
    assert sum("TORCHINDUCTOR_MIX_ORDER_REDUCTION=0" in line for line in lines) == 1
    figures = [json.loads(line) for line in (tmp_path / "out/h9_step.jsonl").read_text().splitlines()]
    assert {(found["bench"], found["steps"], found["tokens"]) for found in figures} == {
        ("train", 3, "shards'")
    }
    assert len(list((tmp_path / "out").glob("h9_step_default.json.gz"))) == 1


def test_data_are_the_first_tokens_of_the_corpus_and_are_made_once(root, tmp_path, capsys, monkeypatch):
    small = replace(DRY, data="data/few", tokens={"train": 1000, "val": 70})
    gpu_checks.prepare_data(small, root, root / "tokenizer.model")
    shards = {split: T.open_shards(root / "data/few", split) for split in small.tokens}
    assert {split: [len(shard) for shard in found] for split, found in shards.items()} == {
        "train": [1000],
        "val": [70],
    }
    tokenizer, _ = T.load_tokenizer(root / "data/few/tokenizer.model", VOCAB_SIZE)
    first = [1, *tokenizer.encode(text().split("\n\n")[0])][:70]
    assert shards["val"][0].read(0, len(first)).tolist() == first
    assert "70 tokens in data/few/fineweb_val_000000.bin" in capsys.readouterr().out
    gpu_checks.prepare_data(small, None, None)
    assert "data/few as it is" in capsys.readouterr().out


# The commands of the other entries, as data


def checks_at(size, *variants):
    return Checks(size, gpu_checks.ROOT / "logs", "h9", variants)


def titles(entry, size, *variants):
    return [command.title for command in ENTRIES[entry].commands(checks_at(size, *variants))]


def test_what_has_to_be_right_is_tested_on_the_gpu():
    (command,) = ENTRIES["0"].commands(checks_at(FULL))
    assert command.title == (
        "GPU_TESTS_DEVICE=cuda python -m pytest -v -rA --no-header tests/model/test_on_gpu.py"
    )
    assert not ENTRIES["0"].needs_data and "GPU_TESTS_DEVICE=cpu " in titles("0", DRY)[0]


def test_a_step_is_profiled_with_each_kernel_and_timed_as_compiled_otherwise():
    *steps, plain, tuned = ENTRIES["2"].commands(checks_at(FULL))
    assert plain.settings == {"TORCHINDUCTOR_MIX_ORDER_REDUCTION": 0}
    assert tuned.settings == {"TORCHINDUCTOR_MAX_AUTOTUNE_GEMM": 1} and tuned.words == plain.words
    chosen = [word for command in steps for word in command.words if word in ("cudnn", "flash")]
    assert chosen == ["cudnn", "flash"]
    assert {command.words[-5:-2] for command in steps} == {("--shards", "--steps", "20")}
    assert len({command.words for command in steps}) == len(steps), "each has a profile of its own"


def test_scoring_is_measured_in_windows_at_both_strides_and_streaming():
    found = [
        (command.words[2], *(f"{name}={value}" for name, value in command.settings.items()))[:3]
        for command in ENTRIES["3"].commands(checks_at(FULL))[:-1]
    ]
    assert found == [
        ("score", "RECIPE=record"),
        ("score", "RECIPE=record", "EVAL_STRIDE=2048"),
        ("ttt", "RECIPE=record"),
        ("score", "RECIPE=record", "EVAL_MODE=streaming"),
        ("ttt", "RECIPE=record", "EVAL_MODE=streaming"),
    ]
    assert "EVAL_STRIDE=64 " in titles("3", DRY)[1]
    *_, stream, graphs = titles("3", FULL)
    assert graphs.replace(" TORCHINDUCTOR_CUDAGRAPHS=1", "") == stream != graphs


def test_qualities_are_compared_after_the_same_time():
    runs = ENTRIES["4"].commands(checks_at(FULL))
    assert [command.name for command in runs] == ["quality_record", "quality_frontier"]
    counts = ("MAX_WALLCLOCK_SECONDS", "WARMDOWN_ITERS", "MUON_MOMENTUM_WARMUP_STEPS")
    assert {tuple(run.settings[name] for name in counts) for run in runs} == {(240, 180, 80)}
    (one,) = ENTRIES["4"].commands(checks_at(FULL, "frontier"))
    assert one.settings["RECIPE"] == "frontier" and 240 < one.seconds < 600


@pytest.mark.parametrize("size", [FULL, DRY], ids=["full", "dry"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_command_has_settings_that_are_accepted(entry, size, monkeypatch):
    monkeypatch.setattr(gpu_checks.os, "environ", {})
    checks = checks_at(size)
    for command in ENTRIES[entry].commands(checks):
        values = gpu_checks.environment(checks, command)
        s = T.parse_settings({name: value for name, value in values.items() if name in T.FIELDS})
        assert s.data_path == size.data and command.seconds <= 600


# What goes wrong


def test_a_failure_is_told_and_the_other_commands_still_run(tmp_path, capfd):
    checks = Checks(DRY, tmp_path, "h9", ())
    begun = time.perf_counter()
    failed = run_commands(
        checks,
        [
            Command("a", ("-c", "print('before'); raise SystemExit(3)"), {}),
            Command("a", ("-c", "import time; print('begun'); time.sleep(60)"), {}, titled=True, seconds=1),
            Command("b", ("-c", f"print('{gpu_checks.ROOT}/train_gpt.py {tmp_path}')"), {"AUDIT": 1}),
        ],
    )
    assert time.perf_counter() - begun < 30
    assert [why.rpartition("(")[2] for why in failed] == ["status 3)", "not done after 1 s)"]
    lines = (tmp_path / "h9_a.txt").read_text().splitlines()
    assert lines[:2] == ["before", "== failed: status 3"]
    assert lines[2].startswith("== python -c ") and lines[3:] == ["begun", "== failed: not done after 1 s"]
    assert (tmp_path / "h9_b.txt").read_text() == "train_gpt.py .\n"
    said = capfd.readouterr().out
    assert "== 3 of 3: AUDIT=1 python -c " in said and "== failed: status 3, " in said


def test_an_entry_ends_with_status_1_and_the_command_that_failed(root, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(
        ENTRIES, "0", ENTRIES["0"]._replace(commands=lambda checks: [Command("c", ("x",), {})])
    )
    with pytest.raises(SystemExit) as end:
        dry(root, tmp_path, "0")
    assert end.value.code == 1
    assert capfd.readouterr().err.splitlines()[-1] == "error: 1 of 1 commands failed: python x (status 2)"


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "which entry? see --list"),
        (["5"], "argument entry: invalid choice: '5'"),
        (["1", "best"], "no variant 'best'; entry 4 has record, frontier"),
        (["4", "worst", "--dry"], "no variant 'worst'; entry 4 has record, frontier"),
        (["1"], "no GPU; --dry tries the commands at a tiny size on a CPU"),
        (["data"], "data/gpu_checks holds no data yet: give --corpus and --tokenizer"),
        (["data", "--corpus", "nowhere", "--tokenizer", "nowhere"], "tokenizer nowhere: No such file"),
        (["data", "--corpus", "nowhere", "--tokenizer", "TOKENIZER"], "nowhere/train.jsonl.xz: No such file"),
    ],
)
def test_bad_arguments_give_one_line(root, monkeypatch, arguments, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [str(root / "tokenizer.model") if word == "TOKENIZER" else word for word in arguments]
    assert commands.fails(gpu_checks.main, *words).startswith(told)


def test_the_list_has_all_entries_with_their_minutes(capsys):
    gpu_checks.main(["--list"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["data", "0", "1", "2", "3", "4"]
    assert [row[2].strip() for row in rows][1:] == ["1", "5", "5", "4", "8 each"]


@pytest.mark.parametrize(
    "name, short", [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("Tesla T4", "tesla")]
)
def test_files_are_named_after_the_machine(monkeypatch, name, short):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert short_name(torch.device("cuda")) == short
    assert short_name(torch.device("cpu")).isidentifier()
