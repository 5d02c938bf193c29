"""A GGUF file -> a plain model and its tokenizer, and whether they are the known ones.

Reads one GGUF file with the package `gguf`; writes nothing. Used by real_model.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOLERANCE = 0.02  # nats per token between the losses found and those known
SENTENCES = (
    "The mitochondria produce most of the chemical energy that a cell needs.",
    "In 1969, Apollo 11 landed on the Moon with 2 of its 3 astronauts.",
    "def add(a, b):\n    return a + b\n",
    "La pluie tombe sur les toits de la ville.",
)


SPECIALS = {"bos": "bos", "eos": "eos", "pad": "padding"}


@dataclass(frozen=True)
class RealModel:
    """A model that the registry carries. packages: `name==version`, in the order of the file's
    parts. sha256: of the whole GGUF file. chat: whether `question` goes through the chat template.
    losses: mean nats per token of SENTENCES, with the beginning mark where the model has one.
    """

    packages: tuple[str, ...]
    megabytes: int
    sha256: str
    licence: str
    chat: bool
    question: str
    answer: str
    losses: tuple[float, ...]


def convert(gguf: Path) -> tuple[Any, Any]:
    """(model in float32, tokenizer) of a GGUF file, as a model that was never quantized.

    transformers keeps a mark of the quantization in the config, with which the saved folder would
    not load for training: the weights go into a fresh model without it.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    fields = tokenizer_fields(gguf)
    for role, key in SPECIALS.items():  # not every release of transformers takes over all of them
        if (token := fields.get(f"{key}_token_id")) is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token))
            for settings in (config, model.generation_config):
                setattr(settings, f"{role}_token_id", token)
    tokenizer.model_max_length = config.max_position_embeddings
    if fields.get("pre") == "smollm":
        # transformers reads the byte-level rule alone; the original splits every digit off first
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        )
    return model.eval(), tokenizer


def tokenizer_fields(gguf: Path) -> dict[str, Any]:
    """What the GGUF file says of its tokenizer in single values, by the names after
    `tokenizer.ggml.`: the ids of marks, the way it cuts text before merging.
    """
    from gguf import GGUFReader

    found = {}
    for name, entry in GGUFReader(gguf).fields.items():
        key = name.removeprefix("tokenizer.ggml.")
        if key != name and (key == "pre" or key.endswith("_token_id")):
            found[key] = entry.contents()
    return found


def answer_of(model: Any, tokenizer: Any, spec: RealModel) -> str:
    """What the model says to the question, greedily, in at most 12 tokens."""
    if spec.chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": spec.question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(spec.question, return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    told = said[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(told, skip_special_tokens=True)).strip()


def losses_of(model: Any, tokenizer: Any) -> list[float]:
    """Mean loss of each of SENTENCES, nats per token."""
    import torch

    losses = []
    with torch.no_grad():
        for sentence in SENTENCES:
            ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
            losses.append(round(float(model(input_ids=ids, labels=ids).loss), 4))
    return losses


def check(model: Any, tokenizer: Any, spec: RealModel) -> dict[str, Any]:
    """What the model answers and its losses.

    Raises RuntimeError, with all that differs, unless they are the known ones.
    """
    answer, losses = answer_of(model, tokenizer, spec), losses_of(model, tokenizer)
    wrong = [] if answer.startswith(spec.answer) else [f"answered {answer!r}, not {spec.answer!r}"]
    wrong += [
        f"loss {found:.4f}, not {known:.4f}, on {sentence!r}"
        for sentence, found, known in zip(SENTENCES, losses, spec.losses, strict=True)
        if abs(found - known) > TOLERANCE
    ]
    if wrong:
        raise RuntimeError("the converted model is not the known one: " + "; ".join(wrong))
    return {"question": spec.question, "answer": answer, "losses": losses}
