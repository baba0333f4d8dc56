"""Say in a few lines what each stage of a demo run did to the score, and why.

python tools/demo_report.py logs/demo.txt
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from runlog import read_log  # noqa: E402
from train_gpt import RunError  # noqa: E402

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
        "of raw weights, EMA and SWA the lowest loss on held-out training text",
        "chosen by held-out training text, which differs from validation text",
    ),
    "roundtrip": (
        "artifact",
        lambda change: change < 0.02,
        "what rounding the weights costs",
        "rounding costs more than it should: late QAT had too few steps",
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


def report(log) -> list[str]:
    """One line a stage: name, val_bpb, change against the stage before, seconds, explanation."""
    lines, before = [], None
    for name, stage in log.stages.items():
        title, good, text, otherwise = STAGES[name]
        change = 0.0 if before is None else stage.val_bpb - before
        gain = "" if before is None else f"{round(change, 4) + 0.0:+.4f}"
        lines.append(
            f"{title:18} {stage.val_bpb:.4f} {gain:>8} {stage.seconds:6.1f} s   {text if good(change) else otherwise}"
        )
        before = stage.val_bpb
    return lines


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/demo_report.py logs/RUN_ID.txt")
    try:
        log = read_log(Path(sys.argv[1]))
    except RunError as e:
        sys.exit(f"error: {e}")
    print("\n".join(report(log)))
    print(f"val_bpb {log.final.val_bpb:.4f}; the submission takes {log.bytes_total:,} of 16,000,000 bytes")


if __name__ == "__main__":
    main()
