"""README and the pages of qlora_builders/docs, taken apart: blocks, commands, links, tables."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "qlora_builders" / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)(?: +(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_SLURM = {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
_RECORD, _END = "\x1e", "\0"
# bash calls this for every command it does not find, and with an empty PATH it finds none
_RECORDER = f"""
trap '' PIPE  # none reads what another one pipes to it
command_not_found_handle() {{ printf '%s\\0' "$@" $'{_RECORD}'; return 0; }}
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: ```language file."""

    page: Path
    line: int
    language: str
    file: str | None  # what a reader would call it: its text is written there
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2], found[3])
        for found in _BLOCK.finditer(text)
    ]


def commands(script: str, *arguments: str) -> list[list[str]]:
    """What bash would run, each with its arguments as bash reads them.

    The shell is a restricted one: it writes no file, sources none and keeps its PATH.
    """
    done = subprocess.run(
        ["/bin/bash", "--norc", "-r", "-c", _RECORDER + script, "script", *arguments],
        env={"PATH": "/nonexistent", **_SLURM},
        capture_output=True,
        text=True,
        check=True,
    )
    refused = [line for line in done.stderr.splitlines() if "restricted" in line]
    assert all("bin/activate" in line for line in refused), refused
    records = done.stdout.split(_RECORD + _END)
    return [record.split(_END)[:-1] for record in records if record]


def prose(page: Path) -> str:
    """The page without its blocks."""
    return _BLOCK.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    """Inline code."""
    return _SPAN.findall(prose(page))


def links(page: Path) -> list[str]:
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = _HEADING.findall(prose(page))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def table_rows(page: Path) -> Iterator[dict[str, str]]:
    """Rows of all tables, by their column heads."""
    heads: list[str] = []
    for line in prose(page).splitlines():
        if not line.startswith("|"):
            heads = []
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
        if not heads:
            heads = cells
        elif set(line) - set("|-: "):
            yield dict(zip(heads, cells, strict=True))
