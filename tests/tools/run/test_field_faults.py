"""What people ran into: copies and names of shards, stated totals, RUN_IDs used twice, signals, consoles."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import train_gpt as T
from tests import tiny
from tests.tools.run.ranks import start
from tools.common import shards as common_shards
from tools.run.own import keep_old_files
from tools.run.watch import Watch

pytestmark = pytest.mark.slow
SAFE = dict(CHECKPOINT_EVERY=1000, RESUME="auto", ITERATIONS=30)


def error_of(folder, **settings):
    result = tiny.run(folder, **settings)
    assert result.status == 2 and result.err.count("\n") == 1 and "train_loss" not in result.out
    return result.err


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Shards


@pytest.mark.parametrize("name", ["fineweb_val_000000 (1).bin", "fineweb_val_000000_copy.bin"])
def test_a_file_that_only_looks_like_a_shard_is_named(folder, name):
    (folder / "data" / name).write_bytes((folder / "data/fineweb_val_000000.bin").read_bytes())
    assert f"data/{name}: no name of a shard" in error_of(folder)


def test_a_number_of_another_length_is_named(folder):
    (folder / "data/fineweb_train_01.bin").write_bytes(
        (folder / "data/fineweb_train_000001.bin").read_bytes()
    )
    assert "its number is not as long as that of" in error_of(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_that_is_there_twice_is_named(folder, split):
    first, copy = folder / f"data/fineweb_{split}_000000.bin", folder / f"data/fineweb_{split}_000007.bin"
    copy.write_bytes(first.read_bytes())
    line = error_of(folder)
    assert f"data/{first.name} and data/{copy.name} hold the same tokens" in line
    tokens = T.Shard(copy).read().copy()
    tokens[-1] = 5 if tokens[-1] != 5 else 6
    tiny.write_shard(copy, tokens)
    assert tiny.run(folder).status == 0


def test_text_of_boundaries_only_is_refused(folder):
    tiny.write_shard(folder / "data/fineweb_val_000000.bin", np.ones(1500))
    assert "no token stands for a byte of text" in error_of(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_without_tokens_is_named(folder, split):
    tiny.write_shard(folder / f"data/fineweb_{split}_000000.bin", np.ones(0))
    assert f"data/fineweb_{split}_000000.bin: holds no tokens" in error_of(folder)


def test_bytes_are_counted_across_shards_and_parts(folder, monkeypatch):
    monkeypatch.setattr(common_shards, "PART", 7)
    tokenizer, _ = T.load_tokenizer(str(folder / "tokenizer.model"), tiny.VOCAB_SIZE)
    tokens = T.Shard(folder / "data/fineweb_val_000000.bin").read()[:101]
    for i, (low, high) in enumerate(((0, 40), (40, 101))):
        tiny.write_shard(folder / f"data/fineweb_val_{i:06d}.bin", tokens[low:high])
    shards = T.open_shards(str(folder / "data"), "val")
    documents = np.split(tokens, np.flatnonzero(tokens == 1))
    expected = sum(len(tokenizer.decode(part[1:].tolist()).encode()) for part in documents if len(part))
    assert common_shards.count_bytes(shards, T.byte_tables(tokenizer)) == expected > 50


def test_stated_tokens_and_bytes_are_checked(folder):
    path = folder / "data/fineweb_val.json"
    path.write_text("{}")
    found = json.loads(re.search(r"the shards have (\{.*?\})", error_of(folder))[1].replace("'", '"'))
    assert found["tokens"] == 1500 and found["bytes"] > 1500
    path.write_text(json.dumps(found | {"documents": 3}))
    assert tiny.run(folder).status == 0
    for wrong in (found | {"bytes": found["bytes"] + 1}, found | {"tokens": 1499}, []):
        path.write_text(json.dumps(wrong))
        assert "they are cut or others" in error_of(folder)


# What older runs left


def test_no_run_of_a_name_is_lost(folder):
    for learning_rate in (0.02, 0.03, 0.04):
        assert tiny.run(folder, MATRIX_LR=learning_rate).status == 0
    assert tiny.run(folder, MATRIX_LR=1e30).status == 2
    logs = folder / "logs"
    for name, rate in (("tiny.1", 0.02), ("tiny.2", 0.03), ("tiny.3", 0.04), ("tiny", 1e30)):
        assert f" MATRIX_LR={rate:.15g} " in (logs / f"{name}.txt").read_text()
        assert (logs / f"{name}.jsonl").exists() and (logs / f"{name}.bin").exists() == (rate < 1)
    assert not list(logs.glob("*.previous")) and not list(logs.glob("*.lock"))


def test_a_run_with_bad_input_touches_nothing(folder):
    assert tiny.run(folder).status == 0
    before = files(folder / "logs")
    assert "VOCAB_SIZE" in error_of(folder, VOCAB_SIZE=100)
    (folder / "data/fineweb_train_000001.bin").write_bytes(b"")
    error_of(folder)
    assert files(folder / "logs") == before


def test_scoring_again_writes_beside_the_trainings_files(folder):
    assert tiny.run(folder, AUDIT=1).status == 0
    before = files(folder / "logs")
    again = dict(EVAL_ONLY=1, ARTIFACT_PATH="logs/tiny.bin", AUDIT=1)
    for _ in range(2):
        assert tiny.run(folder, **again).status == 0
    after = files(folder / "logs")
    assert {name: after[name] for name in before} == before
    names = {f"tiny.eval{number}{end}" for number in ("", ".1") for end in (".txt", ".jsonl", ".audit.json")}
    assert after.keys() - before.keys() == names


def test_numbers_go_on_where_one_file_is_left(tmp_path):
    for name in ("run.txt.previous", "run.bin", "run.1.bin", "run.2.jsonl"):
        (tmp_path / name).write_text(name)
    keep_old_files(tmp_path / "run.txt")
    assert files(tmp_path) == {
        "run.3.txt": b"run.txt.previous",
        "run.3.bin": b"run.bin",
        "run.1.bin": b"run.1.bin",
        "run.2.jsonl": b"run.2.jsonl",
    }


def wait_for(path, words):
    deadline = time.monotonic() + 60
    while not path.exists() or words not in path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_runs_cannot_have_a_name_at_once_and_a_killed_one_does_not_keep_it(folder):
    (first,) = start(folder, "none", ITERATIONS=20000)
    wait_for(folder / "logs/tiny.txt", "step:5/")
    assert "RUN_ID=tiny: another run has it; give another" in error_of(folder)
    assert tiny.run(folder, RUN_ID="other").status == 0
    first.kill()
    first.communicate(60)
    assert tiny.run(folder).status == 0 and (folder / "logs/tiny.1.txt").exists()


def test_a_finished_run_is_not_trained_again_by_resume_auto(folder):
    assert tiny.run(folder, **SAFE).status == 0
    before = files(folder / "logs")
    assert "RUN_ID=tiny has its result already, see logs/tiny.txt; give another" in error_of(folder, **SAFE)
    assert files(folder / "logs") == before


# Signals and consoles


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_write_a_checkpoint_and_the_run_goes_on_later(folder, name):
    process = tiny.start([sys.executable, tiny.SCRIPT], folder, **SAFE | dict(ITERATIONS=20000))
    wait_for(folder / "logs/tiny.txt", "step:5/")
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "")
    assert out.splitlines()[-1] == f"stopped by {name}; go on with RESUME=logs/tiny.ckpt"
    assert (folder / "logs/tiny.ckpt").exists()


def test_a_run_that_hang_ups_do_not_reach_goes_on(folder):
    command = ["nohup", sys.executable, tiny.SCRIPT]
    process = tiny.start(command, folder, **SAFE)
    wait_for(folder / "logs/tiny.txt", "step:2/")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_ctrl_c_without_checkpoints_gives_one_line(folder):
    process = tiny.start([sys.executable, tiny.SCRIPT], folder, ITERATIONS=20000)
    wait_for(folder / "logs/tiny.txt", "step:5/")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, "train_gpt.py: error: interrupted\n")


@pytest.mark.parametrize(
    "line, status, error",
    [
        ("{python} {script} >&-", 0, ""),
        ("PYTHONIOENCODING=ascii {python} {script}", 0, ""),
        ("WORLD_SIZE= {python} {script}", 0, ""),
        ("WORLD_SIZE=2 {python} {script}", 2, "WORLD_SIZE without RANK: start by torchrun"),
        ("cd elsewhere && {python} {script}", 0, ""),
        ("cp {script} renamed.py && {python} renamed.py", 0, ""),
    ],
)
def test_the_edges_of_a_process_give_a_result_or_one_line(folder, line, status, error):
    data = folder / "données"
    os.rename(folder / "data", data)
    (folder / "elsewhere").mkdir()
    line = line.format(python=sys.executable, script=tiny.SCRIPT)
    places = dict(DATA_PATH=data, TOKENIZER_PATH=folder / "tokenizer.model", OMP_NUM_THREADS=1)
    found = subprocess.run(
        line, shell=True, cwd=folder, env=tiny.environment(places), capture_output=True, timeout=120
    )
    said = found.stderr.decode()
    assert found.returncode == status and said.count("\n") == bool(error) and error in said
    if status == 0:
        (log,) = folder.glob("**/logs/tiny.txt")
        assert f"DATA_PATH={data} " in log.read_text("utf-8")


# The watch


def test_a_watcher_that_itself_slept_starts_counting_anew(monkeypatch):
    """All ranks are paused for longer than a silence may last; nobody is lost."""
    now, waits = [0.0], []

    class Store:
        def add(self, key, number):
            now[0] += 300 * (len(waits) == 6 and number)  # it sleeps in the middle of a look, too
            return 7  # the other has not beaten again yet

        def check(self, keys):
            return False

        def set(self, key, value):
            raise AssertionError(value)

    def wait(seconds):
        waits.append(seconds)
        now[0] += 300 if len(waits) == 3 else seconds
        return len(waits) == 30

    watch = Watch()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watch.ended, "wait", wait)
    watch.rank, watch.world, watch.store = 0, 2, Store()
    watch.look()
    assert len(waits) == 30 and now[0] > 300
    monkeypatch.setattr(watch.ended, "wait", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with pytest.raises(AssertionError, match="rank 1 has been silent for 45 s"):
        watch.look()


def test_a_pause_of_all_processes_ends_no_run(folder):
    """Longer than the silence that ends a run: 5 s in planted.py."""
    ranks = start(folder, "watched", world=2, ITERATIONS=20000, TRAIN_LOG_EVERY=1)
    log = folder / "logs/tiny.txt"
    wait_for(log, "step:5/")
    for number, seconds in ((signal.SIGSTOP, 9), (signal.SIGCONT, 7)):
        for process in ranks:
            os.kill(process.process.pid, number)
        size = log.stat().st_size
        time.sleep(seconds)
    assert [process.returncode for process in ranks] == [None, None] and log.stat().st_size > size
    for process in ranks:
        process.kill()
        process.communicate(60)


# What is around a run


def test_a_package_named_tools_elsewhere_does_not_take_ours_away(folder):
    """Not even if it is first on the path and imported already."""
    (folder / "tools").mkdir()
    (folder / "tools/__init__.py").write_text("")
    code = f"import sys, runpy, tools; sys.argv = [{str(tiny.SCRIPT)!r}]\n"
    code += "assert not hasattr(tools, 'run'); runpy.run_path(sys.argv[0], run_name='__main__')"
    environ = tiny.environment(dict(AUDIT=1, PYTHONPATH=folder, PYTHONSAFEPATH=1))
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr) == (0, "") and "hooks:inputs,ownership" in found.stdout
    assert json.loads((folder / "logs/tiny.audit.json").read_text())["violations"] == []


def test_a_reader_of_the_console_may_go_away(folder):
    """As `head -n 1` does: the log file is whole."""
    command, environ = [sys.executable, str(tiny.SCRIPT)], tiny.environment({})
    options = dict(cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **options) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(120) == 0
    assert "legal_ttt_exact val_loss" in (folder / "logs/tiny.txt").read_text().splitlines()[-1]
