"""tools.measure.same_results: a rearrangement is the same to the last digit, a changed constant is found."""

import shutil
import subprocess

import pytest

from tests import commands
from tools.common.cli import ROOT
from tools.measure import same_results

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A git checkout of its own with the present program in it."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "Present"]):
        names = ["-c", "user.name=T", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", tmp_path, *names, *words], check=True)
    monkeypatch.setattr(same_results, "ROOT", tmp_path)
    monkeypatch.setitem(same_results.SETTINGS, "ITERATIONS", 3)
    monkeypatch.setitem(same_results.SETTINGS, "VAL_BATCH_SIZE", 65536)
    return tmp_path


def test_the_same_program_is_the_same_and_a_changed_constant_is_found(project, capsys, monkeypatch):
    before = same_results.run_case
    outcomes = {}  # of the program as it was committed: it need not run twice

    def run_case(name, program):
        if program.name == "here":
            return before(name, program)
        if name not in outcomes:
            outcomes[name] = before(name, program)
        return outcomes[name]

    monkeypatch.setattr(same_results, "run_case", run_case)
    same_results.main(["HEAD", "streaming"])
    row = capsys.readouterr().out.splitlines()[2].split("|")
    assert [cell.strip() for cell in row[1:2] + row[3:4]] == ["streaming", "same"] and int(row[2]) > 20
    program = project / "train_gpt.py"
    text = program.read_text("utf-8")
    assert text.count('F.leaky_relu(f.product("up", self.layer, x, m.up), 0.5)') == 1
    program.write_text(text.replace("x, m.up), 0.5)", "x, m.up), 0.4)"), "utf-8")
    with pytest.raises(SystemExit) as end:
        same_results.main(["HEAD", "streaming"])
    out, err = capsys.readouterr()
    found = out.splitlines()[2].split("|")[3]
    assert end.value.code == 1 and " before, " in found and " here" in found and "1 of 1 cases differ" in err


def test_bad_input_gives_one_line(project):
    assert commands.fails(same_results.main, "HEAD", "nothing").startswith("no case 'nothing'; there are ")
    assert commands.fails(same_results.main, "v9", "windows").startswith("git rev-parse: ")
