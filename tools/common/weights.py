"""Weights to measure: an artifact's, or the unrounded ones that tools/measure/keep_weights.py left."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import train_gpt as T
from tools.common.cli import one_line
from tools.common.spelling import check_names


class Weights(NamedTuple):
    """The content of a file of weights.

    Unrounded ones are an Artifact that stores fp32 tensors and nothing else.
    """

    path: Path
    artifact: T.Artifact
    data: bytes | None  # the file, if it is an artifact

    def settings(self, environ: Mapping[str, str]) -> T.Settings:
        """Returns the settings it was made with, those of the environment over them.

        Raises RunError for another model's.
        """
        check_names(environ)
        return T.parse_settings(environ, self.artifact.settings)

    def model(self, run: T.Run, fingerprint: str) -> T.GPT:
        """Returns its model, ready to score.

        Raises RunError, also if `fingerprint` is not its tokenizer's.
        """
        return T.load_for_scoring(self.artifact, self.path, run, fingerprint)


def read_weights(path: Path) -> Weights:
    """Returns the weights in an artifact or a checkpoint of tools/measure/keep_weights.py.

    Raises RunError, OSError.
    """
    with open(path, "rb") as file:
        if file.read(len(T.MAGIC)) == T.MAGIC:
            data = path.read_bytes()
            return Weights(path, T.unpack_artifact(data, path), data)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        settings = {name: T.parse_value(name.upper(), text) for name, text in found["settings"].items()}
        if settings.keys() != set(T.KEPT):
            raise ValueError("it has other settings")
        weights = {name: w.float() for name, w in found["weights"].items()}
        return Weights(path, T.Artifact(found["tokenizer"], settings, weights), None)
    except Exception as e:  # unpickling raises all sorts
        raise T.RunError(
            f"{path}: neither an artifact nor a checkpoint of this version ({one_line(e, 80)})"
        ) from None


def write_weights(path: Path, s: T.Settings, fingerprint: str, weights: Mapping[str, Tensor]) -> None:
    """Write unrounded weights for read_weights(); `fingerprint` is the tokenizer's. Raises OSError."""
    file, settings = io.BytesIO(), {name: T.show(getattr(s, name)) for name in T.KEPT}
    torch.save({"settings": settings, "tokenizer": fingerprint, "weights": dict(weights)}, file)
    T.write_atomically(path, file.getvalue())


class FullPrecision(T.Run):
    """A run that computes in fp32 on any device."""

    @property
    def dtype(self) -> torch.dtype:
        """fp32."""
        return torch.float32


def tables_on(device: torch.device, s: T.Settings) -> tuple[T.ByteTables, str]:
    """Returns the byte tables of the settings' tokenizer, on a device, and its fingerprint.

    Raises RunError.
    """
    tokenizer, fingerprint = T.load_tokenizer(s.tokenizer_path, s.vocab_size)
    with device:
        return T.byte_tables(tokenizer), fingerprint
