"""Damaged files, 2,730 of them: an error that names the file, or the very same weights.

Damage is drawn with a seed, byte by byte and by the structure of the JSON. Left out is damage that
turns one valid file into another, which no reader can tell from what was meant: one 16-bit dtype
for the other, another alpha of an adapter, another offset of bitsandbytes' nested scales. (Our own
layout has a checksum, so there nothing is left out.)
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_builders.checkpoint import (
    load_checkpoint,
    read_adapter,
    save_adapter,
    save_checkpoint,
)
from qlora_builders.errors import CheckpointError
from qlora_builders.models import LlamaArch, llama
from qlora_builders.tensor import NF4Tensor
from qlora_builders.tensor.layouts import BNB_JSON

ARCH = LlamaArch(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=96,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
NF4 = [{"match": "layers.**", "kind": "frozen_nf4"}]
CASES_PER_TEST = 65
SECONDS = 20

# ---- damage -------------------------------------------------------------------------------------

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 63, 65, 255, 2**31, 2**63, 10**30, 0.5, -1e-9, 1e308,
    "", "x", "F32", "F64", "U8", "I64", "0", "../x", "/etc/passwd", "\ud800",
    [], {}, [0], [[0, 1]], {"a": 1}, [-1, 5], [0, 2**62], [2**40, 2**40], [1] * 1000,
)  # fmt: skip
SNIPPETS = (b"{", b"}", b"[", b"]", b'"', b",", b":", b"NaN", b"1e999", b"-", b"\x00", b"\xff")
TEXTS = (
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b"9" * 50_000,
    b"",
    b"null",
    b"[]",
    b"{}",
    b"\xef\xbb\xbf{}",
)


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(data)), rng.choice((1, 1, 2, 4, 20))
    end = min(at + length, len(data))
    kind = rng.randrange(8)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + rng.randbytes(end - at) + data[end:]
    if kind == 2:
        return data[:at] + data[end:]
    if kind == 3:
        return data[:at] + data[at:end] + data[at:]
    if kind == 4:
        return data[:at] + rng.choice(SNIPPETS) + data[at:]
    if kind == 5:
        return data[:at]
    if kind == 6:
        return data[:at] + bytes([rng.choice(b"0123456789")]) + data[at + 1 :]
    return rng.choice(TEXTS)


def damage_json(content: Any, rng: random.Random) -> bytes:
    """One node changed, removed, renamed or doubled."""
    content = copy.deepcopy(content)
    nodes = [(parent, key) for parent, key in walk(content)]
    parent, key = rng.choice(nodes)
    old, kind = parent[key], rng.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(key, str):
        parent[key[:-1] + rng.choice("xyz0")] = parent.pop(key)
    elif kind == 2 and type(old) in (int, float):
        parent[key] = old + rng.choice((-2, -1, 1, 2, 64))
    elif kind == 3 and isinstance(key, str):
        once = f"{json.dumps(key)}: "
        return json.dumps(content).replace(once, f"{once}{json.dumps(old)}, {once}", 1).encode()
    else:
        parent[key] = rng.choice(HOSTILE)
    return json.dumps(content).encode()


def walk(node: Any) -> Iterator[tuple[Any, Any]]:
    keys = node.keys() if isinstance(node, dict) else range(len(node))
    for key in list(keys):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from walk(node[key])


def damage_text(data: bytes, rng: random.Random) -> bytes:
    return damage_bytes(data, rng) if rng.random() < 0.5 else damage_json(json.loads(data), rng)


def damage_header(data: bytes, rng: random.Random) -> bytes:
    """The length and the JSON; half of the time the length is made to fit."""
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        return damage_bytes(data[:end], rng) + data[end:]
    text = damage_text(data[8:end].rstrip(), rng)
    if rng.random() < 0.5:
        text += b" " * max(0, end - 8 - len(text))
    return len(text).to_bytes(8, "little") + text + data[end:]


def damage_description(data: bytes, rng: random.Random) -> bytes:
    """The JSON that a weight has as a tensor, in the place and length that the header gives it."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    names = sorted(name for name in header if name.endswith((".nf4", BNB_JSON)))
    first, last = (end + x for x in header[rng.choice(names)]["data_offsets"])
    text = damage_text(data[first:last], rng)[: last - first]
    return data[:first] + text.ljust(last - first) + data[last:]


# ---- directories --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    model = llama(ARCH)
    save_checkpoint(model, path / "hf")
    save_checkpoint(model, path / "sharded", max_shard_bytes=20_000)
    save_checkpoint(load_checkpoint(path / "hf", NF4), path / "nf4", format="nf4")
    bnb = [rule | {"scale_format": "bnb"} for rule in NF4]
    save_checkpoint(load_checkpoint(path / "hf", bnb), path / "bnb", format="bnb-4bit")
    lora = {"match": "layers.**", "kind": "lora", "rank": 2, "alpha": 4}
    special = lora | {"match": "layers.0.mlp.up_proj", "rank": 3}
    save_adapter(load_checkpoint(path / "hf", [lora, special], train=["norm"]), path / "adapter")
    return path


def weights(model: nn.Module) -> dict[str, Any]:
    return {
        name: p.dequantize() if isinstance(p, NF4Tensor) else p.detach()
        for name, p in model.named_parameters()
    }


def load(directory: Path) -> dict[str, Any]:
    return weights(load_checkpoint(directory, NF4))


def load_adapter_info(directory: Path) -> dict[str, Any]:
    info = read_adapter(directory)
    return {name: m.rank for name, m in info.modules.items()} | {"saved": info.saved}


# file (and # for the descriptions of its weights): tests of CASES_PER_TEST cases, damage, reader
Damage = Callable[[bytes, random.Random], bytes]
TARGETS: dict[str, tuple[int, Damage, Callable[[Path], dict[str, Any]]]] = {
    "hf/model.safetensors": (6, damage_header, load),
    "hf/config.json": (6, damage_text, load),
    "sharded/model.safetensors.index.json": (4, damage_text, load),
    "nf4/nf4.safetensors": (4, damage_header, load),
    "nf4/nf4.safetensors#": (4, damage_description, load),
    "nf4/config.json": (2, damage_text, load),
    "bnb/model.safetensors": (4, damage_header, load),
    "bnb/model.safetensors#": (4, damage_description, load),
    "bnb/config.json": (2, damage_text, load),
    "adapter/adapter_config.json": (4, damage_text, load_adapter_info),
    "adapter/adapter_model.safetensors": (2, damage_header, load_adapter_info),
}


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation of this thread gives."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if type(tensor) is torch.Tensor and not tensor.is_meta:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.fixture
def largest_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what the reading threads allocate, which a mode of this thread does not see."""
    sizes: list[int] = []
    empty = torch.empty

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("dtype") == torch.uint8 and isinstance(args[0], int):
            sizes.append(args[0])
        return empty(*args, **kwargs)

    monkeypatch.setattr("qlora_builders.checkpoint.safetensors_io.torch.empty", recorded)
    return sizes


@pytest.fixture
def timer() -> Iterator[Callable[[int], int]]:
    def timed_out(*_: Any) -> None:
        raise TimeoutError(f"reading takes longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, timed_out)
    yield signal.alarm
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("target", "chunk"), [(target, i) for target in TARGETS for i in range(TARGETS[target][0])]
)
def test_damage(
    originals: Path,
    tmp_path: Path,
    largest_read: list[int],
    timer: Callable[[int], int],
    target: str,
    chunk: int,
) -> None:
    _, damage, read = TARGETS[target]
    folder, _, name = target.removesuffix("#").partition("/")
    directory = Path(shutil.copytree(originals / folder, tmp_path / folder))
    file = directory / name
    data = file.read_bytes()
    expected = read(originals / folder)
    limit = 2 * sum(f.stat().st_size for f in directory.iterdir())
    errors = 0
    for case in range(chunk * CASES_PER_TEST, (chunk + 1) * CASES_PER_TEST):
        damaged = damage(data, random.Random(f"{target} {case}"))
        file.write_bytes(damaged)
        largest_read.clear()
        timer(SECONDS)
        with Largest() as largest:
            got = outcome(read, directory)
        timer(0)
        if isinstance(got, CheckpointError):
            errors += 1
            assert str(directory) in str(got), (case, got)
            assert file.name in str(got), (case, got)
        else:
            equal = same(got, expected) or only_the_offset_differs(data, damaged)
            assert equal, f"case {case} loads to something else"
        assert max([largest.nbytes, *largest_read]) <= max(limit, 2 * len(damaged)), case
    assert errors > CASES_PER_TEST // 3


def outcome(read: Callable[[Path], Any], directory: Path) -> Any:
    try:
        return read(directory)
    except CheckpointError as error:
        return error


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def only_the_offset_differs(data: bytes, damaged: bytes) -> bool:
    if len(data) != len(damaged):
        return False
    changed = [i for i in range(len(data)) if data[i] != damaged[i]]
    start = data.rfind(b'"nested_offset": ', 0, changed[0] + 1)
    return start > 0 and b"}" not in data[start : changed[-1] + 1]


def test_enough_cases() -> None:
    assert sum(count for count, *_ in TARGETS.values()) * CASES_PER_TEST == 2730
