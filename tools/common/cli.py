"""Command lines that say in one line what is wrong."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

import train_gpt as T

ROOT = Path(T.__file__).resolve().parent


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose --help begins with the tool's docstring and whose errors are one line."""

    def __init__(self, doc: str) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        self.exit(2, f"error: {message}; see --help\n")


def positive(text: str) -> int:
    """Returns the integer from 1 that a text stands for. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1")
    return int(text)


def fail(line: str, status: int = 2) -> NoReturn:
    """End the process with a line and a status."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(status)


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """End the process with a line for what the user can put right, status 2, or for Ctrl-C, status 130; end
    the group of processes in any case.
    """
    try:
        yield
    except T.RunError as e:
        fail(str(e))
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}" if e.filename else str(e))
    except KeyboardInterrupt:
        fail("interrupted", 130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def check_folder_of(path: Path | None) -> None:
    """Raises RunError if there is a path, but no folder to write it in."""
    if path is not None and not path.parent.is_dir():
        raise T.RunError(f"{path}: there is no folder {path.parent}")


def say(line: str) -> None:
    """Print a line on rank 0."""
    if T.rank() == 0:
        print(line, flush=True)


def one_line(error: BaseException, most: int = 200) -> str:
    """Returns an error's text as a line of at most so many characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:most]
