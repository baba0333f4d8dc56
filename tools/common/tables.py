"""Tables in Markdown."""

import re
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: int = 0) -> str:
    """Returns a Markdown table with columns of even width; the last `right` ones are aligned to the right."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in [header, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    left = len(header) - right
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
    rules = ["-" * (width + 2) if i < left else "-" * (width + 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])


def code(text: str) -> str:
    """Returns a text with names of settings and files set as code: words with an underscore, and with
    capitals or a dot.
    """
    return re.sub(r"(?=[\w/=*{},]*[A-Z.])[\w/]*_[\w/.=*{},]*[\w}]", r"`\g<0>`", text)
