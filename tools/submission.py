"""Write submission.json from the log of a run, so that no figure in it is typed by hand.

    python tools/submission.py logs/RUN_ID.txt --data "FineWeb, 10 billion tokens, 1,024-token vocabulary"
"""
import argparse
import datetime
import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from runlog import RunLog, read_log  # noqa: E402
from train_gpt import FIELDS, RunError, write_atomically  # noqa: E402

PROGRAM = Path(__file__).resolve().parents[1] / "train_gpt.py"
LIMIT = FIELDS["ARTIFACT_LIMIT"].default  # bytes
PLACES = {"DATA_PATH", "TOKENIZER_PATH", "RUN_ID", "ARTIFACT_PATH"}  # say where files are, not what was run


def submission(log: RunLog, log_path: str, program: str, args: argparse.Namespace) -> dict:
    """What submission.json holds. `program` is the present train_gpt.py. Raises RunError if the run is over the limit."""
    if log.bytes_total > LIMIT:
        raise RunError(f"{log_path}: its submission of {log.bytes_total} bytes is {log.bytes_total - LIMIT} over the limit "
                       f"of {LIMIT}; train a smaller model")
    scored = [stage for name, stage in log.stages.items() if name not in ("training", "averaged")]
    return {
        "name": args.name or f"train_gpt.py, run {log.settings['RUN_ID']}",
        "author": args.author,
        "github_id": args.github_id,
        "blurb": args.blurb or f"{log.steps} steps of {log.settings['TRAIN_BATCH_TOKENS']} tokens, "
                               f"weight average {log.chosen}, weights quantized by {log.settings.get('QUANTIZER', 'rtn')} and entropy-coded, "
                               + ("score-first test-time training" if "ttt" in log.stages else f"{list(log.stages)[-1]} scoring"),
        "date": args.date,
        "track": args.track,
        "val_loss": log.final.val_loss,
        "val_bpb": log.final.val_bpb,
        "bytes_total": log.bytes_total,
        "bytes_code": log.bytes_code,
        "hardware": log.hardware,
        "data": args.data,
        "versions": {"torch": log.torch, "python": log.python, "attention": log.attention},
        "seed": int(log.settings["SEED"]),
        "settings": {name: value for name, value in log.changed_settings.items() if name not in PLACES},
        "steps": log.steps,
        "train_seconds": log.stages["training"].seconds,
        "eval_seconds": round(sum(stage.seconds for stage in scored), 3),
        "log": log_path,
        "source_sha256": log.source_sha256,
        "source_is_present_train_gpt": log.source == program,
    }


def check_arguments(args: argparse.Namespace) -> None:
    """Raises RunError."""
    if not args.data.strip():
        raise RunError('--data is empty: say what the run was trained and scored on, such as "FineWeb"')
    try:
        args.date = datetime.date.fromisoformat(args.date).isoformat()
    except ValueError:
        raise RunError(f"--date {args.date}: no date; write it as YYYY-MM-DD") from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write submission.json from the log of a run.")
    parser.add_argument("log", type=Path, help="logs/RUN_ID.txt of a finished run")
    parser.add_argument("--data", required=True, help="what the run was trained and scored on, in words")
    parser.add_argument("--out", type=Path, default=Path("submission.json"), help="file to write (%(default)s)")
    parser.add_argument("--name", default="", help="title of the submission (the run's id)")
    parser.add_argument("--author", default="", help="who submits (empty)")
    parser.add_argument("--github-id", default="", help="the author's name on GitHub (empty)")
    parser.add_argument("--blurb", default="", help="the submission in a sentence (steps, average and scoring)")
    parser.add_argument("--date", default=str(datetime.date.today()), help="day of the run, YYYY-MM-DD (today)")
    parser.add_argument("--track", default="non_record_16mb", help="track of the competition (%(default)s)")
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
        log_path = Path(os.path.relpath(args.log, args.out.parent)).as_posix()
        result = submission(read_log(args.log), log_path, PROGRAM.read_text("utf-8"), args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    except (RunError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"wrote {args.out}: val_bpb {result['val_bpb']:.4f}, {result['bytes_total']:,} bytes")
    if not result["source_is_present_train_gpt"]:
        print(f"note: {args.log} was made by another version of train_gpt.py than the present one")


if __name__ == "__main__":
    main()
