"""The blocks of code in the documents, and what becomes of each.

A block is fenced and names its language. `bash` and `python` are run, in the order of their page; `json` and `yaml` are parsed;
the rest is shown. An HTML comment on the line before the fence (blank lines between do not count) says what is different:

    <!-- not run: REASON -->    It is not run. There is a count of these, in test_blocks.py.
    <!-- until: WORDS -->       It runs for ever: it gets SIGTERM once it has printed these words.
    <!-- fails -->              It ends with an exit code that is not 0, as the page says.
    <!-- file: NAME -->         It is not run but saved under this name in the folder that the page's other blocks run in.
    <!-- output -->             A `text` block: each of its lines is printed by the block before it, in this order. Numbers may
                                differ, and a line `...` stands for any lines.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
RUN: Final = ("bash", "python")
PARSED: Final = ("json", "yaml")
SHOWN: Final = ("mermaid", "text")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    """Of its fence, from 1."""
    language: str
    marker: str
    """What the comment before it says; empty without one."""
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def directive(self) -> str:
        """The word before the colon of its marker."""
        return self.marker.partition(":")[0].strip()

    @property
    def argument(self) -> str:
        return self.marker.partition(":")[2].strip()


def pages(root: Path = ROOT) -> list[str]:
    """All documents, by their path from the root."""
    found = [root / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md")]
    return [path.relative_to(root).as_posix() for path in (*found, *sorted((root / "docs").rglob("*.md")))]


def blocks(page: str, root: Path = ROOT) -> list[Block]:
    """The blocks of a page, in order.

    Raises:
        ValueError: a block is indented instead of fenced, names no language that is known, or has no end.
    """
    found = []
    lines = (root / page).read_text().splitlines()
    before = ""  # the last line that is not blank
    number = 0
    while number < len(lines):
        line = lines[number]
        fence = re.fullmatch(r"( *)```(.*)", line)
        if fence is None:
            if line.startswith("    ") and not before.startswith(("-", " ")) and not (number and lines[number - 1]):
                raise ValueError(f"{page}:{number + 1}: fence this block, and name its language")
            before = line if line.strip() else before
            number += 1
            continue
        indent, language = len(fence[1]), fence[2].strip()
        if language not in (*RUN, *PARSED, *SHOWN):
            raise ValueError(f"{page}:{number + 1}: the language {language!r} is none of {(*RUN, *PARSED, *SHOWN)}")
        end = next((n for n in range(number + 1, len(lines)) if lines[n].strip() == "```"), None)
        if end is None:
            raise ValueError(f"{page}:{number + 1}: this block has no end")
        marker = re.fullmatch(r" *<!-- (.*) -->", before)
        text = "\n".join(row[indent:] for row in lines[number + 1 : end]) + "\n"
        found.append(Block(page, number + 1, language, marker[1].strip() if marker else "", text))
        before, number = lines[end], end + 1
    return found
