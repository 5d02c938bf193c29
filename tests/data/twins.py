"""Self-made tokenizers and chat templates that behave as the well-known ones do, for tests that
need no real material.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "The sky is blue and the grass is green. What colour is the sky? It is blue, most of the time.",
    (
        "system user assistant tool Hello there! How are you? I am well, thank you. Be"
        " kind.\n\nMore, please.\n"
    ),
    (
        '{"name": "search", "arguments": {"query": "blue sky"}} ### User:\n### Assistant:\n think'
        " answer"
    ),
] * 4
SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{%"
    " generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content']"
    " }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt"
    " %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITHOUT_PROMPT = CHATML.partition("{% if add_generation_prompt")[0]
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# drops the reasoning of every turn but the last, as the templates of reasoning models do
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not"
    " loop.last %}{{ m['content'].split('</think>')[-1] | trim }}{% elif m['role'] == 'assistant'"
    " and '<think>' not in m['content'] %}{{ '<think>\n\n</think>\n\n' + m['content'] }}{% else"
    " %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt"
    " %}<|im_start|>assistant\n{% endif %}"
)
NEWEST_FIRST = (
    "{% for m in messages | reverse %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{%"
    " endfor %}"
)


def make_tokenizer(
    folder: Path, template: str | None = None, spaces: str = "byte", add_bos: bool = False
) -> Path:
    """Write a fast tokenizer to `folder`. `spaces`: "byte" as gpt2 (blanks trimmed off the
    offsets), or "metaspace" as llama2.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=spaces == "metaspace"))
    if spaces == "byte":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
        )
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL + (alphabet if spaces == "metaspace" else []),
        initial_alphabet=alphabet if spaces == "byte" else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder
