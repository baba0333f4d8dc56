"""tools.measure.gpu_checks: what it runs on a GPU runs at a tiny size on a CPU, and what fails is named."""

import json
import lzma
import shutil
import sys

import pytest

from tests import commands, tiny
from tools.common.cli import ROOT
from tools.measure import gpu_checks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the program with a corpus beside it."""
    folder = tmp_path_factory.mktemp("checks")
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_gpt.py", folder)
    tiny.train_tokenizer(folder / "t.model")
    for name in ("train", "val"):
        with lzma.open(folder / f"{name}.jsonl.xz", "wt") as file:
            parts = tiny.text().split("\n\n")
            file.writelines(json.dumps({"text": f"{name} {part}"}) + "\n" for part in parts)
    return folder


def run(folder, *arguments, **environment):
    words = ["-m", "tools.measure.gpu_checks", *arguments, "--dry", "--out", "out"]
    given = {"VOCAB_SIZE": 512} | environment
    unset = dict.fromkeys(tiny.SETTINGS.keys() - given)
    (result,) = tiny.finish([tiny.start([sys.executable, *words], folder, **(unset | given))], 120)
    return result


def test_the_bring_up_and_a_step_run_on_a_cpu_too(folder):
    result = run(folder, "1", "2", "--corpus", ".", "--tokenizer", "t.model")
    assert result.status == 0, result.err + result.out
    log = (folder / "out/dry_bringup.txt").read_text()
    assert log.startswith("settings: ") and " validation_tokens:3001 " in log and "audit violations:0" in log
    assert any(line.startswith("legal_ttt_exact val_loss:") for line in log.splitlines())
    rows = [json.loads(line) for line in (folder / "out/dry_step.jsonl").read_text().splitlines()]
    assert [row["bench"] for row in rows] == ["train", "train"]
    assert [row["settings"]["MICRO_BATCH_TOKENS"] for row in rows] == ["128", "256"]
    assert (folder / "out/dry_step.txt").read_text().count("\n| ") > 10
    left = "".join(path.read_text() for path in folder.glob("out/*.txt")) + json.dumps(rows)
    assert str(folder) not in left and str(ROOT) not in left


def test_each_entry_goes_on_after_a_command_that_fails(monkeypatch, tmp_path):
    """The commands of entries 2 to 4 on a GPU, none of which ends well."""
    checks, commands_run = gpu_checks.Checks("h100", tmp_path, False, None, None, ["record", "best"]), []

    def fail(title, words, settings, limit_s):
        commands_run.append((words[:4], settings))
        checks.failed.append(title)
        return 1, ""

    monkeypatch.setattr(checks, "run", fail)
    monkeypatch.setattr(checks, "make_data", lambda tokens: None)
    for number in "234":
        gpu_checks.ENTRIES[number].action(checks)
    assert len(commands_run) == len(checks.failed) == 6 + 5 + 2
    micro = [settings["MICRO_BATCH_TOKENS"] for _, settings in commands_run[:6]]
    assert micro == [98304, 196608] * 3 and commands_run[2][0][2:] == ["train", "--attention"]
    assert [words[2] for words, _ in commands_run[6:11]] == ["score", "score", "ttt", "score", "ttt"]
    assert commands_run[-1] == (
        ["train_gpt.py"],
        commands_run[-2][1] | {"RECIPE": "best"} | commands_run[-1][1],
    )
    assert commands_run[-1][1]["MAX_WALLCLOCK_SECONDS"] == 240
    assert (tmp_path / "h100_step.txt").read_text().count("did not run") == 6


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["5"], "5 to measure: see --list"),
        ([], "nothing to measure: see --list"),
        (["4", "bets"], "bets to measure: see --list"),
        (["1", "--dry"], "None: no such file; give --corpus and --tokenizer"),
        (
            ["1", "--dry", "--tokenizer", __file__, "--corpus", "nowhere"],
            "nowhere/val.jsonl.xz: no such file",
        ),
    ],
)
def test_what_makes_no_sense_gives_one_line(arguments, told, tmp_path):
    assert told in commands.fails(gpu_checks.main, *arguments, "--out", tmp_path)


def test_without_a_gpu_only_the_dry_form_runs(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert (
        commands.fails(gpu_checks.main, "0", "--out", tmp_path) == "no GPU; --dry tries the commands on a CPU"
    )


def test_a_command_that_takes_too_long_is_killed_and_named(tmp_path, capsys):
    checks = gpu_checks.Checks("dry", tmp_path, True, None, None, [])
    assert checks.run("sleep", ["-c", "import time; time.sleep(60)"], {}, 0.5) == (124, "")
    assert checks.run("exit", ["-c", "import sys; sys.exit('no reason')"], {}, 60)[0] == 1
    assert checks.failed == ["sleep", "exit"] and "status 1: no reason" in capsys.readouterr().out


def test_the_list_has_each_entry_with_its_minutes(capsys):
    gpu_checks.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(gpu_checks.ENTRIES)
    assert all(" min " in line for line in lines[:-1]) and "record best ema" in lines[-1]
