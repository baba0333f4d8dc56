"""tools/reports/compare.py: two sets of runs and Welch's test of their difference."""

import math
from pathlib import Path

import pytest
from scipy import stats

from tests import commands
from tools.reports import compare

A, B = [1.99, 2.01], [2.04, 2.06]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes logs of the challenge's scripts, as their last lines, and gives their names."""
    monkeypatch.chdir(tmp_path)

    def write(name, losses, nats_per_bit=1.7, stage="legal_ttt", tokens=None):
        paths = [f"{name}{i}.txt" for i in range(len(losses))]
        for path, loss in zip(paths, losses, strict=False):
            data = f"data parameters:5 validation_tokens:{tokens} training_tokens:9\n" if tokens else ""
            Path(path).write_text(
                f"{data}final_int6_roundtrip_exact val_loss:9.00000000 val_bpb:5.00000000\n"
                f"{stage}_exact val_loss:{loss:.8f} val_bpb:{loss / nats_per_bit:.8f}\n"
            )
        return paths

    return write


def fails(*arguments):
    return commands.fails(compare.main, *arguments)


def test_welch_is_what_is_worked_by_hand():
    # Means 2.00 and 2.05; both variances 2 * 0.01^2 = 0.0002; standard error sqrt(0.0002 / 2 + 0.0002 / 2) =
    # 0.0141421. t = (0.05 - 0.005) / 0.0141421 = 3.181981 with 2 degrees of freedom, where
    # P(T > t) = 1/2 - t / (2 sqrt(2 + t^2)):
    # 0.5 - 3.181981 / (2 * 3.482097) = 0.043094.
    test = compare.welch(A, B, 0.005)
    assert test == pytest.approx((3.181981, 2, 0.043094), abs=1e-6)


@pytest.mark.parametrize(
    "a, b, margin",
    [
        ([1.117, 1.118, 1.1165], [1.122, 1.1231], 0.005),
        ([2.0, 2.1], [2.0, 2.0, 2.5], 0.01),
        ([2.0, 2.1, 2.3], [1.0, 1.5], 0),
    ],
)
def test_welch_is_scipys(a, b, margin):
    result = stats.ttest_ind(b, [value + margin for value in a], equal_var=False, alternative="greater")
    assert compare.welch(a, b, margin) == pytest.approx(
        (result.statistic, result.df, result.pvalue), rel=1e-6
    )


def test_one_side_without_spread_is_tested_against_the_others_spread():
    # b's variance 0.0002 alone: standard error 0.01, t = (0.05 - 0.005) / 0.01 = 4.5 with 1 degree of
    # freedom, where P(T > t) = 1/2 - arctan(t) / pi
    assert compare.welch([2.0, 2.0, 2.0], B, 0.005) == pytest.approx((4.5, 1, 0.5 - math.atan(4.5) / math.pi))


def sample(n, mean, variance):
    """n values with just this mean and variance."""
    values = [i - (n - 1) / 2 for i in range(n)]
    scale = math.sqrt(variance * (n - 1) / sum(value**2 for value in values))
    return [mean + scale * value for value in values]


@pytest.mark.parametrize(
    "difference, variance_a, variance_b",
    [(0.05, 2e-4, 2e-4), (0.05, 2e-4, 0), (0.0075, 1e-6, 4e-6), (0.006, 9e-6, 1e-6), (5.0, 1e-6, 1e-6)],
)
def test_the_number_of_seeds_is_the_least_that_is_enough(difference, variance_a, variance_b):
    needed = compare.seeds_needed(difference, variance_a, variance_b, 0.005)

    def p(n):
        return compare.welch(sample(n, 2, variance_a), sample(n, 2 + difference, variance_b), 0.005).p

    assert p(needed) < 0.01 and (needed == 2 or p(needed - 1) >= 0.01)


def test_no_number_of_seeds_makes_up_for_a_difference_below_the_margin():
    assert compare.seeds_needed(0.004, 1e-6, 1e-6, 0.005) is None
    assert compare.seeds_needed(0.005, 1e-6, 1e-6, 0.005) is None


def test_the_report_has_every_run_means_deviations_and_the_test(write, capsys):
    compare.main([*write("a", A), "--against", *write("b", B)])
    table, summary = capsys.readouterr().out.split("\n\n")
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.split("\n")]
    assert rows[0] == ["side", "run", "stage", "val_loss (nats)", "val_bpb"]
    assert rows[2:] == [  # bpb = nats / 1.7
        ["A", "a0.txt", "legal_ttt", "1.990000", "1.170588"],
        ["A", "a1.txt", "legal_ttt", "2.010000", "1.182353"],
        ["A", "mean of 2", "", "2.000000", "1.176471"],
        ["A", "standard deviation", "", "0.014142", "0.008319"],
        ["B", "b0.txt", "legal_ttt", "2.040000", "1.200000"],
        ["B", "b1.txt", "legal_ttt", "2.060000", "1.211765"],
        ["B", "mean of 2", "", "2.050000", "1.205882"],
        ["B", "standard deviation", "", "0.014142", "0.008319"],
    ]
    # By test_welch_is_what_is_worked_by_hand. Four a side: t = 0.045 / sqrt(0.0004 / 4) = 4.5 with 6 degrees
    # of freedom, above the 3.143 of p = 0.01; three: 3.897 with 4, above 3.747; two: 3.18 with 2, below 6.96.
    assert summary.splitlines() == [
        "B - A: +0.050000 nats, +0.029412 bpb (above 0: A is better)",
        "A is better by more than 0.005 nats: p = 0.04309 (Welch's one-sided t-test, t = 3.182, "
        "2.00 degrees of freedom)",
        "seeds on each side for p < 0.01 at this difference and spread: 3",
    ]


def test_a_larger_margin_is_harder_and_may_be_out_of_reach(write, capsys):
    sides = [*write("a", A), "--against", *write("b", B)]
    compare.main([*sides, "--margin", "0.06"])
    out = capsys.readouterr().out
    # t = (0.05 - 0.06) / 0.0141421 = -0.707107, p = 1/2 + 0.707107 / (2 sqrt(2.5)) = 0.723607
    assert "more than 0.06 nats: p = 0.7236" in out
    assert "no number would do, as the difference is not above 0.06 nats" in out
    assert "--margin -1: must be 0 or above" in fails(*sides, "--margin", "-1")


def test_a_difference_that_counts_is_called_so(write, capsys):
    compare.main([*write("a", [2.0, 2.001, 2.002]), "--against", *write("b", [2.1, 2.101, 2.102])])
    assert (
        ", below 0.01\nseeds on each side for p < 0.01 at this difference and spread: 2\n"
        in capsys.readouterr().out
    )


def test_a_single_run_is_compared_without_a_test(write, capsys):
    compare.main([*write("a", [2.0]), "--against", *write("b", B)])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "B - A: +0.050000 nats, +0.029412 bpb (above 0: A is better)",
        "no test: it needs two runs or more on each side",
    ]


def test_runs_without_any_spread_are_not_tested(write, capsys):
    compare.main([*write("a", [2.0, 2.0]), "--against", *write("b", [2.1, 2.1, 2.1])])
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .startswith("no test: the runs of each side are alike to the last digit")
    )


def test_scores_of_different_stages_are_told(write, capsys):
    compare.main([*write("a", A), "--against", *write("b", B, stage="final_int6_sliding_window")])
    assert "warning: the last scores are of different stages" in capsys.readouterr().out


def test_scores_that_cannot_be_compared_are_refused(write):
    a = write("a", A, tokens=100)
    assert fails(*a, "--against", *write("b", B, nats_per_bit=1.71)).startswith(
        "b0.txt: 2.46701 bytes per token, but 2.45258 in a0.txt: another text or tokenizer"
    )  # 1.71 / ln 2, 1.7 / ln 2
    assert "b0.txt: scored on 90 tokens, but a0.txt on 100" in fails(
        *a, "--against", *write("b", B, tokens=90)
    )
    assert "a1.txt: given twice" in fails(*a, "--against", "a1.txt")
    Path("c.txt").write_text("step:1/2 train_loss:5.0000 train_time:1ms step_avg:1.00ms\n")
    assert "c.txt: has no exact score" in fails("c.txt", "--against", *a)
    assert "none.txt: cannot be read" in fails("none.txt", "--against", *a)
