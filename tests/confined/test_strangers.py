"""What strangers write in regexes, tokenizers, YAML and templates ends as one message, or works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_builders.config.own_files import load_yaml
from qlora_builders.confined.process import Limits, OverrunError, ask
from qlora_builders.data import tokenizer
from qlora_builders.data.chat_template import ChatTemplate
from qlora_builders.data.tokenizer import TokenBackend
from qlora_builders.errors import ConfigError, DataError

SMALL = Limits(0.5, 128_000_000, 4_000_000)
NAME = "model.layers.0.self_attn.q_proj" * 2

REGEXES = {
    "repeated groups": "(([a-z._0-9])+)+!",
    "alternatives": "(..|.)*!",
    "nested stars": "((.*)*)*!",
    "two of everything": "(.*.*.*.*.*.*.*.*.*.*)*!",
    "optional letters": "(.?.?)*!",
    "look ahead": "(?=(.+)+!).*",
    "look behind": "(.+)+(?<=!)",
    "back reference": r"(.+)+\1!",
    "counted": "((.{1,60}){1,60}){1,60}!",
}


@pytest.mark.parametrize("name", REGEXES)
def test_regexes(name: str) -> None:
    with pytest.raises(OverrunError, match=r"^takes more than"):
        ask("patterns.matches", [REGEXES[name]], [NAME], True, limits=SMALL)


def test_a_huge_regex_is_refused() -> None:
    (problem,) = ask("patterns.problems", ["(" * 9999 + ")" * 9999], limits=SMALL).value
    assert problem


MODEL = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
GROW = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
LONG = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 99_999}


def nested(key: str) -> str:
    part = f'{{"type": "Sequence", "{key}": ['
    return part * 9999 + "]}" * 9999


def added(count: int) -> list[dict[str, Any]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return [{"id": 2 + i, "content": f"<{i}>" * 9, **flags} for i in range(count)]


TOKENIZERS: dict[str, dict[str, Any]] = {
    "a regex that backtracks": {
        "pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a|a|b)*(a|a|b)*(a|a|b)*!"}}
    },
    "a regex that refers back": {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": r"((a*)*\2)*!"}}},
    "a regex that is none": {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "((("}}},
    "a regex that grows": {
        "pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(((a{999}){999}){999}){999}"}}
    },
    "a normalizer's regex": {
        "normalizer": {**GROW, "pattern": {"Regex": "(a|a|b)*(a|a|b)*(a|a|b)*!"}}
    },
    "doubled forty times": {"normalizer": {"type": "Sequence", "normalizers": [GROW] * 40}},
    "replaced by much": {"normalizer": {"type": "Sequence", "normalizers": [LONG] * 9}},
    "a long prefix": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "a" * 99_999}, LONG, GROW],
        }
    },
    "no model": {"model": None},
    "ids of no size": {"model": {**MODEL, "vocab": {"a": 4294967295}}},
    "a post-processor without its tokens": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
}


# the library's own bound on tries ends these without a match
HARMLESS = {
    "a regex that backtracks",
    "a regex that refers back",
    "a regex that grows",
    "a normalizer's regex",
}

NESTED = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokenizer.json"


def write(file: Path, parts: dict[str, Any]) -> None:
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": MODEL, **parts}))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(name: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "LIMITS", SMALL)
    write(file, TOKENIZERS[name])
    texts = ["ab" * 30_000] * 2
    if name in HARMLESS:
        ids = [encoding.ids.tolist() for encoding in TokenBackend(file).encode(texts)]
        assert ids == [[0, 1] * 30_000] * 2
        return
    with pytest.raises(DataError, match=rf"^{file}: ") as caught:
        TokenBackend(file).encode(texts)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("part", NESTED)
def test_nested_tokenizers(part: str, file: Path) -> None:
    text = json.dumps({"version": "1.0", "added_tokens": [], "model": MODEL})
    file.write_text(text[:-1] + f', "{part}": {nested(NESTED[part])}' + "}")
    with pytest.raises(DataError, match=r"recursion limit exceeded|did not match"):
        TokenBackend(file)


def test_many_added_tokens_work(file: Path) -> None:
    write(file, {"added_tokens": added(20_000)})
    backend = TokenBackend(file)
    assert len(backend.added) == 20_000
    (encoding,) = backend.encode(["a" + "<7>" * 9 + "b"])
    assert encoding.ids.tolist() == [0, 9, 1]


BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
YAML = {
    "bomb": BOMB,
    "bomb of merges": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{k: *a{i - 1}, l: *a{i - 1}}}\n" for i in range(1, 40)),
    "itself": "a: &a [*a]\n",
    "itself in a map": "a: &a {b: *a}\n",
    "deep lists": "a: " + "[" * 9999 + "]" * 9999,
    "deep maps": "a: " + "{b: " * 9999 + "1" + "}" * 9999,
    "deep blocks": "".join(" " * i + "a:\n" for i in range(1500)),
    "aliases of nothing": "a: *b\n",
    "a tag of Python": "a: !!python/object/apply:os.system ['true']\n",
    "a hundred megabytes": "a: b\n" * 20_000_000,
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(name: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(YAML[name])
    with pytest.raises(ConfigError, match=rf"^{file}") as caught:
        load_yaml(file)
    assert len(str(caught.value)) < 2000


SEEN = {
    "environment": "{{ environ }}{{ os }}{{ self }}{{ environment }}",
    "globals of a function": "{{ lipsum.__globals__ }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "code of a global": "{{ raise_exception.__code__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ '' | attr('__class__') }}",
    "format": "{{ '{0.__class__}'.format(lipsum) }}",
    "format map": "{{ '{a.__globals__}'.format_map({'a': lipsum}) }}",
    "cycler": "{{ cycler.__init__.__globals__.os.environ }}",
    "joiner": "{{ joiner.__init__.__globals__['os'].popen('env').read() }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}{{ x }}",
    "context": "{{ self._TemplateReference__context.environment }}",
    "strftime": "{{ strftime_now.__self__.__class__ }}",
    "map": "{{ [lipsum] | map(attribute='__globals__') | list }}",
}


@pytest.mark.parametrize("name", SEEN)
def test_templates_see_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "not for templates")
    try:
        text = ChatTemplate(SEEN[name], special_tokens={}, origin="x").render([])
    except DataError as error:
        text = str(error)
    for secret in ("not for templates", "root:", "PATH=", "'PATH'", "<module", "<class 'function"):
        assert secret not in text
