"""From files to batches: rows, chat templates, the tokenizer, labels, order and padding."""

from __future__ import annotations

from qlora_builders.data.batches import Batches
from qlora_builders.data.collate import (
    IGNORE_INDEX,
    Batch,
    Example,
    batch_indices,
    collate,
    collate_packed,
    padded,
)
from qlora_builders.data.dataset import (
    DatasetReport,
    TokenizedDataset,
    build_dataset,
    check_token_range,
)
from qlora_builders.data.files import load_rows
from qlora_builders.data.formats import Prompt, encode_prompt
from qlora_builders.data.messages import spell_asked
from qlora_builders.data.prompts import read_prompts, row_to_prompt
from qlora_builders.data.tokenizer import Tokenizer

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Batches",
    "DatasetReport",
    "Example",
    "Prompt",
    "TokenizedDataset",
    "Tokenizer",
    "batch_indices",
    "build_dataset",
    "check_token_range",
    "collate",
    "collate_packed",
    "encode_prompt",
    "load_rows",
    "padded",
    "read_prompts",
    "row_to_prompt",
    "spell_asked",
]
