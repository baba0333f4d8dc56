"""Logs what each member of a mixture gave: its bits per byte, and its weight over the text."""

import torch
from torch import Tensor

from train_gpt import Ensemble, Hooks, Run, Score

PARTS = 50  # of the text, of each of which the mean weights are logged


class Experts(Hooks):
    """Keeps sums of a mixture until its stage has its score, since that knows the bytes."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.nats: list[float] = []
        self.weights: list[list[float]] = []  # of each member, the means of parts

    def on_start(self, run: Run) -> None:
        """Keep the run."""
        self.run = run

    def on_mixture(
        self, ensemble: Ensemble, members: dict[str, Tensor], mixed: Tensor, weights: Tensor
    ) -> None:
        """Keep each member's name, nats and mean weights."""
        self.names = list(members)
        self.nats = [losses.sum(dtype=torch.float64).item() for losses in members.values()]
        parts = weights.tensor_split(min(PARTS, weights.size(1)), dim=1)
        self.weights = torch.stack([part.mean(dim=1) for part in parts], dim=1).tolist()

    def on_stage(self, name: str, score: Score) -> None:
        """Log them."""
        for expert, nats, weights in zip(self.names, self.nats, self.weights, strict=True):
            bpb, mean = score._replace(nats=nats).val_bpb, sum(weights) / len(weights)
            line = f"expert {{expert}} bpb:{{bpb:.6f}} mean_weight:{mean:.4f}"
            self.run.log.event("expert", line, expert=expert, bpb=bpb, weights=weights)
        self.names = []
