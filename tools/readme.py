"""Write the generated parts of README.md: the table of settings, and the table of the demo from logs/demo.txt.

    python tools/readme.py           # after a change of a setting, or after `make demo`
    python tools/readme.py --check   # change nothing; fail if README.md is not up to date

A part stands between the lines `<!-- generated: settings -->` or `<!-- generated: demo -->` and `<!-- end -->`.
"""
import argparse
import os
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from runlog import RunLog, read_log  # noqa: E402
from train_gpt import FIELDS, GROUPS, RunError, allowed, show, write_atomically  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
AVERAGES = dict(raw="raw: the last step's", ema="EMA", swa="SWA", ema_swa="mean of EMA and SWA")


def table(header: list[str], rows: list[list[str]], right: int = 0) -> str:
    """A Markdown table with columns of even width; the last `right` ones are aligned to the right."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in [header, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    left = len(header) - right
    lines = ["| " + " | ".join(cell.ljust(width) if i < left else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))) + " |" for row in cells]
    rule = "|".join("-" * (width + 2) if i < left else "-" * (width + 1) + ":" for i, width in enumerate(widths))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def code(text: str) -> str:
    """Set names of settings and files as code: words with an underscore, and with capitals or a dot."""
    return re.sub(r"(?=[\w/=*{},]*[A-Z.])[\w/]*_[\w/.=*{},]*[\w}]", r"`\g<0>`", text)


def settings_part() -> str:
    """What --help says, as a table for each group."""
    groups = {}
    for name, f in FIELDS.items():
        group = groups.setdefault(GROUPS[name], []) if name in GROUPS else group
        default = show(f.default)
        group.append([f"`{name}`", f"`{default}`" if default else "empty", allowed(f), code(f.help)])
    return "\n\n".join(f"**{title[0].upper()}{title[1:]}**\n\n" + table(["setting", "default", "allowed", "meaning"], rows)
                       for title, rows in groups.items())


def demo_part(log: RunLog) -> str:
    """The scores of a run stage by stage. Changes are differences of the rounded scores, so that the columns agree."""
    s, training = log.settings, log.stages["training"]
    titles = dict(training="end of training", averaged=f"averaged weights ({AVERAGES.get(log.chosen, log.chosen)})",
                  roundtrip="int6 roundtrip", sliding=f"sliding windows, stride {s['EVAL_STRIDE']}",
                  ttt="score-first TTT")
    rows, before = [], None
    for name, stage in log.stages.items():
        bpb = round(stage.val_bpb, 4)
        change = "" if before is None else f"{bpb - before:+.4f}"
        rows.append([titles[name], f"{bpb:.4f}", re.sub("[+-](0.0000)", r"\1", change), f"{stage.seconds:.1f}",
                     f"{stage.peak_mib:,}"])
        before = bpb
    tokens = int(s["TRAIN_BATCH_TOKENS"])
    speed = f" at {log.steps * tokens / training.seconds:,.0f} tokens per second" if training.seconds else ""
    header = ["stage", "val_bpb", "change", "seconds", "peak memory (MiB)"]
    return table(header, rows, right=4) + "\n\n" + "\n".join([
        f"{log.steps:,} steps of {tokens:,} tokens{speed}, on {log.hardware}, torch {log.torch}, Python {log.python}.",
        f"The model has {log.parameters:,} parameters; the submission takes {log.bytes_total:,} bytes, {log.bytes_code:,} "
        "of them code.",
        "Lower `val_bpb` is better. The seconds of the averaged weights are those of choosing among the averages;",
        "peak memory is the first process's since its start."])


def replace_part(text: str, name: str, body: str, path: Path) -> str:
    """Raises RunError unless the part's opening line is there once and an end follows it before another part opens."""
    opening = re.split(rf"^(<!-- generated: {name} -->\n)", text, flags=re.MULTILINE)
    if len(opening) != 3:
        raise RunError(f"{path}: has the line `<!-- generated: {name} -->` {len(opening) // 2} times; it must have it once")
    end = re.search(r"^<!-- (end|generated: \w+) -->$", opening[2], re.MULTILINE)
    if not end or end[1] != "end":
        raise RunError(f"{path}: no line `<!-- end -->` closes the part `{name}`; add it where the part is to end")
    return f"{opening[0]}{opening[1]}\n{body}\n\n{opening[2][end.start():]}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the generated parts of README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the file is not up to date")
    parser.add_argument("--readme", type=Path, default=Path(os.path.relpath(ROOT / "README.md")),
                        help="file to write (%(default)s)")
    parser.add_argument("--log", type=Path, default=Path(os.path.relpath(ROOT / "logs/demo.txt")),
                        help="log of the demo (%(default)s)")
    args = parser.parse_args(argv)
    try:
        old = new = args.readme.read_text("utf-8")
        stale = []
        for name, body in (("settings", settings_part()), ("demo", demo_part(read_log(args.log)))):
            before, new = new, replace_part(new, name, body, args.readme)
            stale += [name] if new != before else []
        if args.check and stale:
            raise RunError(f"{args.readme}: not up to date ({' and '.join(stale)}); run `python tools/readme.py`")
        if new != old:
            write_atomically(args.readme, new.encode())
    except (RunError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"{args.readme}: " + (f"wrote {' and '.join(stale)}" if stale else "up to date"))


if __name__ == "__main__":
    main()
