"""How tools/ is put together: no circle, no bent module path, and each command has a --help."""

import ast
import importlib
from graphlib import TopologicalSorter

import pytest

from tools.common.cli import ROOT


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    name_of(path): path.read_text("utf-8") for path in [ROOT / "train_gpt.py", *ROOT.glob("tools/**/*.py")]
}
COMMANDS = sorted(
    name for name, text in SOURCES.items() if '\nif __name__ == "__main__":\n    main()\n' in text
)


def imports_of(text):
    """The modules of this project that a source imports anywhere but inside its functions."""
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & SOURCES.keys()


def test_no_module_imports_itself_by_way_of_others():
    assert list(TopologicalSorter({name: imports_of(text) for name, text in SOURCES.items()}).static_order())


def test_groups_do_not_import_each_other_in_a_circle():
    def group(name):
        return ".".join(name.split(".")[:2])

    graph = {}
    for name, text in SOURCES.items():
        graph.setdefault(group(name), set()).update(
            {group(other) for other in imports_of(text)} - {group(name)}
        )
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("train_gpt") < order.index("tools.common") < order.index("tools.reports")


def test_nothing_bends_the_module_path():
    for path in [*ROOT.glob("tools/**/*.py"), *ROOT.glob("tests/**/*.py"), ROOT / "train_gpt.py"]:
        lines = [line for line in path.read_text("utf-8").splitlines() if "sys.path" in line.split("#")[0]]
        assert not lines or path.name in ("forked.py", "test_layout.py"), f"{path}: {lines}"


def test_every_module_of_tools_is_a_command_or_imported():
    used = set().union(*map(imports_of, SOURCES.values())) | {"tools.run.audit"}  # imported where AUDIT=1
    packages = {name_of(path) for path in ROOT.glob("tools/**/__init__.py")}
    assert not SOURCES.keys() - used - packages - set(COMMANDS) - {"train_gpt"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_answers_help_with_what_it_does(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and said.startswith("usage: ") and module.__doc__.split("\n")[0] in said
    assert f"python -m {name}" in said or f"-m {name}" in said, "an example of its use"
