"""Ids agree with transformers; special tokens are found in every place the files keep them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_builders.data import Tokenizer
from qlora_builders.errors import DataError

Write = Callable[..., Path]

TEXTS = [
    "Hello there",
    "  two spaces\n\n and a tab\t",
    "😀 café",
    "",
    "a <s> b </s> <|eot_id|>c",
    "<|begin_of_text|>hi",
    "unseen: 漢字",
]


def edit(folder: Path, name: str, **keys: Any) -> None:
    file = folder / name
    content = json.loads(file.read_text()) if file.is_file() else {}
    content.update(keys)
    content = {key: value for key, value in content.items() if value is not ...}
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"with_bos": False},
        {"kind": "llama2"},
        {"kind": "llama2", "add_bos_token": False, "add_eos_token": True},
        {"kind": "llama2", "tokenizer_class": "LlamaTokenizer", "add_bos_token": False},
        {"with_bos": False, "add_bos_token": True},
    ],
    ids=lambda options: ", ".join(f"{k}={v}" for k, v in options.items()) or "byte",
)
def test_ids_equal_transformers(options: dict[str, Any], write_tokenizer: Write) -> None:
    from transformers import AutoTokenizer

    folder = write_tokenizer(**options)
    ours, theirs = Tokenizer.from_dir(folder), AutoTokenizer.from_pretrained(folder)
    # transformers 5 rebuilds LlamaTokenizer and swallows the prefix space before another space,
    # which tokenizer.json, transformers 4 and sentencepiece keep.
    rebuilt = options.get("tokenizer_class") == "LlamaTokenizer"
    for text in TEXTS[:1] + TEXTS[2:4] + TEXTS[5:] if rebuilt else TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs(text, add_special_tokens=special)["input_ids"], text
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == expected
        assert ours.encode_batch([text])[0].ids.tolist() == ours.encode(
            text, add_special_tokens=False
        )
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id


def test_truncation_and_padding_baked_into_the_file_are_off(write_tokenizer: Write) -> None:
    from tokenizers import Tokenizer as Backend

    folder = write_tokenizer()
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.from_dir(folder).encode("x y z a b c d e f g")) > 8
    assert len(Tokenizer.from_dir(folder).encode("x")) == 2


def test_offsets_cover_white_space(make_tokenizer: Callable[..., Tokenizer]) -> None:
    tokenizer = make_tokenizer()
    text = "hello !\n\n  world\n"
    offsets = tokenizer.encode_batch([text])[0].offsets
    assert "".join(text[start:end] for start, end in offsets) == text


def test_bos_is_not_doubled_around_a_text_that_spells_it(
    make_tokenizer: Callable[..., Tokenizer],
) -> None:
    tokenizer = make_tokenizer()
    bos = tokenizer.bos_token_id
    assert tokenizer.special_tokens_around([9]) == ([bos], [])
    assert tokenizer.special_tokens_around([bos, 9]) == ([], [])
    assert make_tokenizer(with_bos=False).special_tokens_around([9]) == ([], [])


def test_eos_written_by_the_post_processor(write_tokenizer: Write) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    folder = write_tokenizer()
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>",
        pair="$A $B",
        special_tokens=[("<|begin_of_text|>", 0), ("<|end_of_text|>", 1)],
    )
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.special_tokens_around([9]) == ([0], [1])
    assert tokenizer.encode("") == [0, 1]


def test_stop_tokens_come_from_every_file_and_the_template(
    write_tokenizer: Write, templates: dict[str, str]
) -> None:
    folder = write_tokenizer(templates["chatml"], eos_token="<|end_of_text|>")
    plain = Tokenizer.from_dir(folder)
    assert [plain.token(i) for i in plain.stop_token_ids] == ["<|end_of_text|>", "<|im_end|>"]
    edit(folder, "generation_config.json", eos_token_id=[1, 4, 5])
    edit(folder, "config.json", eos_token_id=6)
    assert Tokenizer.from_dir(folder).stop_token_ids == (1, 4, 5, 6, 7)
    assert plain.eos_token_id == Tokenizer.from_dir(folder).eos_token_id == 1


@pytest.mark.parametrize(
    ("style", "end"), [("llama2", "</s>"), ("llama31", "<|eot_id|>"), ("generation", "<|im_end|>")]
)
def test_the_end_of_turn_token_of_the_template(
    style: str, end: str, templates: dict[str, str], make_tokenizer: Callable[..., Tokenizer]
) -> None:
    tokenizer = make_tokenizer(templates[style], kind="llama2" if style == "llama2" else "byte")
    assert end in [tokenizer.token(i) for i in tokenizer.stop_token_ids]


def test_ids_stand_in_for_missing_names(write_tokenizer: Write) -> None:
    folder = write_tokenizer()
    (folder / "tokenizer_config.json").unlink()
    bare = Tokenizer.from_dir(folder)
    assert (bare.bos_token_id, bare.eos_token_id, bare.stop_token_ids) == (None, None, ())
    edit(folder, "config.json", bos_token_id=0, eos_token_id=[1, 5, 99999])
    tokenizer = Tokenizer.from_dir(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.stop_token_ids == (1, 5)  # 99999 is no token of this vocabulary
    assert Tokenizer.from_dir(folder).stop_strings == ("<|end_of_text|>", "<|eot_id|>")
    edit(folder, "special_tokens_map.json", eos_token={"content": "<|eot_id|>"})
    assert Tokenizer.from_dir(folder).eos_token_id == 5
    edit(folder, "tokenizer_config.json", eos_token="<|eom_id|>", bos_token=None)
    named = Tokenizer.from_dir(folder)
    assert (named.bos_token_id, named.eos_token_id) == (None, 4)  # null means: none
    assert named.stop_strings == ("<|eom_id|>", "<|end_of_text|>", "<|eot_id|>")


def test_a_null_eos_is_taken_from_the_stop_ids(write_tokenizer: Write) -> None:
    folder = write_tokenizer()
    edit(folder, "tokenizer_config.json", eos_token=None)
    edit(folder, "generation_config.json", eos_token_id=[5, 1])
    assert Tokenizer.from_dir(folder).eos_token_id == 5


def test_padding_prefers_a_token_that_ends_nothing(write_tokenizer: Write) -> None:
    folder = write_tokenizer()
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.pad_token_id not in (tokenizer.bos_token_id, *tokenizer.stop_token_ids)
    edit(folder, "tokenizer_config.json", pad_token="<|end_of_text|>")
    assert Tokenizer.from_dir(folder).pad_token_id == 1  # named, so taken
    edit(folder, "tokenizer_config.json", pad_token="[PAD]")  # not in tokenizer.json
    assert Tokenizer.from_dir(folder).pad_token_id == tokenizer.pad_token_id


def test_a_padding_token_without_embedding_row_is_passed_over(write_tokenizer: Write) -> None:
    from tokenizers import Tokenizer as Backend

    folder = write_tokenizer()
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    size = backend.get_vocab_size()
    backend.add_special_tokens(["[PAD]"])
    backend.save(str(folder / "tokenizer.json"))
    assert Tokenizer.from_dir(folder).pad_token_id == size  # spelled like one, so preferred
    edit(folder, "config.json", vocab_size=size)
    assert Tokenizer.from_dir(folder).pad_token_id < size


def test_padding_falls_back_to_eos(write_tokenizer: Write) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    folder = write_tokenizer()
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    edit(folder, "tokenizer_config.json", bos_token=..., eos_token="</s>")
    assert Tokenizer.from_dir(folder).pad_token_id == 2
    edit(folder, "tokenizer_config.json", eos_token=...)
    edit(folder, "config.json", eos_token_id=None, vocab_size=2)
    assert Tokenizer.from_dir(folder).pad_token_id == 0


def test_template_file_wins_and_lists_give_their_default(write_tokenizer: Write) -> None:
    folder = write_tokenizer("from config")
    assert Tokenizer.from_dir(folder).chat_template == "from config"
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    edit(folder, "tokenizer_config.json", chat_template=named)
    assert Tokenizer.from_dir(folder).chat_template == "d"
    (folder / "chat_template.jinja").write_text("from file")
    assert Tokenizer.from_dir(folder).render_chat([]) == "from file"


def test_no_template(make_tokenizer: Callable[..., Tokenizer]) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.chat_template is None
    with pytest.raises(DataError, match=r"no chat template: put a chat_template\.jinja beside"):
        tokenizer.render_chat([])
    with pytest.raises(DataError, match="no chat template"):
        tokenizer.render_each([])


def test_errors_name_file_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such directory: .*nowhere; set checkpoint\.dir"):
        Tokenizer.from_dir(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"no tokenizer\.json in .*empty; set tokenizer\.path to"):
        Tokenizer.from_dir(empty)
    (empty / "tokenizer.model").write_bytes(b"")
    with pytest.raises(DataError, match=r"its tokenizer\.model has to be converted once"):
        Tokenizer.from_dir(empty)
    (empty / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer\.json this can read"):
        Tokenizer.from_dir(empty)


def test_side_files_that_are_no_text(write_tokenizer: Write) -> None:
    folder = write_tokenizer()
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {2**70}}}')
    assert 2**70 not in Tokenizer.from_dir(folder).stop_token_ids  # no id of any tokenizer
    (folder / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"chat_template\.jinja: not UTF-8 text: .* at 3"):
        Tokenizer.from_dir(folder)
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    with pytest.raises(DataError, match=r"tokenizer\.json: holds no tokens"):
        Tokenizer.from_dir(folder)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not JSON: "),
        ("generation_config.json", "[]", r"generation_config\.json: holds a list, and an object"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<eos>"}',
            r"eos_token is '<eos>', which tokenizer\.json does not hold; the two files",
        ),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "rag", "template": ""}]}',
            r"no entry named 'default' with text \(it has: rag\)",
        ),
        (
            "tokenizer_config.json",
            '{"chat_template": [3, {"name": "default", "template": 3}]}',
            r"no entry named 'default' with text \(it has: default\)",
        ),
        ("tokenizer_config.json", "[" * 100_000, "not JSON that can be read: nested too deeply"),
        (
            "tokenizer_config.json",
            '{"chat_template": 3}',
            r"chat_template is a int; a string or a list",
        ),
    ],
)
def test_broken_side_files(name: str, content: str, match: str, write_tokenizer: Write) -> None:
    folder = write_tokenizer()
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=match):
        Tokenizer.from_dir(folder)
