"""Tokenizer directories made from scratch, and chat templates in the styles found in the field.

The templates are our own writing; each keeps the features of its namesake that matter for
rendering and for finding the assistant's text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from qlora_builders.data import Tokenizer as OurTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog.\n\nA second paragraph, with numbers: 1234!",
    "system user assistant Cutting Knowledge Date: December 2023 Today Date: 26 Jul 2024",
    "What is 2 + 2? It is 4. Who are you? I am a model. Hello there, how are you today?",
    "def f(x):\n    return x + 1\n\n\nüber naïve café 😀",
] * 4

# Refuses conversations that do not alternate, keeps the system text in the first user turn.
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}\
{% set lead = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}\
{% else %}{% set rest = messages %}{% set lead = '' %}{% endif %}\
{% for m in rest %}\
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate user/assistant') }}{% endif %}\
{% if m['role'] == 'user' %}\
{{ bos_token + '[INST] ' + (lead if loop.index0 == 0 else '') + m['content'] | trim + ' [/INST]' }}\
{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""

# Headers, a date, tools, calls that end in <|eom_id|>.
LLAMA31 = """{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set today = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- if messages and messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' ~ today ~ '\\n\\n' }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) ~ '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- system ~ '<|eot_id|>' }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- message.tool_calls[0].function | tojson }}
        {{- '<|eom_id|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' ~ message.content ~ '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' }}
        {{- message.content | trim ~ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

GENERATION = """{% for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Drops the thinking of all but the last turn, so prefixes of a conversation render differently.
THINKING = """{% set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}\
{% endfor %}
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""

TEMPLATES = {
    "llama2": LLAMA2,
    "llama31": LLAMA31,
    "chatml": CHATML,
    "generation": GENERATION,
    "thinking": THINKING,
}

SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
]
_LLAMA3_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


def byte_level_backend(*, with_bos: bool = True) -> Tokenizer:
    """A byte-level BPE with Llama 3's parts, white-space-trimming post-processor included."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if with_bos:
        bos = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
        template = processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos]
        )
        backend.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=True), template]
        )
    return backend


def sentencepiece_backend() -> Tokenizer:
    """A BPE with Llama 2's parts: a prefixed underscore, byte fallback, <s> in front."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    backend = Tokenizer(
        models.BPE(
            vocab=model["vocab"],
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend


def _eos_for(template: str | None) -> str:
    if template in (CHATML, GENERATION, THINKING):
        return "<|im_end|>"
    return "<|end_of_text|>"


@pytest.fixture
def write_tokenizer(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tokenizer directory: kind "byte" or "llama2", further config keys by keyword."""

    def write(
        template: str | None = None, *, kind: str = "byte", with_bos: bool = True, **config: Any
    ) -> Path:
        folder = tmp_path / f"tokenizer_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        if kind == "byte":
            backend = byte_level_backend(with_bos=with_bos)
            named = {"bos_token": "<|begin_of_text|>", "eos_token": _eos_for(template)}
        else:
            backend = sentencepiece_backend()
            named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        backend.save(str(folder / "tokenizer.json"))
        content = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
        if template is not None:
            content["chat_template"] = template
        content.update(config)
        (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def make_tokenizer(write_tokenizer: Callable[..., Path]) -> Callable[..., OurTokenizer]:
    """The same, read back by `Tokenizer.from_dir`."""

    def make(template: str | None = None, **options: Any) -> OurTokenizer:
        return OurTokenizer.from_dir(write_tokenizer(template, **options))

    return make


@pytest.fixture
def templates() -> dict[str, str]:
    """The chat templates by style."""
    return dict(TEMPLATES)


@pytest.fixture
def plain(make_tokenizer: Callable[..., OurTokenizer]) -> OurTokenizer:
    """Without a chat template."""
    return make_tokenizer()


@pytest.fixture
def chatml(make_tokenizer: Callable[..., OurTokenizer]) -> OurTokenizer:
    return make_tokenizer(TEMPLATES["chatml"])
