"""qlora_base.json: which base an adapter was trained on, beside the files that PEFT reads.

An adapter corrects one particular base: other weights, another config.json, quantization or dtype
make it another function, and PEFT's files name none of them. The record holds a content hash of the
checkpoint, what of its config.json decides the function, the component plan, the NF4 options of
every quantized slot and the base's dtype.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_builders.checkpoint.formats.hf import function_keys
from qlora_builders.checkpoint.peft.config import CONFIG_FILE
from qlora_builders.checkpoint.tensor_files import LazyTensor
from qlora_builders.errors import CheckpointError, PlanError, listed
from qlora_builders.files.reading import read_json_object
from qlora_builders.models import BaseCheckpoint, ComponentRule
from qlora_builders.modules import CausalLM
from qlora_builders.names import DTYPES
from qlora_builders.tensor import is_quantized
from qlora_builders.tensor.sharded import format_of

BASE_FILE = "qlora_base.json"
ALLOW = "adapter.allow_base_mismatch=true (allow_base_mismatch=True in Python)"
# what a base can differ in
ASPECTS = ("content", "config", "quantization", "dtype")
# sampled bytes: so many windows of so many bytes, evenly spread from the first byte to the last
_WINDOWS, _WINDOW_BYTES = 16, 256


@dataclass(frozen=True)
class BaseRecord:
    """What an adapter says about its base.

    Attributes:
        components, train, dtype: of the model it was trained in; see `llama`.
        checkpoint: None where the weights came from no checkpoint.
        config: `function_keys` of the model.
        nf4: slot -> NF4 options. Older records lack one or all of the three; what is not known is
            not compared.
    """

    components: tuple[ComponentRule, ...]
    train: tuple[str, ...]
    dtype: torch.dtype
    checkpoint: BaseCheckpoint | None
    config: dict[str, Any]
    nf4: dict[str, dict[str, Any]] | None


class ContentHash:
    """A hash of named tensors, whatever order, file, shard or format they come from.

    It covers every name, dtype and shape, and of the bytes of each tensor a fixed sample: all of up
    to 4 KiB, else 16 windows of 256 bytes. Of a quantized weight the codes and scales are sampled,
    so a quantized copy is another content. Equal hashes therefore prove the same layout and the
    same sampled bytes; they do not prove that the bytes between are the same. Another model, a
    fine-tuned, requantized or cast copy differs nearly everywhere and so in the sample; a few
    changed rows of an embedding, say, can go unseen. It guards against mix-ups, not against
    somebody who wants to deceive. Taking the sample while a tensor is loaded costs no reading.
    """

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        parts = [tensor.detach()]
        if is_quantized(tensor):
            digest.update(tensor.format.identity.encode())
            parts = list(tensor.fields)
        for part in parts:
            data = part.contiguous().view(-1).view(torch.uint8)
            windows = [data[start:stop] for start, stop in _windows(data.numel())]
            digest.update(torch.cat(windows).cpu().numpy().tobytes())
        self._digests[name] = digest.hexdigest()

    def add_unread(self, tensor: LazyTensor) -> None:
        """`add(tensor.name, tensor.load())` for a plain tensor; reads the sampled rows alone."""
        assert tensor.load_rows is not None
        digest = hashlib.sha256(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}".encode())
        row = tensor.nbytes // tensor.shape[0]
        for start, stop in _windows(tensor.nbytes):
            first = start // row
            rows = tensor.load_rows(first, -(-stop // row))
            data = rows.view(-1).view(torch.uint8)[start - first * row : stop - first * row]
            digest.update(data.numpy().tobytes())
        self._digests[tensor.name] = digest.hexdigest()

    def hexdigest(self) -> str:
        return hashlib.sha256(json.dumps(sorted(self._digests.items())).encode()).hexdigest()


def _windows(nbytes: int) -> list[tuple[int, int]]:
    """(start, stop) of the sampled bytes."""
    if nbytes <= _WINDOWS * _WINDOW_BYTES:
        return [(0, nbytes)]
    last = nbytes - _WINDOW_BYTES
    starts = [index * last // (_WINDOWS - 1) for index in range(_WINDOWS)]
    return [(start, start + _WINDOW_BYTES) for start in starts]


def hash_tensors(tensors: Iterable[LazyTensor], *, tied: bool) -> str:
    """The content hash of a checkpoint that is not being loaded; it reads every tensor once.

    Args:
        tied: leave out the head, which such a checkpoint may hold or not.
    """
    content = ContentHash()
    for tensor in tensors:
        if not (tied and tensor.name == "lm_head.weight"):
            content.add(tensor.name, tensor.load())
    return content.hexdigest()


def base_record(model: CausalLM) -> dict[str, Any]:
    """The content of qlora_base.json for a model; its weights are not read."""
    spec = model.spec
    groups: dict[str, dict[str, Any]] = {}
    for slot, options in _nf4_slots(model).items():
        groups.setdefault(json.dumps(options), {**options, "slots": []})["slots"].append(slot)
    return {
        "checkpoint": None if spec.base is None else asdict(spec.base),
        "config": function_keys(spec.arch),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "components": [rule.spelled for rule in spec.components],
        "train": list(spec.train),
        "nf4": list(groups.values()),
    }


def read_base_record(directory: Path) -> BaseRecord | None:
    """The record beside an adapter, or None where another tool wrote the adapter.

    Raises:
        CheckpointError: for a record that cannot be understood.
    """
    file = directory / BASE_FILE
    if not file.exists():
        return None
    content = read_json_object(file, expected="the record of a base")
    dtype = content.get("dtype")
    if dtype not in DTYPES:
        raise CheckpointError(f"{file}: dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    checkpoint, nf4 = content.get("checkpoint"), content.get("nf4")
    try:
        slots = None
        if nf4 is not None:
            slots = {
                slot: {name: value for name, value in group.items() if name != "slots"}
                for group in _checked(nf4, list, dict)
                for slot in _checked(group["slots"], list, str)
            }
        return BaseRecord(
            components=tuple(map(ComponentRule.parse, _checked(content["components"], list))),
            train=tuple(_checked(content["train"], list, str)),
            dtype=getattr(torch, dtype),
            checkpoint=None
            if checkpoint is None
            else BaseCheckpoint(**_checked(checkpoint, dict, str)),
            config=_checked(content.get("config", {}), dict),
            nf4=slots,
        )
    except (PlanError, KeyError, TypeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{file}: not a record of a base: {reason}") from error


def _checked(value: Any, kind: type, of: type = object) -> Any:
    """A list or mapping of such elements."""
    elements = value.values() if isinstance(value, dict) else value
    if not isinstance(value, kind) or not all(isinstance(element, of) for element in elements):
        name = "list" if kind is list else "mapping"
        raise TypeError(f"{value!r:.80} is not a {name} of {of.__name__}")
    return value


def check_base(
    record: BaseRecord, model: CausalLM, source: Path, aspects: Collection[str] = ASPECTS
) -> None:
    """
    Args:
        source: the adapter directory, for the message.
        aspects: what to compare; the caller leaves out what its user chose by name.

    Raises:
        CheckpointError: if the model's base is not the recorded one.
    """
    problems, known, own = [], record.checkpoint, model.spec.base
    if "content" in aspects and known and own and known.content_hash != own.content_hash:
        problems.append(
            f"checkpoint: trained on {known.format} {known.content_hash[:12]}, "
            f"here {own.format} {own.content_hash[:12]}"
        )
    if "config" in aspects:
        problems += differing_keys(record.config, function_keys(model.spec.arch))
    slots, recorded = _nf4_slots(model), record.nf4
    if "quantization" in aspects and recorded is not None and slots != recorded:
        differing = sorted(
            slot for slot in slots.keys() | recorded if slots.get(slot) != recorded.get(slot)
        )
        problems.append(f"quantization: the NF4 of these slots differs: {listed(differing)}")
    if "dtype" in aspects and record.dtype != model.spec.dtype:
        problems.append(f"dtype: trained on {record.dtype}, here {model.spec.dtype}")
    if problems:
        config = read_json_object(source / CONFIG_FILE, expected="a PEFT adapter directory")
        name = config.get("base_model_name_or_path")
        raise CheckpointError(
            f"{source / BASE_FILE}: this is not the base that the adapter was trained on "
            f"({'; '.join(problems)}). Load that one{f', {name}' if name else ''}, or accept what "
            f"may be another function with {ALLOW}"
        )


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A message for every key that both have, with another value."""
    problems = []
    for key in sorted(before.keys() & now):
        if before[key] != now[key]:
            was, is_now = ("not set" if d[key] is None else d[key] for d in (before, now))
            problems.append(f"{key} of config.json: trained with {was}, here {is_now}")
    return problems


def _nf4_slots(model: CausalLM) -> dict[str, dict[str, Any]]:
    formats = {name: format_of(parameter) for name, parameter in model.named_parameters()}
    return {
        # NF4 unless it says something else, as in records from before there were other types
        name.removesuffix(".weight"): {"base": format.name, **format.options}
        if format.name != "nf4"
        else format.options
        for name, format in formats.items()
        if format is not None
    }
