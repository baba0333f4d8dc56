"""Finds environment variables that were meant as settings and are none: a typo must not cost a run."""

import difflib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache

from train_gpt import FIELDS, RunError, Settings, parse_settings

# Settings of earlier versions, and the only value that is left of each
RETIRED = {"TIE_EMBEDDINGS": "1", "EMBED_LR": "0.6", "HEAD_LR": "0.008", "TTT_FREEZE_BLOCKS": "0"}
RETIRED |= {"MICRO_BATCH_TOKENS": "0", "SWA_ENABLED": "1", "SWA_EVERY": "50", "MATRIX_STEP": "1"}
RETIRED |= {"LATE_QAT": "0", "LATE_QAT_THRESHOLD": "0.15", "EVAL_TIME_SOFT_CAP_SECONDS": "570"}
RETIRED |= {"HOLDOUT_TOKENS": "524288", "BETA1": "0.9", "ADAM_EPS": "1e-8", "LN_SCALE": "1"}
RETIRED |= {"EVAL_WINDOW": "0", "TTT_WEIGHTS": "all"}
RETIRED |= {"EMA_ENABLED": "1", "VE_ENABLED": "1"}
INSTEAD = {
    "EMA_ENABLED": "; EMA_DECAY=0 switches the average off",
    "VE_ENABLED": "; without VE_LAYERS there are none",
}

# Names that only our settings begin with; what Kubernetes sets for a service; others near a setting's
OWN = re.compile("(TTT|MUON|ROPE|XSA|BIGRAM|EMA|SWA|QK_GAIN|WARMDOWN|LOOP|ATTN_GATE)_", re.I)
SERVICE = re.compile(r"\w+_(SERVICE_HOST|(SERVICE_)?PORT(_\w+)?)")
OTHERS = {"MODEL_DIR", "NUM_THREADS", "SPEED"}
NEAR = 0.87  # difflib's ratio of names that differ in about a seventh of their letters


@cache
def nearest(name: str) -> str:
    """Returns the setting that a variable's name looks like, "" if it is one, was one or is another's."""
    if name in {*FIELDS, *RETIRED, *OTHERS} or SERVICE.fullmatch(name):
        return ""
    swapped = [known for known in FIELDS if sorted(known) == sorted(name.upper())]
    begun = [known for known in FIELDS if "_" in name and known.startswith(f"{name.upper()}_")]
    close = difflib.get_close_matches(name.upper(), FIELDS, 1, 0 if OWN.match(name) else NEAR)
    return next(iter(swapped + begun + close), "")


def same(text: str, other: str) -> bool:
    """Returns whether two texts are equal, or the numbers that they are."""
    with suppress(ValueError):
        return float(text) == float(other)
    return text == other


def check_names(environ: Mapping[str, str]) -> None:
    """Raises RunError for what looks like a setting and is none, or has a value that is not left of it."""
    for name, text in environ.items():
        if nearest(name):
            raise RunError(f"{name} is no setting; the nearest is {nearest(name)}")
        if name in RETIRED and not same(text, RETIRED[name]):
            raise RunError(f"{name}={text!r}: only {RETIRED[name]} is left of it{INSTEAD.get(name, '')}")


def read_settings() -> Settings:
    """Returns the environment's settings. Raises RunError."""
    check_names(os.environ)
    return parse_settings(os.environ)
