"""What ends a run: every rank stops with a line that says why, and no file is left half-written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_gpt as T
from tests import tiny
from tests.forked import Process
from tests.tools.run.ranks import PLANTED, finish, start
from tools.run.watch import LOST_RANK

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "fault, world, named",
    [
        ("raise", 2, "failed: a planted fault"),
        ("kill", 4, "has been silent for 5 s: it died or is frozen"),
        ("freeze", 2, "has been silent for 5 s: it died or is frozen"),
    ],
)
def test_when_one_rank_fails_dies_or_freezes_the_others_stop_and_name_it(folder, fault, named, world):
    *others, last = start(folder, fault, world=world, ITERATIONS=20)
    for rank, result in enumerate(tiny.finish(others, 60)):
        assert result.status == LOST_RANK
        assert f"train_gpt.py: rank {rank}: error: stopped, since rank {world - 1} {named}\n" in result.err
    if fault == "freeze":
        last.kill()
    assert (
        tiny.finish([last], 60)[0].status
        == {"raise": 2, "kill": -signal.SIGKILL, "freeze": -signal.SIGKILL}[fault]
    )


def children(pid):
    return [
        int(n)
        for n in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    ]


def torchrun(folder, *words, **settings):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        PLANTED,
        *words,
    ]
    return tiny.start(command, folder, PYTHONPATH=tiny.SCRIPT.parent, **settings)


def test_torchrun_ends_all_ranks_and_names_the_one_that_died(folder):
    agent = torchrun(folder, "kill", ITERATIONS=20)
    _, err = agent.communicate(timeout=90)
    assert agent.returncode == 1 and re.search(
        r"Root Cause.*\n.*\n.*\n.*\n\s*rank\s*: 1 .*\n\s*exitcode\s*: -9 ", err
    )


def test_when_torchrun_itself_is_killed_no_rank_is_left(folder):
    agent = torchrun(folder, "none", ITERATIONS=20000)
    deadline = time.monotonic() + 60
    while not (folder / "logs/tiny.txt").exists() or "step:5/" not in (folder / "logs/tiny.txt").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = children(agent.pid)
    agent.kill()
    assert len(ranks) == 2
    while any(
        os.path.exists(f"/proc/{pid}") and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
        for pid in ranks
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    agent.communicate(timeout=10)


@pytest.mark.parametrize(
    "fault, told",
    [
        ("vanish", "No such file or directory: '"),
        ("shrink", "fineweb_train_000000.bin was changed during the run"),
        ("change", "fineweb_train_000000.bin was changed during the run"),
    ],
)
def test_a_shard_that_vanishes_shrinks_or_changes_stops_the_run(folder, fault, told):
    result = finish(start(folder, fault, ITERATIONS=20))
    assert result.status == 2 and told in result.err and result.err.count("\n") == 1
    assert sorted(os.listdir(folder / "logs")) == ["tiny.jsonl", "tiny.txt"]


def test_a_full_disk_leaves_the_artifact_of_the_run_before(folder):
    assert tiny.run(folder).status == 0
    before = (folder / "logs/tiny.bin").read_bytes()
    size = len((folder / "logs/tiny.txt").read_bytes()) + 5000
    result = finish(start(folder, "limit", str(size), MODEL_DIM=128))  # a larger artifact than the log
    assert result.status == 2 and "File too large" in result.err and result.err.count("\n") == 1
    assert (folder / "logs/tiny.1.bin").read_bytes() == before
    assert not list((folder / "logs").glob("*.tmp"))


def test_ttt_that_ends_in_no_number_stops_the_run_and_names_its_stage(folder):
    result = tiny.run(folder, TTT_LR=1e30)
    assert (result.status, result.err) == (
        2,
        "train_gpt.py: error: legal_ttt: the loss is nan; lower TTT_LR or the learning rates\n",
    )
    assert "legal_ttt_exact" not in result.out


def test_a_run_is_audited_and_fails_if_it_breaks_a_rule(folder, monkeypatch):
    assert tiny.run(folder, AUDIT=1).status == 0
    found = json.loads((folder / "logs/tiny.audit.json").read_text())
    assert found["violations"] == [] and [*found["stages"]][-1] == "legal_ttt"
    plan = T.plan_windows
    monkeypatch.setattr(T, "plan_windows", lambda *args: plan(*args)[:-1])  # the tail is left out
    result = tiny.run(folder, AUDIT=1)
    assert result.status == 2 and "error: audit: " in result.err and "never scored" in result.err


def test_without_the_folder_of_tools_a_run_is_the_same_but_for_what_needs_them(folder):
    shutil.copy(tiny.SCRIPT, folder / "train_gpt.py")
    (result,) = tiny.finish([Process([folder / "train_gpt.py"], folder, tiny.environment({}))], 60)
    assert (result.status, result.err) == (0, "") and result.out.splitlines()[-1] == tiny.run(
        folder
    ).out.splitlines()[-1]
    (result,) = tiny.finish(
        [Process([folder / "train_gpt.py"], folder, tiny.environment(dict(RESUME="auto")))], 60
    )
    assert (
        result.status == 2
        and result.err == "train_gpt.py: error: AUDIT, RESUME and CHECKPOINT_EVERY need tools/\n"
    )


def test_a_full_disk_costs_the_log_not_the_run(folder):
    result = finish(start(folder, "limit", str(len(tiny.SCRIPT.read_bytes()) + 2600)))
    assert (
        result.status == 2
        and "error: the log is not whole: " in result.err
        and "File too large" in result.err
    )
    assert result.out.splitlines()[-1].startswith("legal_ttt_exact val_loss:")
    assert T.unpack_artifact((folder / "logs/tiny.bin").read_bytes(), "tiny.bin")
