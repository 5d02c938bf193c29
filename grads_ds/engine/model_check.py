"""Is a folder a model that can be loaded? Looked at without loading it; no torch import.

Reads config.json, the index and the head of every safetensors file. `strict_loading.py` compares
the tensors with the model's own once torch is there.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from grads_ds.config.errors import WRONG_PATH, problem

# the file of a model's weights, or the index of several, in the order transformers looks for them
_LOADED = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_WHERE = "model.path"
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
# bits of an element, by the names that safetensors has
_BITS = (
    dict.fromkeys(("F4",), 4)
    | dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6)
    | dict.fromkeys(("BOOL", "U8", "I8"), 8)
    | dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
    | dict.fromkeys(("I32", "U32", "F32"), 32)
    | dict.fromkeys(("C64", "F64", "I64", "U64"), 64)
)
_HEAD_LARGEST = 100 * 2**20  # bytes; what safetensors itself allows


def check_model(path: str) -> list[str]:
    """Problems of a model folder: absent, no or broken config.json, an adapter, no weights or
    damaged ones, an index that names what is not in the folder.

    Of a hub id the snapshot in the hub's cache is looked at where the hub is not asked
    (HF_HUB_OFFLINE), else whether the hub gives its config.json.
    """
    folder = Path(path)
    if not folder.exists():
        if path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return _hub_problems(path)
        wanted, found = "a Hugging Face folder or hub id", f"nothing at {path}"
        return [problem(_WHERE, wanted, found, "give an existing folder")]
    if not folder.is_dir():
        return [problem(_WHERE, "a folder", f"the file {path}", "give the folder it lies in")]
    problems = _config_problems(folder) + _adapter_problems(folder)
    if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        wanted = f"weights (*.safetensors or *.bin) in {path}"
        return [*problems, problem(_WHERE, wanted, "none", "copy them there")]
    index_problems, files = weight_files(folder)
    problems += index_problems
    for file in files:
        if file.suffix == ".safetensors":
            try:
                read_head(file)
            except (ValueError, IsADirectoryError) as error:
                problems.append(problem(_WHERE, f"weights in {file}", str(error), "copy it anew"))
    return problems


def _hub_problems(name: str) -> list[str]:
    """Problems of the model owner/name."""
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        if constants.HF_HUB_OFFLINE:
            return check_model(snapshot_download(name, local_files_only=True))
        hf_hub_download(name, "config.json")
    except (OSError, HFValidationError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        gone = isinstance(error, LocalEntryNotFoundError)
        why = "nothing of it" if gone else " ".join(str(error).split())[:200]
        wanted = f"the model {name} from the hub or its cache{offline}"
        return [problem(_WHERE, wanted, why, "download it to this machine, or give a folder")]
    return []


def weight_files(folder: Path) -> tuple[list[str], list[Path]]:
    """(problems, files): the files that transformers would load the model's weights from."""
    for whole, index in _LOADED:
        if (folder / whole).is_file():
            return [], [folder / whole]
        if (folder / index).is_file():
            return _indexed(folder, folder / index)
    return [], sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])


def _indexed(folder: Path, index: Path) -> tuple[list[str], list[Path]]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()), key=str)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return [problem(_WHERE, f"an index of weights in {index}", str(error), "restore it")], []
    found, files = [], []
    for name in names:
        file = folder / str(name)
        if Path(str(name)).name != name or name in ("", ".."):
            wanted = f"files of {folder} in {index.name}"
            found.append(problem(_WHERE, wanted, f"{name!r}, which lies elsewhere", "restore it"))
        elif not file.is_file():
            found.append(problem(_WHERE, f"{file}, as {index.name} says", "none", "copy it there"))
        else:
            files.append(file)
    return found, files


def read_head(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file: name -> {"dtype", "shape", "data_offsets"}.

    Raises ValueError, in words, for a file that is no such file, or is cut short; OSError.
    """
    size = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(8)
        (length,) = struct.unpack("<Q", start) if len(start) == 8 else (size,)
        if length > min(size - 8, _HEAD_LARGEST):
            raise ValueError("a file that is no safetensors file, or is cut short")
        try:
            head = json.loads(content.read(length), object_pairs_hook=_each_once)
            tensors = {name: value for name, value in head.items() if name != "__metadata__"}
            end = _end_of_tensors(tensors)
        except (ValueError, KeyError, AttributeError, TypeError, IndexError, RecursionError):
            raise ValueError("a head that cannot be read") from None
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes where its head says {8 + length + end}")
    return tensors


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where it has a key twice, of which readers take different ones."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _end_of_tensors(tensors: dict[str, Any]) -> int:
    """Bytes that the tensors take, which lie one behind the other without gaps.

    Raises ValueError, KeyError or TypeError where a head says anything else.
    """
    end = 0
    for tensor in sorted(tensors.values(), key=lambda value: value["data_offsets"]):
        begin, behind = tensor["data_offsets"]
        shape = tensor["shape"]
        if begin != end or not all(type(n) is int and n >= 0 for n in (begin, behind, *shape)):
            raise ValueError("tensors that overlap, or leave a gap")
        if 8 * (behind - begin) != _BITS[tensor["dtype"]] * math.prod(shape):
            raise ValueError("a tensor of another size than its shape")
        end = behind
    return end


def _config_problems(folder: Path) -> list[str]:
    try:
        shape = json.loads((folder / "config.json").read_bytes())
    except WRONG_PATH as error:
        wanted, found = f"{folder}/config.json", error.strerror or str(error)
        return [problem(_WHERE, wanted, found, "give a Hugging Face model folder")]
    except ValueError as error:
        return [f"{_WHERE}: {folder}/config.json is not valid JSON ({error}); restore the file"]
    if not isinstance(shape, dict) or not isinstance(shape.get("model_type"), str):
        wanted = f"a JSON object with model_type in {folder}/config.json"
        return [problem(_WHERE, wanted, "none", "give a Hugging Face model folder")]
    return []


def _adapter_problems(folder: Path) -> list[str]:
    """A folder with an adapter: transformers would load the base that the adapter names."""
    try:
        text = (folder / "adapter_config.json").read_bytes()
    except FileNotFoundError:
        return []
    except IsADirectoryError:
        found = f"the folder {folder}/adapter_config.json"
        return [problem(_WHERE, "a whole model", found, "move it away")]
    try:
        base = json.loads(text).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    found = f"an adapter in {folder}, of {base or 'a base it does not name'}"
    return [problem(_WHERE, "a whole model", found, "merge it first, or move adapter_config.json")]
