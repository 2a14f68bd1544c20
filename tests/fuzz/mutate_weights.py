"""Damage to files of tensors: safetensors by header, description and data; torch's zip files."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from mutate_bytes import any_bytes
from mutate_json import change_json, change_tree, text_or_json

from qlora_builders.tensor.layouts import BNB_JSON, native_suffixes

# ---- safetensors --------------------------------------------------------------------------------


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _with_header(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def change_header(data: bytes, rng: random.Random) -> bytes:
    """The length and the JSON; half of the time the length is made to fit."""
    end = header_end(data)
    if rng.random() < 0.3:
        return any_bytes(data[:end], rng) + data[end:]
    text = text_or_json(data[8:end].rstrip(), rng)
    if rng.random() < 0.5:
        text += b" " * max(0, end - 8 - len(text))
    return _with_header(text, data[end:])


def change_length(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    new = rng.choice((0, 1, length - 1, length + 1, length * 2, 2**32, 2**63, 2**64 - 1, len(data)))
    return new.to_bytes(8, "little") + data[8:]


def change_entries(data: bytes, rng: random.Random) -> bytes:
    """Tensors that lie where others do, have another dtype or shape, or another's place."""
    end = header_end(data)
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    a, b = (header[rng.choice(sorted(header))] for _ in "ab")
    kind = rng.randrange(6)
    if kind == 0:
        a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
    elif kind == 1:
        a["data_offsets"] = b["data_offsets"]
    elif kind == 2:
        a["dtype"] = rng.choice(("BF16", "F16", "F32", "F64", "I16", "U8", "F8_E4M3", "BOOL"))
    elif kind == 3:
        a["shape"] = rng.choice((a["shape"][::-1], [1, *a["shape"]], [], [0], [-1], [2**62, 4]))
    elif kind == 4:
        a["data_offsets"] = [a["data_offsets"][0] + rng.choice((-2, 2)), a["data_offsets"][1]]
    else:
        header[rng.choice(("x", "", "model.norm.weight", "a.inv_freq"))] = dict(a)
    return _with_header(json.dumps(header).encode(), data[end:])


def change_data(data: bytes, rng: random.Random) -> bytes:
    end = header_end(data)
    return data[:end] + any_bytes(data[end:], rng)


def change_values(data: bytes, rng: random.Random) -> bytes:
    """Bytes of the data, none more or less."""
    end = header_end(data)
    at = rng.randrange(end, len(data))
    new = rng.choice((rng.randbytes(2), b"\x00\x00", b"\x80\x7f", b"\xc0\x7f", b"\xff\xff"))
    return (data[:at] + new + data[at + 2 :])[: len(data)]


def change_description(data: bytes, rng: random.Random) -> bytes:
    """The JSON that a weight has as a tensor, in the place and length that the header gives it."""
    end = header_end(data)
    header = json.loads(data[8:end])
    names = sorted(name for name in header if name.endswith((*native_suffixes(), BNB_JSON)))
    first, last = (end + x for x in header[rng.choice(names)]["data_offsets"])
    text = text_or_json(data[first:last], rng)[: last - first]
    return data[:first] + text.ljust(last - first) + data[last:]


SAFETENSORS = (
    change_header, change_header, change_length, change_entries, change_data, change_values,
    any_bytes,
)  # fmt: skip

# ---- torch's zip files --------------------------------------------------------------------------


class _Opens:
    """What `weights_only` has to refuse."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code of a stranger ran')",)


def _hostile() -> tuple[Any, ...]:
    return (
        None, True, -1, 0, 1, 2**70, 0.5, float("nan"), float("inf"), "", "x", b"x", [], {}, (), 1j,
        [1], {"x": 1}, (1, 2), {1: 2}, OrderedDict(), torch.float32, torch.Size([2]), set(),
        torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64),
        torch.full((3,), float("nan")), torch.zeros(2, dtype=torch.complex64), torch.ones(5) > 0,
        torch.zeros(1).expand(2**40), torch.zeros(2, 2).t(), torch.zeros(3, device="meta"),
        torch.zeros(5, dtype=torch.uint8), torch.eye(3).to_sparse(),
        torch.nn.Parameter(torch.ones(2)),
        torch.zeros(4, dtype=torch.float64),
    )  # fmt: skip


def _tensor_like(old: torch.Tensor, rng: random.Random) -> Any:
    """Another tensor in its place."""
    changed: tuple[Callable[[], Any], ...] = (
        lambda: old.to(rng.choice((torch.float64, torch.float16, torch.int64, torch.bool))),
        lambda: old.reshape(-1),
        lambda: old.clone().unsqueeze(0),
        lambda: old.flatten()[:-1],
        lambda: torch.zeros_like(old),
        lambda: (old.double() + 1).to(old.dtype),
        lambda: torch.zeros(1, dtype=old.dtype).expand(old.shape),
        lambda: old.t().contiguous() if old.dim() == 2 else old.reshape(-1)[:1],
        lambda: old.clone().fill_(float("nan")) if old.is_floating_point() else old.reshape(-1)[:0],
        lambda: rng.choice(_hostile()),
    )
    return rng.choice(changed)()


def _change_state(node: Any, rng: random.Random) -> Any:
    """One part of nested containers of tensors, as torch.save takes them."""
    if isinstance(node, dict) and node and rng.random() < 0.93:
        key, new = rng.choice(list(node)), dict(node)
        kind = rng.random()
        if kind < 0.05:
            del new[key]
        elif kind < 0.1:
            new[rng.choice((f"{key}x", 7, None, "", "a\x00b", (1, 2)))] = new.pop(key)
        elif kind < 0.14:
            new[key] = node[rng.choice(list(node))]
        else:
            new[key] = _change_state(node[key], rng)
        return new
    if isinstance(node, list | tuple) and node and rng.random() < 0.9:
        items = list(node)
        at = rng.randrange(len(items))
        if rng.random() < 0.1:
            del items[at]
        else:
            items[at] = _change_state(items[at], rng)
        return type(node)(items) if type(node) in (list, tuple) else items
    if isinstance(node, torch.Tensor):
        return _tensor_like(node, rng)
    if type(node) in (int, float) and rng.random() < 0.4:
        return rng.choice((node + 1, -node, node * 2, node / 3, int(node), float(node)))
    return _Opens() if rng.random() < 0.05 else rng.choice(_hostile())


def change_state(data: bytes, rng: random.Random) -> bytes:
    state = torch.load(io.BytesIO(data), weights_only=True)
    file = io.BytesIO()
    torch.save(_change_state(state, rng), file)
    return file.getvalue()


def change_members(data: bytes, rng: random.Random) -> bytes:
    """One member dropped, damaged, renamed, twice there or compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    at = rng.randrange(len(members))
    name, content = members[at]
    kind = rng.randrange(7)
    compression = zipfile.ZIP_STORED
    if kind == 0:
        del members[at]
    elif kind in (1, 2):
        members[at] = (name, any_bytes(content or b"x", rng))
    elif kind == 3:
        folder, _, leaf = name.rpartition("/")
        members[at] = (
            rng.choice((leaf, f"{folder}/x", f"../{name}", f"{folder}/data/99")),
            content,
        )
    elif kind == 4:
        members.append(("x/data.pkl", content))
    elif kind == 5:
        compression = zipfile.ZIP_DEFLATED
    else:
        pickled = pickle.dumps(rng.choice(({}, [], 3, {"a": 1}, _Opens())), protocol=2)
        members = [(n, pickled if n.endswith("data.pkl") else c) for n, c in members]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as new:
        for name, content in members:
            new.writestr(name, content)
    return file.getvalue()


TORCH_FILES = (any_bytes, change_state, change_state, change_state, change_members)

__all__ = ["SAFETENSORS", "TORCH_FILES", "change_json", "change_tree"]
