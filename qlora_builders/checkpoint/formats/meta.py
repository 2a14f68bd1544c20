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

from qlora_builders.checkpoint.formats.base import CheckpointFormat
from qlora_builders.checkpoint.formats.hf import KEYS as HF_KEYS
from qlora_builders.checkpoint.formats.hf import REQUIRED, Key, head_dim_of, in_words_of, read_keys
from qlora_builders.checkpoint.tensor_files import LazyTensor
from qlora_builders.errors import CheckpointError, QLoRAError, listed
from qlora_builders.files.reading import open_plain, read_json_object
from qlora_builders.models import LLAMA_ARCHS, LlamaArch, RopeScaling

_PARAMS_FILE = "params.json"
_TOP_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
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
_ROW_SPLIT = ("wq", "wk", "wv", "w1", "w3", "output")
_COLUMN_SPLIT = ("wo", "w2")
_MATRICES = (*_ROW_SPLIT, *_COLUMN_SPLIT, "tok_embeddings")


def _read_arch(directory: Path) -> LlamaArch:
    """
    Raises:
        CheckpointError: if a file is missing or unreadable, or says something unsupported.
    """
    return _arch(_params(directory), _shapes(directory), directory / _PARAMS_FILE)


def _read(directory: Path) -> dict[str, LazyTensor]:
    """Hugging Face name -> lazy tensor.

    Raises:
        CheckpointError: as `_read_arch`, or for tensors that the files do not all hold, or
            whose slices do not make up a whole.
    """
    params = _params(directory)
    shapes = _shapes(directory)
    arch = _arch(params, shapes, directory / _PARAMS_FILE)
    heads = {"wq": arch.num_heads, "wk": arch.num_kv_heads}
    files = list(shapes)
    found = {}
    for name, (shape, dtype) in shapes[files[0]].items():
        if name == "rope.freqs":
            continue
        part = name.removesuffix(".weight").rpartition(".")[2]
        if part in _MATRICES and len(shape) != 2:
            raise CheckpointError(
                f"{directory / files[0]}: {name} has shape {list(shape)}; expected a matrix"
            )
        slices = [shapes[file].get(name, (None, None))[0] for file in files]
        if any(other != shape for other in slices):
            raise CheckpointError(f"{directory}: {name} has shapes {slices} in {listed(files)}")
        axis = _split_axis(part, shape, arch.hidden_size)
        whole = list(shape)
        if axis is not None:
            whole[axis] *= len(files)
        load = partial(_load, directory, files, name, axis, heads.get(part))
        key = _hf_name(name)
        source = directory / files[0]
        found[key] = LazyTensor(key, torch.Size(whole), dtype, load, source)
    extra = sorted({name for held in shapes.values() for name in held} - set(shapes[files[0]]))
    if extra:
        raise CheckpointError(f"{directory}: {files[0]} lacks tensors of others: {listed(extra)}")
    return found


def _hf_name(name: str) -> str:
    """A name that is not known stays, so that loading reports it."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    if layer is not None and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight"
    top = name.removesuffix(".weight")
    return f"{_TOP_NAMES[top]}.weight" if top in _TOP_NAMES else name


def _split_axis(part: str, shape: torch.Size, hidden_size: int) -> int | None:
    """None for what every file holds in full."""
    if part in _COLUMN_SPLIT:
        return 1
    if part == "tok_embeddings":
        return 0 if shape[-1] == hidden_size else 1
    return 0 if part in _ROW_SPLIT else None


def _load(
    directory: Path, files: Sequence[str], name: str, axis: int | None, heads: int | None
) -> Tensor:
    used = files if axis is not None else files[:1]
    slices = [_open(directory / file)[name] for file in used]
    whole = slices[0].clone() if axis is None else torch.cat(slices, dim=axis)
    return whole if heads is None else _half_split(whole, heads)


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from x0 y0 x1 y1 ... to x0 x1 ... y0 y1 ...; [heads * head_dim, in]."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


# ---- files --------------------------------------------------------------------------------------


def _params(directory: Path) -> dict[str, Any]:
    file = directory / _PARAMS_FILE
    params = read_json_object(file, expected="a directory in Meta's layout")
    params = params.get("model", params)
    if not isinstance(params, dict):
        raise CheckpointError(f"{file}: model is {params!r}; expected an object")
    return params


def _shapes(directory: Path) -> dict[str, dict[str, tuple[torch.Size, torch.dtype]]]:
    """File name -> tensor name -> shape and dtype."""
    files = sorted(file.name for file in directory.glob("consolidated.*.pth"))
    wanted = [f"consolidated.{index:02d}.pth" for index in range(len(files))]
    if not files or files != wanted:
        raise CheckpointError(
            f"{directory}: expected consolidated.00.pth, consolidated.01.pth, ...; "
            f"found {listed(files)}"
        )
    return {
        file: {name: (t.shape, t.dtype) for name, t in _open(directory / file).items()}
        for file in files
    }


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


# ---- architecture -------------------------------------------------------------------------------


def _arch(
    params: dict[str, Any],
    shapes: dict[str, dict[str, tuple[torch.Size, torch.dtype]]],
    file: Path,
) -> LlamaArch:
    if params.get("moe") or params.get("quantization_args") or params.get("lora_args"):
        raise CheckpointError(f"{file}: mixture-of-experts and quantized models are not supported")
    first_file, first = next(iter(shapes.items()))
    sizes = {}
    for name in ("layers.0.feed_forward.w1.weight", "output.weight"):
        if name not in first or len(first[name][0]) != 2:
            raise CheckpointError(f"{file.parent / first_file}: no matrix {name}")
        sizes[name] = first[name][0][0] * len(shapes)
    values = read_keys(KEYS, params, str(file))
    scaled, heads, dim = values.pop("scaled"), values["num_heads"], values["hidden_size"]
    if values["num_kv_heads"] is None:
        values["num_kv_heads"] = heads
    if values["head_dim"] is None:
        values["head_dim"] = head_dim_of(dim, heads, names=("dim", "n_heads"), source=str(file))
    try:
        arch = LlamaArch(
            vocab_size=sizes["output.weight"],
            intermediate_size=sizes["layers.0.feed_forward.w1.weight"],
            max_position_embeddings=4096,
            **values,
        )
    except QLoRAError as error:
        raise CheckpointError(f"{file}: {in_words_of(KEYS, error)}") from error
    if arch.num_kv_heads % len(shapes):
        raise CheckpointError(
            f"{file.parent}: {arch.num_kv_heads} key-value heads in {len(shapes)} files; "
            "take the release with fewer files, or the Hugging Face one"
        )
    return _with_positions(arch, scaled=scaled)


def _with_positions(arch: LlamaArch, *, scaled: bool) -> LlamaArch:
    def sizes(other: LlamaArch) -> tuple:
        return (
            other.vocab_size, other.hidden_size, other.intermediate_size, other.num_layers,
            other.num_heads, other.num_kv_heads, other.rope_theta,
        )  # fmt: skip

    for row in LLAMA_ARCHS.values():
        if sizes(row) == sizes(arch) and scaled == (row.rope_scaling is not None):
            return replace(row, norm_eps=arch.norm_eps)
    if scaled:
        scaling = RopeScaling(rope_type="llama3", factor=8.0)
        return replace(arch, max_position_embeddings=131_072, rope_scaling=scaling)
    return replace(arch, max_position_embeddings=8192 if arch.rope_theta >= 5e5 else 4096)


META = CheckpointFormat(
    name="meta", arch=_read_arch, tensors=_read, marker=_PARAMS_FILE, is_written=False
)
