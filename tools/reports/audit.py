"""Check the scoring of an artifact against the challenge's rules, without its run.

    python -m tools.reports.audit logs/RUN_ID.bin SHARDS [--tokenizer T.model] \\
        [--compare logs/RUN_ID.audit.json]

SHARDS is the folder of the validation shards. Settings are in the artifact; scoring settings in the
environment win. tools/run/audit.py says what is checked. What is found is compared with what the run's own
audit left beside the artifact. Prints check and result; the exit status is 1 if something is violated, 2 if
the input is unusable.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import train_gpt as T
from tools.common.cli import Parser, ends_in_one_line, one_line
from tools.common.weights import tables_on
from tools.run.audit import CHECKS, Audit

SAME = ("artifact", "code", "scores", "epochs")  # is compared with the run's own audit
Lines = list[tuple[str, str]]  # check, violation


def audit_artifact(path: Path, environ: Mapping[str, str], device: torch.device) -> dict[str, Any]:
    """Returns what Audit.finish() finds after scoring an artifact as EVAL_ONLY=1 does.

    Raises RunError, OSError.
    """
    ours = {"AUDIT": "1", "RESUME": "", "ARTIFACT_PATH": str(path)}
    artifact = T.unpack_artifact(path.read_bytes(), path)
    s = T.settings_for_scoring({**environ, **ours}, artifact, path.stem)
    audit = Audit(s, whole_text=True)
    run = T.Run(s, device, audit)
    run.log.outputs.clear()
    tables, fingerprint = tables_on(device, s)
    tokens = T.validation_tokens(s.data_path, s.vocab_size, s.eval_seq_len).to(device)
    model = T.load_for_scoring(artifact, path, run, T.choose_attention(device)[1], fingerprint)
    T.score_artifact(run, model, tokens, tables)
    return audit.finish()


def differences(found: dict[str, Any], run: dict[str, Any]) -> Lines:
    """Returns where the artifact's own audit has found another thing than the run's. Raises KeyError."""
    lines = []
    for what, own in found["hashes"].items():
        if own != run["hashes"][what]:
            line = f"another {what} than the run's: SHA-256 {own}, not {run['hashes'][what]}"
            lines.append((f"same {what}", line))
    tolerance, hint = 1e-6, ""  # relative
    if found["processes"] != run["processes"]:
        tolerance, hint = 1e-4, f"; repeat it on {run['processes']} processes"
    if found["stages"].keys() != run["stages"].keys():
        line = f"other stages than the run's: {[*found['stages']]}, not {[*run['stages']]}"
        lines.append(("same scores", line))
    for name in found["stages"].keys() & run["stages"].keys():
        own, other = found["stages"][name], run["stages"][name]
        for what in ("val_loss", "val_bpb"):
            if not abs(own[what] - other[what]) <= tolerance * other[what]:
                values = f"{own[what]:.8f}, not {other[what]:.8f}{hint}"
                lines.append(("same scores", f"{name}: another {what} than the run's: {values}"))
        epochs, others = ([chunk[1::3] for chunk in stage.get("chunks", [])] for stage in (own, other))
        wrong = [chunk for chunk in others if chunk not in epochs]
        if wrong:
            line = f"{name}: other epochs than the run's: chunk {wrong[0][0]} is the first; "
            line += "a run that saved time to keep EVAL_MAX_SECONDS cannot be repeated"
            lines.append(("same epochs", line))
    return lines


def table(found: dict[str, Any], compared: bool) -> str:
    """Returns a line for each check: its name, its result and how often it was made."""
    lines = []
    for check in CHECKS:
        made, documents = (
            sum(stage.get("checks", {}).get(what, 0) for stage in found["stages"].values())
            for what in (check, "documents")
        )
        more = f", {documents:,} documents" if check == "bytes" else ""
        result = "VIOLATED" if check in found["failed"] else "ok"
        lines.append(f"{check:<16}{result}" + (f" ({made:,}{more})" if made else ""))
    for what in SAME:
        result = "ok" if compared else "- (no audit of the run to compare with)"
        lines.append(f"same {what:<11}" + ("VIOLATED" if f"same {what}" in found["failed"] else result))
    return "\n".join(lines)


def run_audit(path: Path) -> dict[str, Any]:
    """Returns what the audit of a run found. Raises RunError, OSError."""
    try:
        found = json.loads(path.read_text("utf-8"))
        differences(found, found)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise T.RunError(
            f"{path}: no audit of a run ({one_line(e, 80)}); give another by --compare"
        ) from None
    return found


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(__doc__)
    parser.add_argument("artifact", type=Path, help="logs/RUN_ID.bin")
    parser.add_argument("shards", help="folder of the validation shards")
    parser.add_argument("--tokenizer", help="SentencePiece model (TOKENIZER_PATH)", metavar="FILE")
    parser.add_argument("--compare", type=Path, help="a run's RUN_ID.audit.json", metavar="FILE")
    args = parser.parse_args(argv)
    path = args.compare or args.artifact.with_suffix(".audit.json")
    environ = {**os.environ, "DATA_PATH": args.shards}
    if args.tokenizer:
        environ["TOKENIZER_PATH"] = args.tokenizer
    with ends_in_one_line():
        run = run_audit(path) if args.compare or path.exists() else None
        found = audit_artifact(args.artifact, environ, T.start_processes())
        lines = differences(found, run) if run is not None else []
    found["failed"] += {check for check, _ in lines}
    found["violations"] += [line for _, line in lines]
    if T.rank() == 0:
        print(table(found, run is not None))
        print(*(f"violation: {line}\n" for line in found["violations"]), sep="", end="")
    sys.exit(bool(found["violations"]))


if __name__ == "__main__":
    main()
