"""The tree at the end of the README: every file with the phrase it opens with.

Reads the files git tracks; prints the tree, or with --write puts it into README.md. A test keeps
the two equal. Run: python scripts/tree.py --write
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
FOLDERS = ("launcher", "grads_ds", "configs", "scripts", "docker", "docs")
PLACE = re.compile(r"(?<=## Where things are\n\n).*?(?=\n\[CONTRIBUTING)", re.DOTALL)
WIDTH = 96  # characters of a phrase


def phrase(file: Path) -> str:
    """What the file says of itself first, cut at a sentence or a comma; nothing for files that
    cannot speak.
    """
    text = (
        file.read_text(errors="replace")
        if file.suffix in (".py", ".sh", ".yaml", ".yml", ".md", "")
        else ""
    )
    if file.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    elif file.suffix == ".md":
        said = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")), "")
    else:
        said = "\n".join(
            line[1:].strip() for line in text.splitlines()[:4] if re.match(r"#[^!]", line)
        )
    said = " ".join(said.split("\n\n")[0].split())
    said = re.split(r"(?<=[a-z0-9)`])[.:] ?(?=[A-Z]|$)", said + " ")[0].strip().rstrip(".")
    while len(said) > WIDTH and re.search(r"[,;:] ", said):
        said = re.split(r"[,;:] (?!.*[,;:] )", said)[0]
    return said if len(said) <= WIDTH else said[:WIDTH].rsplit(" ", 1)[0] + " …"


def tree() -> str:
    """The folders and files, indented, each file with its phrase."""
    listing = subprocess.run(
        ["git", "ls-files", *FOLDERS], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout
    lines: list[str] = []
    open_folder: tuple[str, ...] = ()
    for name in listing.splitlines():
        *folders, file = name.split("/")
        if (
            file == "__init__.py"
            or file == "py.typed"
            or (file.endswith((".png", ".json")) and folders[0] == "docs")
        ):
            said = phrase(REPO / name) if file == "__init__.py" else ""
            if not said:
                continue
        for depth in range(len(folders)):
            if tuple(folders[: depth + 1]) != open_folder[: depth + 1]:
                init = REPO.joinpath(*folders[: depth + 1], "__init__.py")
                said = phrase(init) if init.is_file() else ""
                lines.append(
                    f"    {'  ' * depth}{folders[depth] + '/':{30 - 2 * depth}} {said}".rstrip()
                )
        open_folder = tuple(folders)
        if file != "__init__.py":
            width = 30 - 2 * len(folders)
            lines.append(f"    {'  ' * len(folders)}{file:{width}} {phrase(REPO / name)}".rstrip())
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        readme = REPO / "README.md"
        readme.write_text(PLACE.sub(lambda _: tree(), readme.read_text()))
    else:
        print(tree())
