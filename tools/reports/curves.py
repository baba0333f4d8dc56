"""What plots and pages show of runs: their curves, scores, seconds and bytes."""

import math
from pathlib import Path

import numpy as np

from tools.reports.runlog import SCORED_STAGES, latest, read_events
from train_gpt import FIELDS, RunError

LIMIT_SECONDS = 600  # of training with averages and calibration, and of scoring
LIMIT_BYTES = FIELDS["ARTIFACT_LIMIT"].default
STAGES = ["trained", "averaged", "roundtrip", "sliding", "streaming", "TTT"]
# The colours of M. Okabe and K. Ito, which colour-blind people can tell apart; line, marker and hatch do so
# in grey print
LOOKS = [
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#E69F00", (0, (8, 2)), "v"),
    ("#56B4E9", (0, (3, 1, 1, 1, 1, 1)), "P"),
]
PARTS = {
    "steps": ("#0072B2", ""),
    "averages, calibration": ("#56B4E9", "////"),
    "roundtrip": ("#F0E442", ""),
    "sliding": ("#E69F00", "\\\\\\\\"),
    "streaming": ("#E69F00", "xxxx"),
    "TTT": ("#D55E00", ""),
    "warm-up": ("#BBBBBB", ""),
    "score of averaged": ("#CC79A7", "...."),
    "quantizing": ("#009E73", "----"),
    "compiling": ("#777777", "////"),
    "code": ("#CC79A7", "...."),
    "integers' code": ("#0072B2", ""),
    "side information": ("#E69F00", "////"),
    "artifact": ("#56B4E9", ""),
    "code and artifact": ("#009E73", ""),
    "free": ("#FFFFFF", ""),
}


def stage_title(name: str) -> str:
    """A short name of a stage, as the challenge's scripts and this program call them."""
    ours = {title: short.replace("ttt", "TTT") for short, title in SCORED_STAGES.items()}
    return ours.get(name) or next((title for title in STAGES if title.lower() in name), name)


def table(events: list[dict], kind: str, *keys: str) -> np.ndarray:
    """The values (events of the kind, keys) in order; nan where one is absent."""
    rows = [
        [math.nan if event.get(key) is None else event[key] for key in keys]
        for event in events
        if event["event"] == kind
    ]
    return np.array(rows, float).reshape(-1, len(keys))


def known(values: np.ndarray) -> np.ndarray:
    """The rows in which every value is a finite number."""
    return values[np.isfinite(values).all(axis=1)]


def curves(events: list[dict]) -> dict:
    """What is drawn of a run; what its events do not tell is empty.

    Arrays have a row for each point: loss_by_time (training seconds, nats per token), loss_by_tokens (tokens,
    nats per token), multiplier (step, share of the peak learning rate), validations (step, bits per byte),
    ttt (share of the text scored, bits per byte so far). Dicts: experts (name and score: mean weights in
    parts of the text), moments (the step at which SWA began),
    scores (bits per byte after each stage), training, scoring and outside (seconds in each part; outside is
    in no limit), size (bytes in each part). steps: the last one told of. without_ttt: bits per byte of the
    stage before TTT.
    """
    settings = latest(events, "settings").get("settings", {})
    batch = settings.get("TRAIN_BATCH_TOKENS", "")
    step, seconds, loss, multiplier = table(
        events, "step", "step", "train_time", "train_loss", "multiplier"
    ).T
    tokens = step * (int(batch) if batch.isdecimal() else math.nan)
    validations = known(table(events, "validation", "step", "val_bpb"))
    chunks = table(events, "ttt_chunk", "chunk", "chunks", "bpb")

    stages = {
        stage_title(event["stage"]): event
        for event in events
        if event["event"] == "stage" and event.get("stage")
    }
    scores = {title: stage.get("val_bpb") for title, stage in stages.items()}
    trained = latest(events, "trained")
    if len(validations) and (trained or stages):
        scores = {"trained": validations[-1, 1]} | scores
    scores = {title: bpb for title, bpb in scores.items() if bpb is not None and math.isfinite(bpb)}
    before = [title for title in scores if title not in ("trained", "averaged", "TTT")]

    steps = trained.get("train_time")
    if steps is None:  # a run that goes on, or a log without that line
        times = np.concatenate([table(events, kind, "train_time") for kind in ("step", "validation")])
        steps = max(known(times)[:, 0], default=0)
    took = {title: stage.get("eval_time") for title, stage in stages.items()}
    parts = {
        "training": {
            "steps": steps,
            "averages, calibration": (trained.get("with_calibration") or steps) - steps,
        },
        "scoring": {title: ms for title, ms in took.items() if title != "averaged"},
        "outside": {
            "warm-up": 1000 * latest(events, "warm_up").get("took", 0),
            "score of averaged": took.get("averaged"),
            "quantizing": 1000 * latest(events, "quantized").get("took", 0),
            "compiling": 1000 * latest(events, "compiled").get("took", 0),
        },
    }

    swa = latest(events, "swa").get("step")  # of older runs
    size = latest(events, "size")
    artifact, side = size.get("artifact_bytes"), size.get("side_bytes")
    code = size.get("code_bytes", latest(events, "settings").get("code_bytes"))
    if artifact is None or code is None:
        whole = {"code and artifact": size.get("total")}
    else:
        whole = {"code": code} | (
            {"artifact": artifact}
            if side is None
            else {"integers' code": artifact - side, "side information": side}
        )
    return dict(
        loss_by_time=known(np.stack((seconds / 1000, loss), 1)),
        loss_by_tokens=known(np.stack((tokens, loss), 1)),
        multiplier=known(np.stack((step, multiplier), 1)),
        validations=validations,
        moments={} if swa is None else {"SWA": swa},
        steps=max(known(np.concatenate((step, validations[:, 0]))[:, None])[:, 0], default=0),
        scores=scores,
        ttt=known(np.stack((chunks[:, 0] / np.maximum(chunks[:, 1], 1), chunks[:, 2]), 1)),
        experts={
            f"{event['expert']}: {event['bpb']:.4f}": event["weights"]
            for event in events
            if event["event"] == "expert" and event.get("weights")
        },
        without_ttt=scores[before[-1]] if before else None,
        size={part: count for part, count in whole.items() if count},
        **{name: {part: ms / 1000 for part, ms in found.items() if ms} for name, found in parts.items()},
    )


def is_empty(run: dict) -> bool:
    """Returns whether there is nothing to draw of a run."""
    return not (
        run["scores"]
        or any(len(run[name]) for name in ("loss_by_time", "loss_by_tokens", "validations", "ttt"))
    )


def read_runs(paths: list[Path]) -> dict[str, dict]:
    """Returns the curves of the runs of some logs by a name that tells them apart.

    Raises RunError for a log with nothing to show, the same log twice, or too many.
    """
    if len(paths) > len(LOOKS):
        raise RunError(f"{len(paths)} logs: at most {len(LOOKS)} can be told apart; show fewer at once")
    stems = [path.stem for path in paths]
    runs = {
        str(path) if stems.count(path.stem) > 1 else path.stem: curves(read_events(path)) for path in paths
    }
    for path, run in zip(paths, runs.values(), strict=False):
        if is_empty(run):
            raise RunError(f"{path}: nothing to show: it has no step with a loss and no score")
    if len(runs) < len(paths):
        raise RunError("the same log is given twice")
    return runs
