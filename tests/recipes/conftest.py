"""A tiny checkpoint with a tokenizer, a data file, and an adapter trained on it, made once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from archs import tiny_arch
from recipe_runs import train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qlora_builders import cli, llama, save_checkpoint

SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "hf"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["what comes after one two three four five six"], trainer)

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    arch = tiny_arch(vocab_size=backend.get_vocab_size(), max_position_embeddings=128, **sizes)
    save_checkpoint(llama(arch), path)
    backend.save(str(path / "tokenizer.json"))
    config = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["one", "two", "three", "four", "five", "six"]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [
        {"prompt": f"what comes after {a}", "completion": b} for a, b in itertools.pairwise(words)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines * 4))
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that ends in exit code 2; gives what it says on stderr."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        assert cli.main([str(word) for word in argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    return run


@pytest.fixture(scope="session")
def train_adapter() -> Callable[[Path, Path, Path], Path]:
    """From a checkpoint, rows and a run folder to an adapter that knows the rows by heart."""

    def adapter_of(checkpoint: Path, rows: Path, run: Path) -> Path:
        # the base is random, so the frozen embedding and head could not tell the words apart
        words = ["components=[{match: lm_head, kind: lora, rank: 16, alpha: 32}]", "data.eval=null"]
        words += ["train=[embed_tokens, norm]", "training.max_steps=100", "training.batch_size=20"]
        assert train("finetune", checkpoint, rows, run, *words) == 0
        return run / "adapter"

    return adapter_of


@pytest.fixture(scope="session")
def adapter(
    checkpoint: Path,
    rows: Path,
    train_adapter: Callable[[Path, Path, Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return train_adapter(checkpoint, rows, tmp_path_factory.mktemp("adapter") / "run")
