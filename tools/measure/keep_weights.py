"""Run train_gpt.py and keep the weights as they are before they are rounded.

    torchrun --standalone --nproc_per_node=2 -m tools.measure.keep_weights FILE

The settings are train_gpt.py's. tools.measure.quant_report and .bench_eval read FILE, which is for
torch.load(weights_only=True): settings and tokenizer as in the artifact, weights.
"""

from pathlib import Path

import train_gpt as T
from tools.common.cli import Parser, check_folder_of, ends_in_one_line
from tools.common.spelling import read_settings
from tools.common.weights import write_weights
from tools.run import HookGroup, make_hooks


class KeepWeights(T.Hooks):
    """Writes the weights that training ends with to a file. The ranks' are the same; rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trainer: T.Trainer | None = None

    def on_step(self, trainer: T.Trainer, last: bool) -> None:
        """Know whose weights they will be."""
        self.trainer = trainer

    def on_stage(self, name: str, score: T.Score) -> None:
        """Write them once the best average is chosen."""
        if name == "averaged" and self.trainer is not None and T.rank() == 0:
            s = self.trainer.s
            _, fingerprint = T.load_tokenizer(s.tokenizer_path, s.vocab_size)
            write_weights(self.path, s, fingerprint, self.trainer.model.state_dict())


def main(argv: list[str] | None = None) -> None:
    """Run the program and keep its weights."""
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="file for the weights")
    args = parser.parse_args(argv)
    with ends_in_one_line():
        check_folder_of(args.file)
        s, device = read_settings(), T.start_processes()
        hooks = HookGroup([*make_hooks(s).hooks, KeepWeights(args.file)])
        try:
            T.execute(T.Run(s, device, hooks, T.Log(hooks)))
        except Exception as e:
            hooks.on_error(e)
            raise


if __name__ == "__main__":
    main()
