"""What `pip install .` gives outside the checkout: one package, its presets and templates, the
command; and pyproject.toml requires what the product imports, no more.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from conftest import REPO
from scripts import lock
from tests.report.synthetic_run import make_run

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
UNIMPORTED = {"setuptools"}  # torch compiles DeepSpeed's extensions with it while running
DATA = {
    "grads_ds/py.typed",
    *(
        f"grads_ds/report/templates/{file.name}"
        for file in REPO.glob("grads_ds/report/templates/*")
    ),
    *(f"grads_ds/config/presets/{file.name}" for file in REPO.glob("grads_ds/config/presets/*")),
}
USE = """
import sys
from pathlib import Path
import grads_ds
from grads_ds.config.load import load_config
from grads_ds.launcher.backends import SUPERVISOR
from grads_ds.report.stage import run_report
assert Path(grads_ds.__file__).is_relative_to(sys.prefix), grads_ds.__file__
assert SUPERVISOR.is_file()
config = load_config(sys.argv[1])
assert config.deepspeed == "zero3" and config.deepspeed_json()["zero_optimization"]["stage"] == 3
run_report(config, Path(config.run_dir))
"""


def names(requirements: list[str]) -> set[str]:
    """Normalised names of the projects in requirement lines."""
    found = (re.match(r"[\w.-]+", line) for line in requirements)
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match}


def imported_projects() -> dict[str, str]:
    """Projects that the product imports anywhere, each with one file that does."""
    projects: dict[str, str] = {}
    provided = packages_distributions()
    for file in [*REPO.glob("grads_ds/**/*.py"), *REPO.glob("launcher/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            for top in {module.split(".")[0] for module in modules}:
                if top not in sys.stdlib_module_names and top != "grads_ds":
                    (project,) = names(provided.get(top, [top])) & names(_known()) or {top}
                    projects[project] = str(file.relative_to(REPO))
    return projects


def _known() -> list[str]:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    return PROJECT["dependencies"] + extras


def test_required_projects_are_those_the_product_imports() -> None:
    required = names(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    optional = names(extras["mpi"] + extras["eval"] + extras["bitsandbytes"])
    imported = imported_projects()
    undeclared = {name: file for name, file in imported.items() if name not in required | optional}
    assert undeclared == {}
    assert required - set(imported) == UNIMPORTED


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files as git has them, links kept: building in the checkout leaves traces."""
    folder = tmp_path_factory.mktemp("sources")
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in listing.splitlines():
        if name.split("/")[0] in ("grads_ds", "launcher", "pyproject.toml", "LICENSE"):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(REPO / name):
                shutil.copy2(REPO / name, target, follow_symlinks=False)
    return folder


def build(sources: Path, kind: str, out: Path) -> Path:
    """One archive of `sources` by the build backend: "wheel" or "sdist"."""
    code = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=sources, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(sources, "wheel", tmp_path_factory.mktemp("wheel"))


def modules_of_the_checkout() -> set[str]:
    """Every module's path inside the package; the launcher's through its link."""
    own = {str(file.relative_to(REPO)) for file in REPO.glob("grads_ds/**/*.py")}
    return own | {f"grads_ds/{file.relative_to(REPO)}" for file in REPO.glob("launcher/**/*.py")}


def test_the_wheel_holds_the_package_alone_with_its_data(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in held if ".dist-info/" not in name}
    assert package == modules_of_the_checkout() | DATA
    (top_level,) = [name for name in held if name.endswith("top_level.txt")]
    assert zipfile.ZipFile(wheel).read(top_level).decode().split() == ["grads_ds"]


def test_a_wheel_made_from_the_sdist_holds_the_same(
    sources: Path, wheel: Path, tmp_path: Path
) -> None:
    with tarfile.open(build(sources, "sdist", tmp_path)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build(unpacked, "wheel", tmp_path)
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_an_installed_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin/python"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    words = [*install, "--no-index", str(wheel)]
    subprocess.run(words, env=environment, check=True, timeout=120)
    # what the package requires, from the environment the tests run in; its own link to the
    # checkout is not followed from here
    (packages,) = place.glob("lib/*/site-packages")
    (packages / "required.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "prepare -> probe" in run(str(place / "bin/grads-ds"), "--help")
    make_run(tmp_path)
    (tmp_path / "config.yaml").write_text(
        f"run_dir: {tmp_path / 'run'}\nmodel: {{path: m}}\ndata: {{train: [rows.jsonl]}}\n"
    )
    run(str(python), "-c", USE, str(tmp_path / "config.yaml"))
    assert "</html>" in (tmp_path / "run/report.html").read_text()


def test_every_pinned_version_has_the_hash_of_its_file() -> None:
    """But those that scripts/lock.py names with a reason."""

    def normal(found: dict[str, str]) -> dict[str, str]:
        return {lock.normal(name): version for name, version in found.items()}

    text = lock.HASHES.read_text()
    hashed = dict(re.findall(r"^(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}$", text, flags=re.M))
    wanted = normal(lock.pins(lock.PINS.read_text()))
    assert normal(hashed) == {n: v for n, v in wanted.items() if n not in lock.LEFT_OUT}
    assert all(name in text and reason in text for name, reason in lock.LEFT_OUT.items())
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == len(hashed)  # nothing stands there without a hash
