"""A run that is killed or stopped and resumed ends as one that never was, from its own checkpoint only."""

import hashlib
import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

import train_gpt as T
from tests import tiny
from tests.forked import Process
from tests.tools.run.ranks import finish, start
from tools.run import checkpoint
from tools.run.watch import LOST_RANK

pytestmark = pytest.mark.slow

RESUMED = []  # trials that went on from a checkpoint
TRIALS = int(os.environ.get("TRIALS", 10))
CHECKPOINT = Path("logs/tiny.ckpt")
ALWAYS = dict(ITERATIONS=12, TRAIN_LOG_EVERY=1, WARMDOWN_ITERS=12, TTT_CHUNK_TOKENS=64, TTT_BATCH_SEQS=2)
SAFE = ALWAYS | dict(CHECKPOINT_EVERY=0.01, RESUME="auto")
EXPERTS = dict(EVAL_MODE="streaming", TTT_EXPERTS="lr=0;lr=0.01;lr=0.02,chunk=16")
MODES = [{}, dict(EVAL_MODE="streaming"), dict(TTT_MUON=0), dict(EVAL_MODE="streaming", TTT_MUON=0), EXPERTS]


@pytest.fixture(scope="module")
def undisturbed(data):
    """(mode or None, world size) -> artifact, last line, seconds and step events of a run
    without checkpoints, made once."""
    runs = {}

    def run(mode, world=1):
        if (mode, world) not in runs:
            shutil.rmtree(data / "logs", ignore_errors=True)
            began = time.monotonic()
            result = finish(start(data, world=world, **ALWAYS | ({} if mode is None else MODES[mode])))
            assert (result.status, result.err) == (0, "")
            runs[mode, world] = (
                artifact_of(data),
                result.out.splitlines()[-1],
                time.monotonic() - began,
                events_of(data, "step"),
            )
            shutil.rmtree(data / "logs")
        return runs[mode, world]

    return run


def artifact_of(folder):
    return (folder / "logs/tiny.bin").read_bytes()


def events_of(folder, kind):
    """By step."""
    events = map(json.loads, (folder / "logs/tiny.jsonl").read_text().splitlines())
    return {event["step"]: event for event in events if event["event"] == kind}


def check_end(folder, result, reference):
    assert (result.status, result.err) == (0, "")
    assert result.out.splitlines()[-1] == reference[1] and artifact_of(folder) == reference[0]
    assert not (folder / CHECKPOINT).exists() and not list((folder / "logs").glob("*.tmp"))


@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(folder, undisturbed, trial):
    world, mode, at = 1 + (trial % 5 == 4), trial % len(MODES), random.Random(trial)
    reference = undisturbed(mode, world)
    for _ in range(at.choice((1, 1, 2))):
        ranks = start(folder, world=world, **SAFE | MODES[mode])
        time.sleep(at.uniform(0.1, 1) * reference[2])
        for rank in ranks:
            rank.kill()
        ended = [rank.communicate() and rank.returncode for rank in ranks]
        if ended == [0] * world:  # it was done first
            shutil.rmtree(folder / "logs")
    result = finish(start(folder, world=world, **SAFE | MODES[mode]))
    check_end(folder, result, reference)
    RESUMED.extend(re.findall(r"^resumed (\w+):", result.out, re.M))


def test_most_trials_at_random_moments_went_on_from_a_checkpoint():
    assert len(RESUMED) >= TRIALS // 4 and {*RESUMED} == {"step", "chunk"}


def test_sigterm_outside_of_the_loops_saves_what_there_is(folder, undisturbed):
    for phase, told in (
        ("in warm-up", "nothing is saved"),
        ("after training", "go on with RESUME=logs/tiny.ckpt"),
        ("before export", "go on with RESUME=logs/tiny.ckpt"),
        ("in export", "go on with RESUME=logs/tiny.ckpt"),
    ):
        result = finish(start(folder, f"sigterm {phase}", **ALWAYS, CHECKPOINT_EVERY=60, RESUME="auto"))
        assert (result.status, result.err) == (T.STOPPED_STATUS, "")
        assert result.out.splitlines()[-1] == f"stopped by SIGTERM; {told}"
    assert "resumed step:12\n" in result.out  # what the second one saved
    result = finish(start(folder, **SAFE))
    assert "step:" not in result.out  # what the last one saved
    check_end(folder, result, undisturbed(0))


def test_scoring_goes_on_with_the_same_artifact_and_text_only(folder):
    assert tiny.run(folder, **ALWAYS).status == 0
    shutil.copy(folder / "logs/tiny.bin", folder / "a.bin")
    again = ALWAYS | dict(
        EVAL_ONLY=1, ARTIFACT_PATH="a.bin", RUN_ID="again", CHECKPOINT_EVERY=60, RESUME="auto"
    )
    assert finish(start(folder, "sigterm in TTT", **again)).status == T.STOPPED_STATUS
    assert tiny.run(folder, **ALWAYS, SEED=2).status == 0
    shutil.copy(folder / "logs/tiny.bin", folder / "a.bin")
    result = tiny.run(folder, **again)
    assert result.status == 2 and result.err.endswith(
        "checkpoint logs/again.eval.ckpt: made with another artifact\n"
    )


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_in_training_and_in_ttt_stops_a_run_that_goes_on_later(folder, undisturbed, world):
    seen = []
    for fault in ("sigterm", "sigterm in TTT"):
        ranks = start(folder, fault, world=world, **ALWAYS, **MODES[1], CHECKPOINT_EVERY=60, RESUME="auto")
        for result in tiny.finish(ranks, 60):
            assert (result.status, result.err) == (T.STOPPED_STATUS, "")
            assert (folder / CHECKPOINT).exists()
            if result.out:
                assert result.out.splitlines()[-1] == "stopped by SIGTERM; go on with RESUME=logs/tiny.ckpt"
                seen += re.findall(r"^(resumed \w+):\d+$", result.out, re.M)
    result = tiny.finish(start(folder, world=world, **SAFE | MODES[1]), 60)[0]
    assert seen + re.findall(r"^(resumed \w+):\d+$", result.out, re.M) == ["resumed step", "resumed chunk"]
    check_end(folder, result, undisturbed(1, world))


def test_a_signal_that_comes_to_one_rank_after_the_ranks_have_agreed_stops_both_at_a_later_step(
    folder, undisturbed
):
    settings = ALWAYS | dict(CHECKPOINT_EVERY=60, RESUME="auto")
    ranks = tiny.finish(start(folder, "sigterm on one rank", world=2, **settings), 60)
    assert [(result.status, result.err) for result in ranks] == [(T.STOPPED_STATUS, "")] * 2
    assert ranks[0].out.splitlines()[-1] == "stopped by a signal; go on with RESUME=logs/tiny.ckpt"
    result = tiny.finish(start(folder, world=2, **settings), 60)[0]
    (step,) = map(int, re.findall(r"^resumed step:(\d+)$", result.out, re.M))
    assert 6 <= step <= 12
    check_end(folder, result, undisturbed(0, 2))


def test_a_signal_outside_of_the_loops_to_one_rank_ends_the_others_too(folder):
    settings = ALWAYS | dict(CHECKPOINT_EVERY=60, RESUME="auto")
    first, other = tiny.finish(start(folder, "sigterm after training", world=2, **settings), 60)
    assert (first.status, first.err) == (T.STOPPED_STATUS, "")
    assert first.out.splitlines()[-1] == "stopped by SIGTERM; go on with RESUME=logs/tiny.ckpt"
    assert other.status == LOST_RANK and re.search(
        "stopped, since (rank 0 was stopped by SIGTERM|.*, or rank 0, has gone)\n", other.err
    )


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """A folder with a run that a spoilt gradient stopped at step 6 of 12, and how it ended."""
    folder = shutil.copytree(data, tmp_path_factory.mktemp("stopped") / "run")
    return folder, finish(start(folder, "spoil", "up_bank", **SAFE))


@pytest.fixture
def resumable(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped[0], tmp_path / "stopped")


def test_a_gradient_that_is_no_number_names_its_step_and_the_last_good_checkpoint_goes_on(
    stopped, resumable, undisturbed
):
    assert stopped[1].status == 2 and re.fullmatch(
        r"train_gpt.py: error: step 6: loss [0-9.]+, gradient norm nan; lower the learning rates\n",
        stopped[1].err,
    )
    result = finish(start(resumable, **SAFE))
    assert re.search("^resumed step:[3-5]$", result.out, re.M)
    check_end(resumable, result, undisturbed(None))


@pytest.mark.parametrize("world", [2, 8])
def test_another_number_of_processes_goes_on_from_the_same_state(resumable, undisturbed, world):
    result = finish(start(resumable, world=world, **SAFE))
    (step,) = map(int, re.findall(r"^resumed step:([3-5])$", result.out, re.M))
    assert (result.status, result.err) == (0, "")
    losses = (
        events_of(resumable, "step")[step + 1]["train_loss"],
        undisturbed(None)[3][step + 1]["train_loss"],
    )
    assert losses[0] == pytest.approx(
        losses[1], abs=1e-5
    )  # later on, Muon's bf16 magnifies the order of the sums
    lines = undisturbed(None)[1], result.out.splitlines()[-1]
    loss, other = (float(re.search(r"val_loss:(\S+)", line)[1]) for line in lines)
    assert other == pytest.approx(loss, abs=1e-3)


@pytest.mark.parametrize(
    "change, settings, told",
    [
        (lambda data: b"", {}, "truncated, altered or no checkpoint"),
        (lambda data: data[:40], {}, "truncated"),
        (lambda data: data[:-1], {}, "truncated"),
        (lambda data: data[: len(data) // 2], {}, "truncated"),
        (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], {}, "altered"),
        (lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:], {}, "altered"),
        (
            lambda data: checkpoint.MAGIC + hashlib.sha256(b"x").digest() + b"x",
            {},
            "not of this version's format",
        ),
        (lambda data: b"GPTCKPT1" + data[8:], {}, "truncated, altered or no checkpoint"),
        (lambda data: data, dict(NUM_LAYERS=3), "made with NUM_LAYERS=2, not 3"),
        (lambda data: data, dict(SEED=2), "made with SEED=1337, not 2"),
    ],
    ids=["empty", "header", "byte", "half", "flip", "flip early", "no torch file", "older", "layers", "seed"],
)
def test_what_is_no_checkpoint_of_this_run_is_refused_and_nothing_is_lost(resumable, change, settings, told):
    (resumable / CHECKPOINT).write_bytes(change((resumable / CHECKPOINT).read_bytes()))
    before = {path: path.read_bytes() for path in resumable.rglob("*") if path.is_file()}
    result = tiny.run(resumable, **SAFE | settings)
    assert (
        result.status == 2
        and result.err.startswith("train_gpt.py: error: checkpoint logs/tiny.ckpt: ")
        and told in result.err
    )
    assert result.err.count("\n") == 1
    assert {path: path.read_bytes() for path in resumable.rglob("*") if path.is_file()} == before


def test_other_shards_and_another_source_than_the_checkpoints_are_refused(resumable):
    program = resumable / "train_gpt.py"
    program.write_text(tiny.SCRIPT.read_text("utf-8") + "\n# changed\n", "utf-8")
    (resumable / "tools").symlink_to(tiny.SCRIPT.parent / "tools")
    (result,) = tiny.finish([Process([program], resumable, tiny.environment(SAFE))], 60)
    assert result.status == 2 and "made by another train_gpt.py" in result.err
    tiny.write_shard(resumable / "data/fineweb_train_000001.bin", [1] * 6001)
    result = tiny.run(resumable, **SAFE)
    assert result.status == 2 and result.err.endswith(
        "checkpoint logs/tiny.ckpt: made with TRAIN_SHARDS=[6000, 6000], not [6000, 6001]\n"
    )


def test_resume_auto_without_a_checkpoint_starts_and_without_a_run_id_is_an_error(folder, undisturbed):
    check_end(folder, tiny.run(folder, **ALWAYS, RESUME="auto"), undisturbed(0))
    assert "RESUME=auto needs RUN_ID" in tiny.run(folder, RESUME="auto", RUN_ID="").err
    assert "none.ckpt" in tiny.run(folder, RESUME="none.ckpt").err


def test_a_full_disk_costs_a_checkpoint_not_the_run(folder, undisturbed):
    """Files may be 20,000 bytes longer than the source: enough for log and artifact, not for a checkpoint."""
    (folder / "logs").mkdir()
    limit = str(len(tiny.SCRIPT.read_bytes()) + 20000)
    result = finish(start(folder, "limit", limit, **SAFE | dict(CHECKPOINT_EVERY=0.2)))
    assert "checkpoint logs/tiny.ckpt could not be written: " in result.out and "; going on\n" in result.out
    check_end(folder, result, undisturbed(0))


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    path, state = tmp_path / "a.ckpt", dict(made_by={}, phase="training", state=[torch.ones(1000)])
    checkpoint.write(path, state)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(path, state | dict(state=[torch.zeros(1000)]))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.ckpt"]
    assert torch.equal(checkpoint.read(path)["state"][0], torch.ones(1000))


def fail(*_):
    raise OSError("disk full")
