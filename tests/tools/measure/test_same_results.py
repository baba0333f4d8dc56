"""tools/measure/same_results.py: the same program has the same results; another constant is found."""

import subprocess

import pytest

from tests import commands
from tools.measure import same_results
from tools.measure.same_results import COMPARED, Case, Outcome, copy_program, first_difference, remark

pytestmark = pytest.mark.slow

SMALL = Case({"ITERATIONS": 2, "WARMUP_STEPS": 0, "VAL_LOSS_EVERY": 0, "EMA_DECAY": 0, "TTT_ENABLED": 0})


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The program, committed to a repository of its own."""
    folder = tmp_path / "repository"
    copy_program(folder)
    author = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "All"]):
        subprocess.run(["git", "-C", folder, *words], check=True)
    monkeypatch.setattr(same_results, "ROOT", folder)
    monkeypatch.setitem(same_results.CASES, "small", SMALL)
    return folder


def row_of(printed):
    """The cells of the only case."""
    return [cell.strip() for cell in printed.splitlines()[2].split("|")[1:-1]]


def test_the_same_program_has_the_same_results_and_a_changed_constant_is_found(repository, capsys):
    same_results.main(["HEAD", "small"])
    case, lines, result, artifact = row_of(capsys.readouterr().out)
    assert (case, result) == ("small", "same") and int(lines) >= 7
    assert artifact.startswith("same, SHA-256 ")

    program = repository / "train_gpt.py"
    changed = program.read_text("utf-8").replace("((3.4445, ", "((3.4465, ")
    assert changed != program.read_text("utf-8")
    program.write_text(changed, "utf-8")
    with pytest.raises(SystemExit) as end:
        same_results.main(["HEAD", "small"])
    printed = capsys.readouterr()
    assert end.value.code == 1 and printed.err.endswith("error: 1 of 1 cases differ\n")
    _, _, result, artifact = row_of(printed.out)
    assert "_exact val_loss: " in result and " before, " in result and result.endswith(" here")
    assert artifact.startswith("SHA-256 ") and "... before, " in artifact


# What is compared


def outcome_of(*lines):
    outcome = Outcome()
    for line in lines:
        outcome.read(line)
    return outcome


EXACT = "legal_ttt_exact val_loss:1.50000000 val_bpb:0.50000000"


@pytest.mark.parametrize(
    "line, what, digits",
    [
        ("step:1/20 train_loss:6.9288 train_time:698ms", "step:1/20 train_loss", "6.9288"),
        ("step:7/20 val_loss:3.2 val_bpb:1.8604 train_time:1ms", "step:7/20 val_loss", "3.2 val_bpb:1.8604"),
        ("quantized knob:1.52742 took:4.7", "quantized knob", "1.52742"),
        (EXACT, "legal_ttt_exact val_loss", "1.50000000 val_bpb:0.50000000"),
        ("ttt_chunk [3/31] bpb=1.779804 time=1.1s", "ttt_chunk [3/31] bpb", "1.779804"),
        ("audit violations:0 share:0.1", "audit violations", "0"),
    ],
)
def test_digits_are_compared_and_times_are_not(line, what, digits):
    assert COMPARED.match(line).group("what", "digits") == (what, digits)


@pytest.mark.parametrize(
    "line", ["legal_ttt eval_time:1ms, peak memory 1 MiB", "warm_up reserve:1 took:2", "settings: SEED=1"]
)
def test_what_depends_on_the_machine_or_the_code_is_not_compared(line):
    assert not COMPARED.match(line)


def test_of_a_step_that_is_done_again_the_last_line_counts():
    again = outcome_of("step:1/2 train_loss:5", "resumed step:0", "step:1/2 train_loss:6", EXACT)
    assert again.digits["step:1/2 train_loss"] == "6" and again.resumed == 1
    assert first_difference(again, outcome_of("step:1/2 train_loss:6 left:3s", EXACT)) == ""


@pytest.mark.parametrize(
    "before, here, told",
    [
        ([EXACT], [EXACT.replace("1.5", "1.6")], "legal_ttt_exact val_loss: 1.50000000 val_bpb:0.50000000"),
        (["quantized knob:2", EXACT], [EXACT], "quantized knob: 2 before, no such line here"),
        ([EXACT], [EXACT, "quantized knob:2"], "quantized knob: no such line before, 2 here"),
        (["quantized knob:2"], ["quantized knob:2"], "before: logs no exact score"),
    ],
)
def test_the_first_difference_is_told(before, here, told):
    assert first_difference(outcome_of(*before), outcome_of(*here)).startswith(told)


def test_a_run_that_fails_is_a_difference():
    failed = Outcome(error="ended with status 2: no such setting")
    assert first_difference(outcome_of(EXACT), failed) == "here: ended with status 2: no such setting"
    assert remark(failed, failed) == "none"


def test_a_program_that_fails_or_never_reaches_the_line_to_be_killed_at_says_so(tmp_path, monkeypatch):
    (tmp_path / "train_gpt.py").write_text(
        "import sys; print('begun'); print('wrong', file=sys.stderr); exit(2)"
    )
    monkeypatch.setitem(same_results.CASES, "fails", Case())
    monkeypatch.setitem(same_results.CASES, "killed", Case(kills=("begun",)))
    assert same_results.run_case("fails", tmp_path).error == "ended with status 2: wrong"
    assert same_results.run_case("killed", tmp_path).error == "no second line begins with 'begun'"


def test_every_programs_artifact_may_have_as_many_bytes(tmp_path):
    limits = set()
    for size in (10, 2000):
        program = tmp_path / str(size)
        program.mkdir()
        (program / "train_gpt.py").write_text("#" * size)
        (values,) = same_results.environments(same_results.CASES["tight"], program)
        limits.add(int(values["ARTIFACT_LIMIT"]) - size)
    assert limits == {same_results.CASES["tight"].room}


# What cannot be compared


def test_bad_arguments_give_one_line(repository, monkeypatch):
    assert commands.fails(same_results.main, "nowhere") == "git knows no revision 'nowhere'"
    assert commands.fails(same_results.main, "HEAD:tools") == "git knows no revision 'HEAD:tools'"
    assert commands.fails(same_results.main, "HEAD", "fast").startswith("no case 'fast'; there are windows ")
    assert commands.fails(same_results.main).startswith("the following arguments are required: revision")
    monkeypatch.setattr(same_results, "ROOT", repository.parent)
    assert commands.fails(same_results.main, "HEAD").startswith("git: fatal: not a git repository")
