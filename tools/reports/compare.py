"""Compare two sets of runs: final losses, and whether one is better by a margin.

    python -m tools.reports.compare logs/NEW_*.txt --against logs/OLD_*.txt [--margin 0.005]

Any log with an exact score does, also one of the challenge's scripts; the last score in it counts.
"""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

from scipy import stats

from tools.common.cli import Parser, ends_in_one_line
from tools.common.tables import table
from tools.reports.runlog import final_score, latest, read_events
from train_gpt import RunError

LEVEL = 0.01  # p-value below which a difference counts
# Relative difference of nats per token over bits per byte that rounding and a cut end explain
SAME_TEXT = 1e-4


class Score(NamedTuple):
    """The last score of a log."""

    path: Path
    stage: str  # such as legal_ttt
    val_loss: float  # nats per token
    val_bpb: float  # bits per byte
    tokens: int | None  # of the validation text, if the log knows


def read_score(path: Path) -> Score:
    """Returns the last score of the log at path. Raises RunError."""
    loss, bpb = final_score(path)
    if not (loss > 0 and bpb > 0):
        raise RunError(f"{path}: its last score, val_loss {loss} and val_bpb {bpb}, is not above 0")
    events = read_events(path)
    return Score(
        path, latest(events, "stage")["stage"], loss, bpb, latest(events, "data").get("validation_tokens")
    )


def check_text(scores: list[Score]) -> None:
    """Raises RunError if a path is there twice or the scores are of different texts or tokens.

    val_loss / val_bpb is ln 2 x bytes per token, the same for all runs on a text.
    """
    first, paths = scores[0], set()
    for score in scores:
        if score.path.resolve() in paths:
            raise RunError(f"{score.path}: given twice, which is not a second run")
        paths.add(score.path.resolve())
        if None not in (score.tokens, first.tokens) and score.tokens != first.tokens:
            raise RunError(
                f"{score.path}: scored on {score.tokens} tokens, but {first.path} on {first.tokens}; "
                "such losses cannot be compared"
            )
        ratio, other = score.val_loss / score.val_bpb, first.val_loss / first.val_bpb
        if abs(ratio / other - 1) > SAME_TEXT:
            raise RunError(
                f"{score.path}: {ratio / math.log(2):.5f} bytes per token, but {other / math.log(2):.5f} in "
                f"{first.path}: another text or tokenizer; such losses cannot be compared"
            )


class Welch(NamedTuple):
    """Welch's one-sided test that the mean of a is more than `margin` below that of b."""

    t: float
    freedom: float  # degrees of freedom
    p: float  # chance of such a t or a larger one if a is only `margin` better


def freedom(variance_a: float, n_a: int, variance_b: float, n_b: int) -> float:
    """Returns the degrees of freedom of the difference of two means, by Welch and Satterthwaite (Biometrika
    34, 1947).
    """
    a, b = variance_a / n_a, variance_b / n_b
    return (a + b) ** 2 / (a**2 / (n_a - 1) + b**2 / (n_b - 1))


def welch(a: list[float], b: list[float], margin: float) -> Welch:
    """Returns the test of two sides of two values or more, and some spread."""
    result = stats.ttest_ind_from_stats(
        statistics.mean(b) - margin,
        statistics.stdev(b),
        len(b),
        statistics.mean(a),
        statistics.stdev(a),
        len(a),
        equal_var=False,
        alternative="greater",
    )
    return Welch(
        float(result.statistic),
        freedom(statistics.variance(a), len(a), statistics.variance(b), len(b)),
        float(result.pvalue),
    )


def seeds_needed(difference: float, variance_a: float, variance_b: float, margin: float) -> int | None:
    """Returns the least number of runs on each side with which welch() would give p < LEVEL; None if no
    number would.

    `difference`: of the means, b less a.
    """
    if difference <= margin:
        return None

    def enough(n: int) -> bool:
        t = (difference - margin) / math.sqrt((variance_a + variance_b) / n)
        return stats.t.sf(t, freedom(variance_a, n, variance_b, n)) < LEVEL

    high = 2
    while not enough(high):
        high *= 2
    low = high // 2  # not enough, or 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def rows_of(side: str, scores: list[Score]) -> list[list[str]]:
    """Returns the rows of a side's runs, their means and standard deviations."""
    rows = [
        [side, str(score.path), score.stage, f"{score.val_loss:.6f}", f"{score.val_bpb:.6f}"]
        for score in scores
    ]
    values = [[score.val_loss for score in scores], [score.val_bpb for score in scores]]
    rows.append([side, f"mean of {len(scores)}", "", *(f"{statistics.mean(v):.6f}" for v in values)])
    if len(scores) > 1:
        rows.append([side, "standard deviation", "", *(f"{statistics.stdev(v):.6f}" for v in values)])
    return rows


def verdict(a: list[float], b: list[float], margin: float) -> list[str]:
    """Returns what is said of the difference of two sides' losses."""
    if min(len(a), len(b)) < 2:
        return ["no test: it needs two runs or more on each side"]
    if all(min(side) == max(side) for side in (a, b)):
        return ["no test: the runs of each side are alike to the last digit; give runs with different seeds"]
    test, difference = welch(a, b, margin), statistics.mean(b) - statistics.mean(a)
    needed = seeds_needed(difference, statistics.variance(a), statistics.variance(b), margin)
    number = f"no number would do, as the difference is not above {margin:g} nats"
    if needed:
        number = str(needed)
    return [
        f"A is better by more than {margin:g} nats: p = {test.p:.4g} (Welch's one-sided t-test, "
        f"t = {test.t:.3f}, {test.freedom:.2f} degrees of freedom)"
        + (f", below {LEVEL}" if test.p < LEVEL else ""),
        f"seeds on each side for p < {LEVEL} at this difference and spread: {number}",
    ]


def report(a: list[Score], b: list[Score], margin: float) -> str:
    """Returns what is printed of the two sides, `margin` in nats per token. Raises RunError."""
    check_text(a + b)
    nats, bpb = (
        statistics.mean(getattr(score, name) for score in b)
        - statistics.mean(getattr(score, name) for score in a)
        for name in ("val_loss", "val_bpb")
    )
    lines = [
        table(
            ["side", "run", "stage", "val_loss (nats)", "val_bpb"], rows_of("A", a) + rows_of("B", b), right=2
        ),
        "",
        f"B - A: {nats:+.6f} nats, {bpb:+.6f} bpb (above 0: A is better)",
    ]
    if len({score.stage for score in a + b}) > 1:
        lines.append("warning: the last scores are of different stages")
    losses = [[score.val_loss for score in side] for side in (a, b)]
    return "\n".join(lines + verdict(*losses, margin))


def main(argv: list[str] | None = None) -> None:
    """Compare the runs of two sides."""
    parser = Parser(__doc__)
    parser.add_argument("a", nargs="+", type=Path, metavar="A", help="log of a run that may be better")
    parser.add_argument(
        "--against", nargs="+", type=Path, required=True, metavar="B", help="log of a run to beat"
    )
    parser.add_argument(
        "--margin", type=float, default=0.005, help="nats per token to be better by (%(default)s)"
    )
    args = parser.parse_args(argv)
    with ends_in_one_line():
        if not 0 <= args.margin < math.inf:
            raise RunError(f"--margin {args.margin:g}: must be 0 or above")
        sides = ([read_score(path) for path in side] for side in (args.a, args.against))
        print(report(*sides, args.margin))


if __name__ == "__main__":
    main()
