"""What the quickstart's corpus is made of: docstrings, topics of the language and descriptions of
packages, as prose.

Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NOT_GENERAL = ("numpy", "scipy", "torch")  # their own descriptions stay out of the general text
PACKAGES = (
    "datasets",
    "deepspeed",
    "matplotlib",
    "pydantic",
    "rich",
    "scipy",
    "torch",
    "transformers",
)
SKIPPED = {
    "test",
    "tests",
    "_pyinstaller",
    "site-packages",
    "idlelib",
    "lib2to3",
    "encodings",
    "__pycache__",
    "f2py",
    "distutils",
}


@dataclass(frozen=True)
class Entry:
    """One documented object: its public dotted name and its documentation as paragraphs."""

    name: str
    paragraphs: tuple[str, ...]


# ---- reading sources ----------------------------------------------------------------------------


def entries_of(root: Path, package: str) -> list[Entry]:
    """Every documented public function, class, method and module below `root`, in a fixed order."""
    found = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if SKIPPED.intersection(parts) or any(part.startswith("test_") for part in parts):
            continue
        module = [package, *(part for part in parts if not part.startswith("_"))]
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # templates and sources for other Python versions
            continue
        found += [
            Entry(name.removeprefix("."), tuple(paragraphs(doc)))
            for name, doc in _documented(tree, ".".join(module))
        ]
    return [entry for entry in found if entry.paragraphs]


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node)
        if doc:
            yield name, doc
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if (
                isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and child.name[0] != "_"
            ):
                yield from _documented(child, f"{name}.{child.name}")
            elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
                yield from _added_doc(child.value, name)


def _added_doc(call: ast.Call, name: str) -> Iterator[tuple[str, str]]:
    """numpy and scipy attach the documentation of compiled functions by calls: add_newdoc("name",
    "text").
    """
    if getattr(call.func, "id", "") != "add_newdoc":
        return
    texts = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    if len(texts) >= 2:
        target = texts[-2]
        if not target.startswith("_"):
            yield f"{name}.{target}", texts[-1]


def paragraphs(doc: str) -> list[str]:
    """A docstring's prose, by paragraph: no markup, signatures, tables, sections, examples."""
    doc = re.sub(r":[a-zA-Z:+]+:`~?([^`<]+?)(?: <[^`]*>)?`", r"\1", doc)  # roles
    doc = re.sub(r"`+([^`]*)`+_*", r"\1", doc).replace("\\", "")
    doc = re.sub(r"\s*\[\d+\]_|:(?=:)", "", doc)  # citations; code marks
    kept = []
    for block in re.split(r"\n\s*\n", doc):
        lines = [line.rstrip() for line in block.strip("\n").splitlines()]
        if len(lines) > 1 and re.fullmatch(r"\s*[-=~*^]{3,}", lines[1]):
            break  # Parameters, Returns, Notes, ...: what follows is lists
        if not lines or re.match(
            r"\s*(\.\. |>>>|[:@|+*]|\w+\(.*\)(\s*->.*)?$|\w[\w ]*:$|---|===)", lines[0]
        ):
            continue
        if len(kept) and lines[0].startswith("    "):
            continue  # code and definition lists
        text = " ".join(line.strip() for line in lines)
        text = text if text.endswith((".", "!", "?", ":")) else text + "."
        if len(text) > 15 and sum(c.isalpha() or c == " " for c in text) > 0.8 * len(text):
            kept.append(text)
    return kept


def packages_read() -> dict[str, importlib.metadata.Distribution]:
    """PACKAGES and all they require, by name, whatever else is installed beside them."""
    found: dict[str, importlib.metadata.Distribution] = {}
    queue = list(PACKAGES)
    while queue:
        name = canonicalize_name(queue.pop())
        if name not in found:
            try:
                found[name] = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            needs = map(Requirement, found[name].requires or [])
            queue += [
                need.name
                for need in needs
                if not need.marker or need.marker.evaluate({"extra": ""})
            ]
    return dict(sorted(found.items()))


def package_texts(packages: dict[str, importlib.metadata.Distribution]) -> list[str]:
    """The prose of the packages' own descriptions."""
    texts = []
    for name, package in packages.items():
        if name not in NOT_GENERAL:
            body = (package.read_text("METADATA") or "").partition("\n\n")[2]
            body = re.sub(r"```.*?```|<[^>]+>|!\[.*?\]\(.*?\)", "", body, flags=re.S)
            body = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", body)
            texts.append("\n\n".join(p for p in paragraphs(body) if "http" not in p))
    return [text for text in texts if text]


def language_topics(stdlib: Path) -> list[str]:
    """Python's language reference, as `help()` shows it."""
    source = stdlib / "pydoc_data" / "topics.py"
    if not source.exists():
        return []
    strings = [
        n.value for n in ast.walk(ast.parse(source.read_bytes())) if isinstance(n, ast.Constant)
    ]
    texts = [
        "\n\n".join(paragraphs(text))
        for text in strings
        if isinstance(text, str) and len(text) > 500
    ]
    return [text for text in texts if text]
