"""Say in a few lines what each stage of a run did to the score, and why.

python -m tools.reports.summary logs/demo.txt
"""

from pathlib import Path

from tools.common.cli import Parser, ends_in_one_line
from tools.reports.runlog import RunLog, read_log
from train_gpt import FIELDS

# stage: (what it is, is its change of val_bpb as it should be, what to say then, what to say otherwise)
STAGES = {
    "training": (
        "trained",
        lambda change: True,
        "bits per byte of unseen text by the weights of the last step",
        "",
    ),
    "averaged": (
        "averaged",
        lambda change: change < 0.00005,
        "by the exponential average of the weights, if it is on",
        "the average lags behind in so short a run: EMA_DECAY=0",
    ),
    "roundtrip": (
        "artifact",
        lambda change: change < 0.02,
        "what rounding the weights costs",
        "rounding costs more than it should: the limit is low for so many weights",
    ),
    "sliding": (
        "sliding windows",
        lambda change: change < 0,
        "every token sees more of what stands before it",
        "the model makes no use of longer context yet: it saw too few tokens",
    ),
    "streaming": (
        "streaming",
        lambda change: change < 0,
        "in one pass, every token sees a whole window before it",
        "the model makes no use of longer context yet: it saw too few tokens",
    ),
    "ttt": (
        "test-time training",
        lambda change: change <= -0.02,
        "the weights learn from text already scored",
        "little learnt: raise TTT_LR or take smaller chunks",
    ),
}


def report(log: RunLog) -> list[str]:
    """Returns a line for each stage: name, val_bpb, change against the stage before, seconds, explanation."""
    lines, before = [], None
    for name, stage in log.stages.items():
        title, good, text, otherwise = STAGES[name]
        change = 0.0 if before is None else stage.val_bpb - before
        gain = "" if before is None else f"{round(change, 4) + 0.0:+.4f}"
        why = text if good(change) else otherwise
        lines.append(f"{title:18} {stage.val_bpb:.4f} {gain:>8} {stage.seconds:6.1f} s   {why}")
        before = stage.val_bpb
    return lines


def main(argv: list[str] | None = None) -> None:
    """Report on a log."""
    parser = Parser(__doc__)
    parser.add_argument("log", type=Path, help="logs/RUN_ID.txt")
    args = parser.parse_args(argv)
    with ends_in_one_line():
        log = read_log(args.log)
    limit = FIELDS["ARTIFACT_LIMIT"].default
    print("\n".join(report(log)))
    print(f"val_bpb {log.final.val_bpb:.4f}; the submission takes {log.bytes_total:,} of {limit:,} bytes")


if __name__ == "__main__":
    main()
