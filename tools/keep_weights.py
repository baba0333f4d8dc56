"""Run train_gpt.py and keep the weights as they are before they are rounded, for tools/quant_report.py.

    torchrun --standalone --nproc_per_node=2 tools/keep_weights.py FILE

The settings are train_gpt.py's. FILE is for torch.load(weights_only=True): settings and tokenizer as in the artifact, weights.
"""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as T  # noqa: E402


@contextmanager
def kept_at(path: Path) -> Iterator[None]:
    """While active, train_gpt.py leaves its weights at path before it exports them."""
    export = T.export

    def keep_and_export(s, fingerprint: str, trainer: T.Trainer, *rest) -> bytes:
        file, settings = io.BytesIO(), {name: T.show(getattr(s, name)) for name in T.NAMES}
        torch.save(dict(settings=settings, tokenizer=fingerprint, weights=trainer.model.state_dict()), file)
        T.write_atomically(path, file.getvalue())
        return export(s, fingerprint, trainer, *rest)

    T.export = keep_and_export
    try:
        yield
    finally:
        T.export = export


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).parent.is_dir():
        sys.exit("error: give one file, in a folder that is there, for the weights")
    with kept_at(Path(sys.argv.pop())):
        return T.main()


if __name__ == "__main__":
    sys.exit(main())
