"""Writes docs/tree.md: every file of the project but the tests, with the sentence it opens with.

    python scripts/tree.py            print it
    python scripts/tree.py --write    write docs/tree.md

Reads the files that git tracks, or would track. A test keeps the page equal to the tree.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from itertools import takewhile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs/tree.md"
FOLDERS = ("launcher", "grads_ds", "configs", "scripts", "docker", "docs")
SPEAKS = (".py", ".sh", ".yaml", ".yml", ".md", "")  # suffixes of files with an opening sentence
NAME, WIDTH = 36, 100  # columns of an indented name; of a line
HEAD = """\
# Every file

Those in folders, each with the sentence it opens with; `tests/` is left out, which mirrors the
others. Written by `python scripts/tree.py --write`. The README's map names the few to start with.

"""


def phrase(file: Path) -> str:
    """The first sentence of a Python docstring, a page's title or the comment that opens a file.

    Empty for files of other kinds.
    """
    if file.suffix not in SPEAKS or file.is_dir():
        return ""
    text = file.read_text(errors="replace")
    if file.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    elif file.suffix == ".md":
        said = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")), "")
    else:
        comment = [line for line in text.splitlines() if not line.startswith(("#!", "# syntax="))]
        prose = takewhile(re.compile(r"# ?\S").match, comment)
        said = "\n".join(line.lstrip("# ") for line in prose)
    said = " ".join(said.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9)`\"])[.:] (?=[A-Z])", said)[0].strip().rstrip(".:")


def entry(depth: int, name: str, said: str) -> list[str]:
    """One name at its depth, its phrase in the second column, wrapped there."""
    start = f"{'  ' * depth}{name}"
    if not said:
        return [f"    {start}"]
    lines = textwrap.wrap(said, WIDTH - NAME - 4, break_long_words=False, break_on_hyphens=False)
    if len(start) >= NAME:
        return [f"    {start}", *(f"    {'':{NAME}}{line}" for line in lines)]
    return [f"    {start:{NAME}}{lines[0]}", *(f"    {'':{NAME}}{line}" for line in lines[1:])]


def files() -> list[str]:
    """Paths of the project's files, sorted; packages' markers and images are left out."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [
        name
        for name in sorted(set(listing.splitlines()))
        if not name.endswith(("__init__.py", "py.typed", ".png")) and (REPO / name).exists()
    ]


def tree() -> str:
    """The page: folders and files, indented, each with its phrase."""
    lines: list[str] = []
    open_folder: list[str] = []
    for name in files():
        *folders, file = name.split("/")
        for depth in range(len(folders)):
            if folders[: depth + 1] != open_folder[: depth + 1]:
                init = REPO.joinpath(*folders[: depth + 1], "__init__.py")
                said = phrase(init) if init.is_file() else ""
                lines += entry(depth, folders[depth] + "/", said)
        open_folder = folders
        if (REPO / name).is_symlink():
            file += f" -> {(REPO / name).readlink()}"
        lines += entry(len(folders), file, phrase(REPO / name))
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(tree())
    else:
        print(tree(), end="")
