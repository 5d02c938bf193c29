"""A model folder is loaded as it is or refused by name, sharded or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_tiny_model
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.engine.model_check import check_model, read_head
from grads_ds.engine.strict_loading import check_tensors, held
from ranks import run_on_ranks
from tests.training.test_train import make_config

NORM = "model.norm.weight"
LAYER = "model.layers.1.mlp.up_proj.weight"


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def load(config: Config, sharded: bool) -> Any:
    """What loading says: the problems, or the sum of the tied head."""
    from grads_ds.config.errors import UserError
    from grads_ds.engine.model import frozen_model, load_model

    try:
        if sharded:
            with frozen_model(config, config.model.path):
                return "loaded"
        load_model(config, config.model.path)
    except UserError as error:
        return error.problems
    return "loaded"


def load_each(configs: list[Config], sharded: bool) -> list[Any]:
    return [load(config, sharded) for config in configs]


def test_the_padding_of_a_shard_is_not_looked_at() -> None:
    # three values on two ranks: the second's memory behind its one value was never written
    for rank, wanted in ((0, [1.0, float("nan")]), (1, [1.0])):
        parameter: Any = torch.empty(0)
        parameter.ds_tensor = torch.tensor([1.0, float("nan")])
        parameter.ds_numel, parameter.ds_zero_partition_rank = 3, rank
        torch.testing.assert_close(held(parameter), torch.tensor(wanted), equal_nan=True)
    parameter.ds_zero_partition_rank = 2  # a rank that holds padding alone
    assert len(held(parameter)) == 0
    plain = torch.ones(2, 2)
    assert held(plain) is plain


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(LAYER), f"missing: {LAYER}"),
    "unexpected": (lambda t: t.update(extra=torch.ones(2)), "unexpected: extra"),
    "shape": (lambda t: t.update({NORM: torch.ones(31)}), f"others: {NORM} [31] for [32]"),
    "nan": (lambda t: t[NORM].fill_(float("nan")), f"NaN or infinity: {NORM}"),
    "infinite": (lambda t: t[LAYER][0].fill_(float("inf")), f"NaN or infinity: {LAYER}"),
    "head": (lambda t: t.pop("lm_head.weight"), "missing: lm_head.weight"),
    "integers": (lambda t: t.update({NORM: torch.ones(32).to(torch.int8)}), f"{NORM} (I8)"),
    "complex": (lambda t: t.update({NORM: torch.ones(32) * 1j}), f"{NORM} (C64)"),
    "whole": (lambda t: None, "loaded"),
}


@pytest.mark.parametrize("stage", [0, 3])
def test_tensors_are_refused_by_name_on_every_rank(tmp_path: Path, stage: int) -> None:
    configs = []
    for name, (change, _) in CHANGES.items():
        folder = make_tiny_model(tmp_path / name, tied=False)
        changed(folder, change)
        configs.append(make_config(folder, tmp_path, stage=stage))
    tied = make_tiny_model(tmp_path / "tied", tied=True)  # whose head is in no file
    configs.append(make_config(tied, tmp_path, stage=stage))
    for found in run_on_ranks(2 if stage else 1, load_each, configs, bool(stage)):
        assert found.pop() == "loaded"
        for said, (_, wanted) in zip(found, CHANGES.values(), strict=True):
            assert said == "loaded" if wanted == "loaded" else wanted in said[0], said


def test_a_folder_is_looked_at_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    file = folder / "model.safetensors"
    assert check_model(str(folder)) == []
    whole = file.read_bytes()
    for damaged in (b"", whole[:4], whole[:-1], whole + b"x", b"\xff" * 64, b"not weights at all"):
        file.write_bytes(damaged)
        (found,) = check_model(str(folder))
        assert str(file) in found
    file.write_bytes(whole)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    (found,) = check_model(str(folder))
    assert "an adapter" in found and "somebody/else" in found


def swapped(head: dict[str, Any]) -> None:
    head[NORM]["data_offsets"].reverse()


HEADS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no shape": lambda h: h[NORM].pop("shape"),
    "words": lambda h: h[NORM].update(shape=["32"]),
    "kind": lambda h: h[NORM].update(dtype="F12"),
    "smaller": lambda h: h[NORM].update(dtype="F16"),
    "negative": lambda h: h[NORM]["data_offsets"].__setitem__(0, -4),
    "swapped": swapped,
    "overlap": lambda h: h[NORM].update(data_offsets=[0, 128]),
}


@pytest.mark.parametrize("change", HEADS)
def test_a_head_says_where_each_tensor_lies(tmp_path: Path, tiny_model: Path, change: str) -> None:
    whole = (tiny_model / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    head = json.loads(whole[8 : 8 + length])
    file = tmp_path / "changed.safetensors"

    def write(text: str) -> None:
        head = text.encode()
        file.write_bytes(len(head).to_bytes(8, "little") + head + whole[8 + length :])

    write(json.dumps(head))
    assert len(read_head(file)) == len(head) - 1
    twice = json.dumps({NORM: head[NORM]})[1:-1]
    write(json.dumps(head)[:-1] + ", " + twice + "}")
    with pytest.raises(ValueError, match="cannot be read"):
        read_head(file)
    HEADS[change](head)
    write(json.dumps(head))
    with pytest.raises(ValueError, match="cannot be read"):
        read_head(file)


def found_by(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        check_tensors(config, config.model.path)
    return str(caught.value)


def test_a_tensor_of_two_files_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "a.safetensors", {"format": "pt"})
    save_file({NORM: tensors[NORM] * 7}, folder / "b.safetensors", {"format": "pt"})
    names = dict.fromkeys(tensors, "a.safetensors") | {NORM: "b.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert f"in two files: {NORM}" in found_by(make_config(folder, tmp_path))


def test_a_config_of_which_nothing_can_be_built_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    shape = json.loads((folder / "config.json").read_text())
    for change in ({"model_type": "nobodys"}, {"num_attention_heads": 0}, {"hidden_size": "x"}):
        (folder / "config.json").write_text(json.dumps(shape | change))
        assert "wanted a model that transformers builds" in found_by(make_config(folder, tmp_path))
    for text in ("[]", "{}", '{"model_type": 3}'):
        (folder / "config.json").write_text(text)
        assert "with model_type" in check_model(str(folder))[0]
    for name in ("config.json", "adapter_config.json", "model.safetensors"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
    assert len(check_model(str(folder))) == 3


@pytest.mark.parametrize(
    ("packing", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "requires optimum"),
        ({"quant_method": "awq", "bits": 4}, "requires gptqmodel"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "nobodys"}, "Unknown quantization"),
        ({"bits": 4}, "no `quant_method`"),
        ("4 bits", "AttributeError"),
    ],
)
def test_packed_weights_that_cannot_be_read_here_are_refused(
    tmp_path: Path, packing: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded, whether or not the package is missing here."""
    import transformers.quantizers as packed

    absent = {"quantizer_gptq": "is_optimum_available", "quantizer_awq": "is_gptqmodel_available"}
    for module, asked in (absent | {"quantizer_hqq": "is_hqq_available"}).items():
        monkeypatch.setattr(f"{packed.__name__}.{module}.{asked}", lambda: False)
    folder = make_tiny_model(tmp_path / "model")
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | {"quantization_config": packing}))
    found = found_by(make_config(folder, tmp_path))
    assert "wanted a model that transformers builds" in found and said.lower() in found.lower()


def test_weights_of_older_torch_are_read_and_no_pickle_is_run(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    config = make_config(folder, tmp_path)
    for zipped in (False, True):
        torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
        check_tensors(config, folder)
    torch.save(tensors | {NORM: torch.ones(32, dtype=torch.int8)}, file)
    assert f"{NORM} (torch.int8)" in found_by(config)
    file.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "run").encode() + b"'\ntR.")
    assert "tensors by name" in found_by(config) and not (tmp_path / "run").exists()
    torch.save([1, 2], file)
    assert "tensors by name" in found_by(config)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", 7, None]
)
def test_an_index_names_files_of_its_own_folder_alone(
    tmp_path: Path, tiny_model: Path, name: object, kind: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    index = {"metadata": {}, "weight_map": {NORM: name, LAYER: "gone.safetensors"}}
    (folder / f"{kind}.index.json").write_text(json.dumps(index))
    if kind == "model.safetensors":
        assert check_model(str(folder)) == []  # the whole file is what transformers loads
    (folder / "model.safetensors").unlink()
    outside, gone = sorted(check_model(str(folder)), key=lambda text: "gone" in text)
    assert str(name) in outside and "elsewhere" in outside and "gone.safetensors" in gone


def test_real_models_are_loaded_as_they_are(material: Path, tmp_path: Path) -> None:
    """Names in files and names in models differ in many honest ways; none is refused."""
    from grads_ds.engine.strict_loading import _compare

    folders = sorted({file.parent for file in material.rglob("config.json")})
    looked = 0
    for folder in folders:
        if list(folder.glob("*.safetensors")):
            looked += 1
            _compare(make_config(folder, tmp_path), folder)
    assert looked
