"""Meta's own layout in: `params.json` and `consolidated.00.pth`, `consolidated.01.pth`, ...

Only weights are unpickled (`weights_only=True`), from mapped files. Model-parallel files each hold
a slice of every projection: of its rows, or for `wo` and `w2` of its columns; the embedding's slice
is of columns up to Llama 2 and of rows since Llama 3, which its shape tells. Rows of `wq` and `wk`
come in interleaved pairs and are reordered to half-split, as Hugging Face's rotary embedding is.

`params.json` names neither the number of positions nor the factor of the rotary scaling. Both are
those of the published model with the same sizes; for other sizes they are what the release with
such a file used (Llama 3.1: 131072 and 8; Llama 3: 8192; before: 4096).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_builders.checkpoint.formats.hf import KEYS as HF_KEYS
from qlora_builders.checkpoint.formats.hf import (
    REQUIRED,
    CheckpointFormat,
    Key,
    make_arch,
    read_keys,
)
from qlora_builders.checkpoint.tensor_files import LazyTensor
from qlora_builders.errors import CheckpointError, listed
from qlora_builders.files.reading import open_plain, read_json_object
from qlora_builders.models import LLAMA_ARCHS, LlamaArch, RopeScaling

_PARAMS_FILE = "params.json"
# name -> Hugging Face's, and the axis along which the files share it; None: all hold it whole
_NAMES = {
    "tok_embeddings": ("model.embed_tokens", 0),  # or 1
    "norm": ("model.norm", None),
    "output": ("lm_head", 0),
    "layers.*.attention.wq": ("model.layers.*.self_attn.q_proj", 0),
    "layers.*.attention.wk": ("model.layers.*.self_attn.k_proj", 0),
    "layers.*.attention.wv": ("model.layers.*.self_attn.v_proj", 0),
    "layers.*.attention.wo": ("model.layers.*.self_attn.o_proj", 1),
    "layers.*.feed_forward.w1": ("model.layers.*.mlp.gate_proj", 0),
    "layers.*.feed_forward.w2": ("model.layers.*.mlp.down_proj", 1),
    "layers.*.feed_forward.w3": ("model.layers.*.mlp.up_proj", 0),
    "layers.*.attention_norm": ("model.layers.*.input_layernorm", None),
    "layers.*.ffn_norm": ("model.layers.*.post_attention_layernorm", None),
}
KEYS = {
    "dim": HF_KEYS["hidden_size"],
    "n_layers": HF_KEYS["num_hidden_layers"],
    "n_heads": HF_KEYS["num_attention_heads"],
    "n_kv_heads": HF_KEYS["num_key_value_heads"],
    "head_dim": HF_KEYS["head_dim"],
    "norm_eps": replace(HF_KEYS["rms_norm_eps"], default=REQUIRED),
    "rope_theta": HF_KEYS["rope_theta"],
    "use_scaled_rope": Key(field="scaled", kind=bool, default=False, null=True),
}
# file name -> tensor name -> shape and dtype
_Shapes = dict[str, dict[str, tuple[torch.Size, torch.dtype]]]


def _read(directory: Path) -> dict[str, LazyTensor]:
    """By Hugging Face name; a slice that some file lacks, or that does not fit, is an error."""
    arch, shapes = _described(directory)
    files = list(shapes)
    source = directory / files[0]
    found = {}
    for name, (shape, dtype) in shapes[files[0]].items():
        if name == "rope.freqs":
            continue
        key, axis = _renamed(name)
        if axis is not None and len(shape) != 2:
            raise CheckpointError(f"{source}: {name} has shape {list(shape)}; expected a matrix")
        slices = [shapes[file].get(name, (None, None))[0] for file in files]
        if any(other != shape for other in slices):
            raise CheckpointError(f"{directory}: {name} has shapes {slices} in {listed(files)}")
        if key == "model.embed_tokens.weight" and shape[1] != arch.hidden_size:
            axis = 1
        whole = list(shape)
        if axis is not None:
            whole[axis] *= len(files)
        part = key.removesuffix(".weight").rpartition(".")[2]
        heads = {"q_proj": arch.num_heads, "k_proj": arch.num_kv_heads}.get(part)
        load = partial(_load, [directory / file for file in files], name, axis, heads)
        found[key] = LazyTensor(key, torch.Size(whole), dtype, load, source)
    extra = sorted({name for held in shapes.values() for name in held} - set(shapes[files[0]]))
    if extra:
        raise CheckpointError(f"{directory}: {files[0]} lacks tensors of others: {listed(extra)}")
    return found


def _renamed(name: str) -> tuple[str, int | None]:
    """And its axis. A name that is not known stays, so that loading reports it."""
    layer = re.match(r"layers\.(\d+)\.", name)
    index = layer[1] if layer else "*"
    general = name.removesuffix(".weight").replace(f"layers.{index}.", "layers.*.", 1)
    if general == name or general not in _NAMES:
        return name, None
    theirs, axis = _NAMES[general]
    return theirs.replace("*", index) + ".weight", axis


def _load(files: Sequence[Path], name: str, axis: int | None, heads: int | None) -> Tensor:
    if axis is None:
        return _open(files[0])[name].clone()
    whole = torch.cat([_open(file)[name] for file in files], dim=axis)
    if heads is None:
        return whole
    # rows of each head from x0 y0 x1 y1 ... to x0 x1 ... y0 y1 ...; [heads * head_dim, in]
    pairs = whole.view(heads, -1, 2, whole.shape[1])
    return pairs.transpose(1, 2).reshape(whole.shape)


def _open(file: Path) -> dict[str, Tensor]:
    """Mapped anew for every tensor, so that pages that were read do not stay resident."""
    try:
        open_plain(file).close()  # a pipe would wait for ever
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # unpickling foreign bytes can raise anything
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{file}: not a checkpoint of Meta: {reason}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointError(f"{file}: expected a dictionary of tensors by name")
    return tensors


def _described(directory: Path) -> tuple[LlamaArch, _Shapes]:
    file = directory / _PARAMS_FILE
    params: Any = read_json_object(file, expected="a directory in Meta's layout")
    params = params.get("model", params)
    if not isinstance(params, dict):
        raise CheckpointError(f"{file}: model is {params!r}; expected an object")
    files = sorted(file.name for file in directory.glob("consolidated.*.pth"))
    if not files or files != [f"consolidated.{index:02d}.pth" for index in range(len(files))]:
        raise CheckpointError(
            f"{directory}: expected consolidated.00.pth, consolidated.01.pth, ...; "
            f"found {listed(files)}"
        )
    shapes = {
        name: {key: (t.shape, t.dtype) for key, t in _open(directory / name).items()}
        for name in files
    }
    if params.get("moe") or params.get("quantization_args") or params.get("lora_args"):
        raise CheckpointError(f"{file}: mixture-of-experts and quantized models are not supported")
    values = read_keys(KEYS, params, str(file))
    first = shapes[files[0]]
    for name, field in (
        ("layers.0.feed_forward.w1.weight", "intermediate_size"),
        ("output.weight", "vocab_size"),
    ):
        if name not in first or len(first[name][0]) != 2:
            raise CheckpointError(f"{directory / files[0]}: no matrix {name}")
        values[field] = first[name][0][0] * len(files)
    scaled = values.pop("scaled")
    arch = make_arch(KEYS, values | {"max_position_embeddings": 4096}, str(file))
    if arch.num_kv_heads % len(files):
        raise CheckpointError(
            f"{directory}: {arch.num_kv_heads} key-value heads in {len(files)} files; "
            "take the release with fewer files, or the Hugging Face one"
        )
    return _with_positions(arch, scaled=scaled), shapes


def _with_positions(arch: LlamaArch, *, scaled: bool) -> LlamaArch:
    sizes = (
        "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
        "num_kv_heads", "rope_theta",
    )  # fmt: skip
    for row in LLAMA_ARCHS.values():
        same = all(getattr(row, size) == getattr(arch, size) for size in sizes)
        if same and scaled == (row.rope_scaling is not None):
            return replace(row, norm_eps=arch.norm_eps)
    if scaled:
        scaling = RopeScaling(rope_type="llama3", factor=8.0)
        return replace(arch, max_position_embeddings=131_072, rope_scaling=scaling)
    return replace(arch, max_position_embeddings=8192 if arch.rope_theta >= 5e5 else 4096)


META = CheckpointFormat(
    name="meta",
    arch=lambda directory: _described(directory)[0],
    tensors=_read,
    marker=_PARAMS_FILE,
    is_written=False,
)
