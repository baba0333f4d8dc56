"""Check runs that differ in their seed and write a submission's folder from them.

No figure in it is typed by hand.

    python -m tools.reports.submit logs/A.txt logs/B.txt logs/C.txt \\
        --name "My TTT" --author Ada --github-id ada
    python -m tools.reports.submit logs/demo.txt --non-record --only-json submission.json --name Demo

The folder OUT/TRACK/DATE_NAME holds train_gpt.py (out of the logs), README.md, submission.json,
requirements.txt and the logs. What is missing or over a limit is refused, unless --non-record is given: then
README.md and submission.json state it.
"""

import argparse
import datetime
import hashlib
import json
import os
import re
import shlex
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tools.common.cli import ROOT, Parser, ends_in_one_line
from tools.common.tables import table
from tools.reports.runlog import RunLog, latest, read_audit, read_log
from train_gpt import FIELDS, RunError, write_atomically

BYTES = FIELDS["ARTIFACT_LIMIT"].default  # of code and artifact
SECONDS = 600  # of training with calibration, and again of scoring
SEEDS = 3
DESCRIPTIONS = {"README.md", "submission.json"}  # the files that differ if the same runs are described anew
USED = ["SEED", "DATA_PATH", "VOCAB_SIZE", "TRAIN_BATCH_TOKENS"]  # settings that a description needs


class Run(NamedTuple):
    """A run to submit."""

    path: Path  # of the log
    log: RunLog
    audit: dict | None  # what logs/RUN_ID.audit.json holds, if it is there


def text_of(path: Path) -> Path:
    """The text log of a run whose .txt or .jsonl is at path."""
    return path.with_suffix(".txt") if path.suffix == ".jsonl" else path


def read_run(path: Path) -> Run:
    """Returns the log at path and the audit beside it. Raises RunError."""
    log = read_log(path)
    if not log.source:
        raise RunError(f"{path}: the source is in the .txt of the run, which is not beside it")
    if f"val_bpb:{log.final.val_bpb:.8f}\n" not in text_of(path).read_text("utf-8"):
        raise RunError(
            f"{text_of(path)}: lacks the last score of the .jsonl beside it, so it is cut or of another run"
        )
    if lacking := [name for name in USED if name not in log.settings]:
        raise RunError(f"{path}: its settings lack {', '.join(lacking)}; run it again")
    return Run(path, log, read_audit(path))


def plural(count: int, what: str) -> str:
    """Returns a number of things in words."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def is_place(name: str) -> bool:
    """Returns whether a setting says where files are, not what was run."""
    return name in ("RUN_ID", "RESUME") or name.endswith("_PATH")


def settings_run(log: RunLog) -> dict[str, str]:
    """Returns all settings of a run but its seed and places."""
    return {name: value for name, value in log.settings.items() if name != "SEED" and not is_place(name)}


def faults(runs: list[Run]) -> list[str]:
    """Returns why these logs are not of one submission; nothing excuses that."""
    found, seeds = [], {}
    for path, log, audit in runs:
        first, first_log, _ = runs[0]
        if log.source_sha256 != first_log.source_sha256:
            found.append(f"{path}: of another train_gpt.py than {first}")
        mine, others = settings_run(log), settings_run(first_log)
        found += [
            f"{path}: {name}={mine.get(name, '')}, but {first} has {name}={others.get(name, '')}"
            for name in sorted(mine.keys() | others.keys())
            if mine.get(name) != others.get(name)
        ]
        for what, value, other in (
            ("hardware", machine(log), machine(first_log)),
            ("validation tokens", validation_tokens(log), validation_tokens(first_log)),
        ):
            if value != other:
                found.append(f"{path}: {what}: {value}, but {other} in {first}")
        seed = log.settings["SEED"]
        if seed in seeds:
            found.append(f"{path}: SEED={seed}, as in {seeds[seed]}")
        seeds.setdefault(seed, path)
        artifact = path.with_suffix(".bin")
        actual = {"code": log.source_sha256} | (
            {"artifact": hashlib.sha256(artifact.read_bytes()).hexdigest()} if artifact.exists() else {}
        )
        if audit:
            found += [
                f"{path}: the audit beside it is of another {name} "
                f"(SHA-256 {audit['hashes'].get(name)}, not {value})"
                for name, value in actual.items()
                if audit["hashes"].get(name) != value
            ]
    return found


def shortcomings(runs: list[Run], args: argparse.Namespace) -> list[str]:
    """Returns what keeps the runs from being a record."""
    found = [
        f"{option} is missing"
        for option, value in (("--author", args.author), ("--github-id", args.github_id))
        if not value
    ]
    if len(args.logs) < SEEDS:
        found.append(f"{plural(len(args.logs), 'seed')}, where {SEEDS} or more are needed")
    for path, log, audit in runs:
        figures = results(log)
        for what, value, limit, unit in (
            ("training with calibration", figures["train_seconds"], SECONDS, " s"),
            ("scoring", figures["eval_seconds"], SECONDS, " s"),
            ("code and artifact", log.bytes_total, BYTES, " bytes"),
        ):
            if value > limit:
                found.append(
                    f"{path.name}: {what} took {value:,}{unit}, {round(value - limit, 3):,} over the limit "
                    f"of {limit:,}"
                )
        if log.settings.get("AUDIT") == "1" and audit is None:
            found.append(f"{path.name}: AUDIT=1, but {path.stem}.audit.json is not beside it")
        if audit and audit["violations"]:  # their text, as that of errors, may name places
            found.append(f"{path.name}: violations that its audit names: {len(audit['violations'])}")
        if log.events[-1]["event"] == "error":  # an earlier one was got over by resuming
            found.append(f"{path.name}: the run ended in an error that it names")
    return found


def machine(log: RunLog) -> str:
    """Returns hardware and versions in one line."""
    return f"{log.hardware}, torch {log.torch}, Python {log.python}"


def validation_tokens(log: RunLog) -> int | None:
    """Returns how many there are, None if the log does not know."""
    return latest(log.events, "data").get("validation_tokens")


def results(log: RunLog) -> dict[str, float]:
    """Returns the figures of one run. val_loss is in nats per token."""
    training, averaged, *scored = log.stages.values()
    return {
        "val_loss": round(log.final.val_loss, 8),
        "val_bpb": round(log.final.val_bpb, 8),
        "val_bpb_before_quantization": round(averaged.val_bpb, 8),
        "val_bpb_after_quantization": round(log.stages["roundtrip"].val_bpb, 8),
        "steps": log.steps,
        "ms_per_step": round(1000 * training.seconds / max(log.steps, 1), 3),
        "train_seconds": round(training.seconds + averaged.seconds, 3),
        "eval_seconds": round(
            sum(stage.seconds for stage in scored) + latest(log.events, "compiled").get("took", 0), 3
        ),
        "bytes_total": log.bytes_total,
    }


def spread(values: list[float]) -> float | None:
    """Returns the sample standard deviation (n - 1 in the denominator), None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def describe(runs: list[Run], logs: list[str], args: argparse.Namespace) -> dict:
    """Returns what submission.json holds of one or more runs, whose logs are found at `logs` from it."""
    log = runs[0].log
    figures = [results(run.log) for run in runs]
    losses, bpbs = ([figure[name] for figure in figures] for name in ("val_loss", "val_bpb"))
    steps = " / ".join(dict.fromkeys(str(figure["steps"]) for figure in figures))
    last = list(log.stages)[-1]
    return {
        **({"note": args.note} if args.note else {}),
        "author": args.author,
        "github_id": args.github_id,
        "name": args.name,
        "blurb": args.blurb
        or f"{steps} steps of {log.settings['TRAIN_BATCH_TOKENS']} tokens, weights quantized by gptq and "
        "entropy-coded, "
        + ("score-first test-time training" if last == "ttt" else f"{last} scoring"),
        "date": args.date,
        "track": args.track,
        **({"non_record": shortcomings(runs, args)} if args.non_record else {}),
        "val_loss": round(statistics.mean(losses), 8),
        "val_bpb": round(statistics.mean(bpbs), 8),
        "val_loss_std": spread(losses),
        "val_bpb_std": spread(bpbs),
        "seeds": [int(run.log.settings["SEED"]) for run in runs],
        "seed_results": {
            run.log.settings["SEED"]: figure | {"log": name}
            for run, figure, name in zip(runs, figures, logs, strict=False)
        },
        "bytes_total": max(run.log.bytes_total for run in runs),
        "bytes_code": log.bytes_code,
        "hardware": log.hardware,
        "versions": {"torch": log.torch, "python": log.python},
        "data": args.data
        or f"{Path(log.settings['DATA_PATH']).name}, vocabulary of {log.settings['VOCAB_SIZE']} tokens",
        "settings": {
            name: value for name, value in log.changed_settings.items() if name in settings_run(log)
        },
        "source_sha256": log.source_sha256,
    }


def command(settings: dict[str, str], seed: int, hardware: str) -> str:
    """Returns the line that runs train_gpt.py with these settings and this seed."""
    words = [f"{name}={shlex.quote(value)}" for name, value in {"SEED": str(seed), **settings}.items()]
    return " ".join([*words, f"torchrun --standalone --nproc_per_node={hardware.split()[0]} train_gpt.py"])


def readme_text(s: dict) -> str:
    """Returns README.md of the submission whose submission.json holds s."""
    columns = {  # of seed_results; digits after the point in README.md
        "steps": ("steps", 0),
        "ms_per_step": ("ms a step", 2),
        "val_bpb_before_quantization": ("val_bpb before quantization", 5),
        "val_bpb_after_quantization": ("after", 5),
        "val_loss": ("final val_loss", 5),
        "val_bpb": ("final val_bpb", 5),
        "bytes_total": ("bytes", 0),
        "train_seconds": ("train s", 1),
        "eval_seconds": ("eval s", 1),
    }
    figures = s["seed_results"]

    def row(
        title: str, value: Callable[[list[float]], float], names: Iterable[str], more: int = 0
    ) -> list[str]:
        return [
            title,
            *(
                f"{value([figures[name][column] for name in names]):,.{digits + more}f}"
                for column, (_, digits) in columns.items()
            ),
        ]

    rows = [row(seed, statistics.mean, [seed]) for seed in figures]
    several = len(rows) > 1
    statistics_rows = (
        [row("mean", statistics.mean, figures, 1), row("deviation", spread, figures, 1)] if several else []
    )
    versions, best = s["versions"], f"**val_bpb {s['val_bpb']:.5f}**"
    parts = [
        f"# {s['name']}",
        s["blurb"],
        (
            f"{best}, mean of {len(rows)} seeds, standard deviation {s['val_bpb_std']:.6f}; the largest has "
            if several
            else f"{best}, seed {s['seeds'][0]}; "
        )
        + f"{s['bytes_total']:,} bytes, {s['bytes_code']:,} of them code; the limit is {BYTES:,}.",
        f"{s['author'] or 'Author not named'}, "
        f"{'GitHub: ' + s['github_id'] if s['github_id'] else 'no GitHub name'}, {s['date']}.",
    ]
    if "non_record" in s:
        parts += [
            "## Not a record",
            "\n".join(f"- {reason}" for reason in s["non_record"])
            or "It keeps the limits and lacks nothing, but is not submitted as a record.",
        ]
    parts += [
        "## Results",
        table(["seed", *(title for title, _ in columns.values())], rows + statistics_rows, len(columns)),
        f"On {s['hardware']}, torch {versions['torch']}, "
        f"Python {versions['python']}. Data: {s['data']}.\n`train s` is training with averaging and "
        f"calibration, `eval s` all scoring of the artifact; the limit of each is {SECONDS} s."
        + ("\nThe deviation is the sample's (n - 1)." if several else ""),
        "## Settings",
        (
            "Those that are not the defaults of `train_gpt.py`:\n\n"
            + table(
                ["setting", "value"],
                [[f"`{name}`", f"`{value}`" if value else "empty"] for name, value in s["settings"].items()],
            )
            if s["settings"]
            else "The defaults of `train_gpt.py`."
        ),
        "## Reproduce",
        "\n".join(
            [
                "```",
                "pip install -r requirements.txt",
                *(command(s["settings"], seed, s["hardware"]) for seed in s["seeds"]),
                "```",
            ]
        ),
        "`DATA_PATH` and `TOKENIZER_PATH` say where the data and the tokenizer are, if they are not where "
        "the defaults say.\n"
        "Logs: " + ", ".join(f"[{figure['log']}]({figure['log']})" for figure in figures.values()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def json_bytes(s: dict) -> bytes:
    """Returns the file submission.json."""
    return (json.dumps(s, indent=2, ensure_ascii=False) + "\n").encode()


def files_of(runs: list[Run], args: argparse.Namespace) -> dict[str, bytes]:
    """Returns the files of a submission's folder by their names. Raises OSError."""
    stems = [f"train_seed{run.log.settings['SEED']}" for run in runs]
    s = describe(runs, [f"{stem}.txt" for stem in stems], args)
    files = {
        "README.md": readme_text(s).encode(),
        "submission.json": json_bytes(s),
        "train_gpt.py": runs[0].log.source.encode(),
        "requirements.txt": (ROOT / "requirements.txt").read_bytes(),
    }
    for run, stem in zip(runs, stems, strict=False):
        files[f"{stem}.txt"] = text_of(run.path).read_bytes()
        files |= {
            stem + suffix: run.path.with_suffix(suffix).read_bytes()
            for suffix in (".jsonl", ".audit.json")
            if run.path.with_suffix(suffix).exists()
        }
    return files


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write all of the files or, if that fails, none. A folder of the same runs is replaced.

    Raises RunError, OSError.
    """
    if folder.exists():
        old = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for name in sorted((old.keys() | files.keys()) - DESCRIPTIONS):
            if old.get(name) != files.get(name):
                raise RunError(
                    f"{folder}: is there already, of another submission ({name} differs); give another "
                    "--name or --date, or move it away"
                )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".submit-", dir=folder.parent) as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        for name, data in files.items():
            (new / name).write_bytes(data)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


def check_arguments(args: argparse.Namespace) -> None:
    """Tidies them. Raises RunError."""
    for name in ("name", "author", "github_id", "blurb", "note", "data"):
        setattr(args, name, " ".join(getattr(args, name).split()))
    args.track = args.track or ("track_non_record_16mb" if args.non_record else "track_10min_16mb")
    if not re.fullmatch(r"\w[\w.-]*", args.track):
        raise RunError(f"--track {args.track}: name a folder, such as track_10min_16mb")
    args.safe_name = re.sub(r"[^A-Za-z0-9.-]+", "_", args.name).strip("._-")
    if not args.safe_name:
        raise RunError(f"--name {args.name!r}: has no letter or digit for the folder's name")
    try:
        args.date = datetime.date.fromisoformat(args.date).isoformat()
    except ValueError:
        raise RunError(f"--date {args.date}: no date; write it as YYYY-MM-DD") from None


def checked_runs(args: argparse.Namespace) -> list[Run]:
    """Returns the runs of the logs.

    Raises RunError with all reasons that they are no submission, one a line.
    """
    runs, unread = [], []
    for path in args.logs:
        try:
            runs.append(read_run(path))
        except RunError as e:
            unread.append(str(e))
    wrong, lacking = unread + faults(runs), shortcomings(runs, args)
    reasons = wrong + (lacking if not args.non_record else [])
    if reasons:
        hint = "" if wrong else "\n--non-record writes it all the same, and states this in it"
        raise RunError("\n".join(["not a submission, and nothing was written:", *reasons]) + hint)
    return sorted(runs, key=lambda run: int(run.log.settings["SEED"]))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Returns the arguments."""
    parser = Parser(__doc__)
    parser.add_argument("logs", nargs="+", type=Path, metavar="log", help="logs/RUN_ID.txt of a finished run")
    parser.add_argument("--name", required=True, help="title of the submission")
    parser.add_argument("--author", default="", help="who submits")
    parser.add_argument("--github-id", default="", help="the author's name on GitHub")
    parser.add_argument(
        "--blurb", default="", help="the submission in a sentence (steps, quantizer and scoring)"
    )
    parser.add_argument("--note", default="", help="a sentence for the top of submission.json")
    parser.add_argument(
        "--date", default=str(datetime.date.today()), help="day of the runs, YYYY-MM-DD (today)"
    )
    parser.add_argument(
        "--track", default="", help="(track_10min_16mb, with --non-record track_non_record_16mb)"
    )
    parser.add_argument(
        "--data", default="", help="what was trained and scored on, in words (the name of the data's folder)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("records"), help="folder for TRACK/DATE_NAME (%(default)s)"
    )
    parser.add_argument(
        "--non-record", action="store_true", help="allow and state what is missing or over a limit"
    )
    parser.add_argument(
        "--only-json", type=Path, metavar="FILE", help="write no folder, only its submission.json, here"
    )
    return parser.parse_args(argv)


def write_json(runs: list[Run], args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Write only submission.json; return its path and content. Raises OSError."""
    target = args.only_json
    logs = [Path(os.path.relpath(run.path, target.parent)).as_posix() for run in runs]
    s = describe(runs, logs, args)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, json_bytes(s))
    return target, s


def write_submission(runs: list[Run], args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Write the folder; return its path and the content of submission.json. Raises RunError, OSError."""
    target = args.out / args.track / f"{args.date}_{args.safe_name}"
    files = files_of(runs, args)
    write_folder(target, files)
    return target, json.loads(files["submission.json"])


def main(argv: list[str] | None = None) -> None:
    """Write what the arguments ask for."""
    args = parse_arguments(argv)
    with ends_in_one_line():
        check_arguments(args)
        runs = checked_runs(args)
        target, s = (write_json if args.only_json else write_submission)(runs, args)
        score, size = f"val_bpb {s['val_bpb']:.4f}", f"{s['bytes_total']:,} bytes"
        print(f"wrote {target}: {score} of {plural(len(runs), 'run')}, {size}")


if __name__ == "__main__":
    main()
