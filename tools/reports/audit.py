"""Check an artifact's scoring against the challenge's rules, once more and without its run.

    python -m tools.reports.audit logs/RUN_ID.bin SHARDS [--tokenizer T.model] \\
        [--compare logs/RUN_ID.audit.json]

SHARDS is the folder of the validation shards; settings are the artifact's, or the environment's. What is
found, as by tools/run/audit.py, is compared with what the run left beside the artifact. The exit status is 1
if something is violated, 2 if the input is unusable.
"""

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import train_gpt as T
from tools.common.cli import Parser, ends_in_one_line, one_line
from tools.common.spelling import check_names
from tools.common.weights import tables_on
from tools.run.audit import CHECKS, Audit

SAME = ("same artifact", "same code", "same scores", "same epochs")  # as in the run's own audit


def audit_artifact(path: Path, environ: Mapping[str, str], device: torch.device) -> dict[str, Any]:
    """Returns Audit.finish() after an artifact was scored as by EVAL_ONLY=1. Raises RunError, OSError."""
    ours = {"AUDIT": "1", "RESUME": "", "ARTIFACT_PATH": str(path)}
    check_names(environ)
    artifact = T.unpack_artifact(path.read_bytes(), path)
    s = T.parse_settings({**environ, **ours}, artifact.settings | {"run_id": path.stem})
    audit = Audit(s, whole_text=True)
    run = T.Run(s, device, audit)
    run.log.outputs.clear()
    tables, fingerprint = tables_on(device, s)
    tokens = T.validation_tokens(s.data_path, s.vocab_size, s.eval_seq_len).to(device)
    model = T.load_for_scoring(artifact, path, run, fingerprint)
    if device.type == "cuda":
        T.compile_scoring(run, model, tables)
    evaluation = T.Evaluation(run, model, tokens, tables)
    run.hooks.on_scoring(evaluation)
    evaluation.run()
    return audit.finish()


def differences(found: dict[str, Any], run: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns check and violation where a run's own audit has found another thing. Raises KeyError."""
    lines, other_than = [], "than the run's:"
    for what, own in found["hashes"].items():
        if own != run["hashes"][what]:
            line = f"another {what} {other_than} SHA-256 {own}, not {run['hashes'][what]}"
            lines.append((f"same {what}", line))
    tolerance, hint = 1e-6, ""  # relative
    if found["processes"] != run["processes"]:
        tolerance, hint = 1e-4, f"; repeat it on {run['processes']} processes"
    stages, others, no_score = found["stages"], run["stages"], {"val_loss": math.nan, "val_bpb": math.nan}
    for name in stages | others:
        own, other = stages.get(name, no_score), others.get(name, no_score)
        for what in no_score:
            if not abs(own[what] - other[what]) <= tolerance * other[what]:
                line = f"{name}: another {what} {other_than} {own[what]:.8f}, not {other[what]:.8f}{hint}"
                lines.append(("same scores", line))
        epochs = [(index, epochs) for _, index, *_, epochs in own.get("chunks", [])]
        wrong = [chunk for _, chunk, *_, n in other.get("chunks", []) if (chunk, n) not in epochs]
        if wrong:
            line = f"{name}: other epochs {other_than} chunk {wrong[0]} is the first; "
            line += "a run that saved time to keep EVAL_MAX_SECONDS cannot be repeated"
            lines.append(("same epochs", line))
    return lines


def table(found: dict[str, Any], compared: bool) -> str:
    """Returns a line for each check: its name, its result, and how often it was made if that varies."""
    lines, made = [], sum((Counter(stage.get("checks")) for stage in found["stages"].values()), Counter())
    for check in CHECKS + SAME:
        result = "ok" if compared or check in CHECKS else "not compared"
        times = f" ({made[check]:,})" if made[check] else ""
        lines.append(f"{check:<16}{'VIOLATED' if check in found['failed'] else result}{times}")
    return "\n".join(lines)


def run_audit(path: Path) -> dict[str, Any]:
    """Returns what the audit of a run found. Raises RunError, OSError."""
    try:
        found = json.loads(path.read_text("utf-8"))
        differences(found, found)
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise T.RunError(f"{path}: no audit of a run ({one_line(e, 80)}); see --compare") from None


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(__doc__)
    parser.add_argument("artifact", type=Path, help="logs/RUN_ID.bin")
    parser.add_argument("shards", help="folder of the validation shards")
    tokenizer = os.environ.get("TOKENIZER_PATH", T.Settings.tokenizer_path)
    parser.add_argument("--tokenizer", default=tokenizer, help="SentencePiece model", metavar="FILE")
    parser.add_argument("--compare", type=Path, help="a run's RUN_ID.audit.json", metavar="FILE")
    args = parser.parse_args(argv)
    path = args.compare or args.artifact.with_suffix(".audit.json")
    environ = os.environ | {"DATA_PATH": args.shards, "TOKENIZER_PATH": args.tokenizer}
    with ends_in_one_line():
        run = run_audit(path) if args.compare or path.exists() else None
        found = audit_artifact(args.artifact, environ, T.start_processes())
        lines = differences(found, run) if run is not None else []
    found["failed"] += [check for check, _ in lines]
    if T.rank() == 0:
        print(table(found, run is not None))
        for line in found["violations"] + [line for _, line in lines]:
            print(f"violation: {line}")
    sys.exit(bool(found["failed"]))


if __name__ == "__main__":
    main()
