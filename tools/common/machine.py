"""What machine this is, and its clock."""

import platform
import time
from collections.abc import Callable
from itertools import pairwise

import torch


def machine_name(device: torch.device) -> str:
    """Returns the name of a GPU, or the kind of CPU and the number of its threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def short_name(device: torch.device) -> str:
    """Returns what files are named after: h100 for an H100 whatever its memory, or the kind of CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()
    return platform.machine()


def now(device: torch.device) -> float:
    """Returns the time in seconds once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(step: Callable[[], object], times: int, device: torch.device) -> list[float]:
    """Returns the seconds of each of several calls."""
    marks = [now(device)]
    for _ in range(times):
        step()
        marks.append(now(device))
    return [b - a for a, b in pairwise(marks)]
