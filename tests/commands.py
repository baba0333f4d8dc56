"""The tools' commands in this process: how they fail."""

import io
from contextlib import redirect_stderr, redirect_stdout

import pytest


def error_of(main, *arguments):
    """What a command says on stderr, without "error: ", when it ends with status 2."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    said = err.getvalue()
    assert end.value.code == 2 and said.startswith("error: ") and said.endswith("\n")
    return said.removeprefix("error: ").removesuffix("\n")


def fails(main, *arguments):
    """error_of(), which is one line."""
    line = error_of(main, *arguments)
    assert "\n" not in line
    return line
