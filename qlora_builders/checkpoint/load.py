"""Checkpoint directories to models: built on meta, then filled tensor by tensor.

A parameter is plain or quantized, and whole or sharded over ranks, of which each reads and
quantizes what it will hold. Threads read ahead while one is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.checkpoint.base_record import ASPECTS, ContentHash
from qlora_builders.checkpoint.formats import (
    AUTO,
    FORMATS,
    detect_format,
    read_arch,
    read_tensors,
    stored_dtype,
    stored_plan,
)
from qlora_builders.checkpoint.peft.read import (
    NF4_BASE,
    adapter_plan,
    check_plan,
    check_quantize,
    load_adapter_info,
    read_adapter,
)
from qlora_builders.checkpoint.save import base_parameters
from qlora_builders.checkpoint.tensor_files import LazyTensor, is_finite, stream
from qlora_builders.errors import CheckpointError, PlanError, listed
from qlora_builders.models import (
    BaseCheckpoint,
    ComponentRule,
    LlamaArch,
    layer_slots,
    linear_slots,
    llama,
    resolve,
    slot_name,
)
from qlora_builders.modules import DEFAULT_INIT, LOFTQ, CausalLM, LoRALinear, TokenEmbedding
from qlora_builders.tensor import QuantizedTensor, format_of, is_quantized, plain, quantize
from qlora_builders.tensor.sharded import (
    held_elements,
    held_rows,
    is_sharded,
    local_part,
    quantize_held,
    shard_quantized,
    with_local,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_checkpoint(
    path: str | Path,
    components: Iterable[ComponentRule | Mapping[str, Any]] = (),
    *,
    format: str = AUTO,
    arch: LlamaArch | None = None,
    train: Sequence[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype | None = None,
    shard: Callable[[CausalLM], None] | None = None,
) -> CausalLM:
    """Build the model of a checkpoint directory under a component plan, and load its weights.

    Each tensor is quantized or cast as it is read, while threads read the next ones. In memory
    beside the finished part of the model are never more bytes than the largest tensor has, and a
    copy of one tensor where its dtype changes.

    Weights that are stored quantized keep codes, scales and dtype where the plan wants a quantized
    weight. A rule may repeat how they are stored, but not ask for something else: quantizing what
    is quantized already would lose accuracy silently. Where the plan wants a plain weight they are
    dequantized. `stored_plan` gives the rules that keep a directory as it is.

    Args:
        path: a directory in one of the formats of `formats.FORMATS`.
        format: what the directory holds, if not what it looks like: hf, meta, bnb-4bit or nf4.
        arch: overrides what the directory says.
        components, train, dtype, compute_dtype: as for `llama`.
        shard: shards a model whose base is on meta; then a rank reads and quantizes what it holds.

    Raises:
        CheckpointError: for another directory than that, tensors that are missing, unexpected, of
            another shape or not finite, or a rule that contradicts how a weight is stored.
        PlanError: for a plan that does not fit the model.
    """
    path = Path(path)
    tensors = read_tensors(path, format=format)
    arch = read_arch(path, format=format) if arch is None else arch
    where = _describing_files(path, tensors)
    _check_sizes(arch, tensors, where)
    model = llama(
        arch, components, train=train, device="meta", dtype=dtype, compute_dtype=compute_dtype
    )
    device = torch.device(device)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            for part in (module.lora_A, module.lora_B):
                for name, parameter in part.named_parameters():
                    # not to_empty, which has torch import its compiler
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    setattr(part, name, nn.Parameter(empty))
            module.reset_lora_parameters()
    if shard is not None:
        _check_shardable(model)
        shard(model)
    content = _load_weights(model, tensors, where, device)
    found = detect_format(path) if format == AUTO else format
    model.spec = replace(model.spec, base=BaseCheckpoint(found, content))
    return model


def _check_shardable(model: CausalLM) -> None:
    """What starts from whole weights has nothing to start from where a rank holds a share."""
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    whole = {
        "use_dora": any(m.lora_magnitude_vector is not None for m in adapters),
        "init_lora_weights": any(m.init_lora_weights != DEFAULT_INIT for m in adapters),
        "train_tokens": isinstance(model.model.embed_tokens, TokenEmbedding),
    }
    used = [name for name, is_used in whole.items() if is_used]
    if used:
        raise PlanError(
            f"{', '.join(used)} cannot be used with sharded weights; train on one device"
        )


def _describing_files(path: Path, tensors: Mapping[str, LazyTensor]) -> str:
    """For errors: the files that say which tensors there are, and which there should be."""
    described = dict.fromkeys(row.marker for row in FORMATS.values())
    described |= dict.fromkeys(file.name for file in path.glob("*.index.json"))
    weights = sorted({tensor.source.name for tensor in tensors.values() if tensor.source})
    found = [name for name in described if (path / name).is_file()]
    return f"{path} ({listed(found + weights)})"


def _check_sizes(arch: LlamaArch, tensors: Mapping[str, LazyTensor], where: str) -> None:
    """Before anything is built by them: absurd sizes would take forever, or all memory."""
    shapes = {EMBEDDING: (arch.vocab_size, arch.hidden_size)}
    for part, slots in layer_slots(arch).items():
        for name, (in_features, out_features, _) in slots.items():
            shapes[f"model.layers.0.{part}.{name}.weight"] = out_features, in_features
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise CheckpointError(f"{where}: tensors missing: {listed(missing)}; is it a Llama?")
    for name, shape in shapes.items():
        _check_shape(tensors[name], shape, where)
    if arch.num_layers > len(tensors):
        raise CheckpointError(
            f"{where}: {arch.num_layers} layers are announced, but there are {len(tensors)} tensors"
        )


def _check_shape(tensor: LazyTensor, shape: Sequence[int], where: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(
            f"{tensor.source}: {tensor.name} has shape {list(tensor.shape)}; "
            f"the model needs {list(shape)}: compare the files in {where}"
        )
    if not tensor.dtype.is_floating_point:
        raise CheckpointError(
            f"{tensor.source}: {tensor.name} has dtype {tensor.dtype}; expected floating point"
        )


def _load_weights(
    model: CausalLM, tensors: Mapping[str, LazyTensor], where: str, device: torch.device
) -> str:
    """Gives the content hash of what was read."""
    parameters = base_parameters(model)
    tied = model.tie_word_embeddings
    required = set(parameters) - ({HEAD} if tied else set())
    missing, unexpected = sorted(required - set(tensors)), sorted(set(tensors) - set(parameters))
    if missing or unexpected:
        raise CheckpointError(
            f"{where}: tensors missing: {listed(missing)}; not expected: {listed(unexpected)}"
        )
    for name, tensor in tensors.items():
        _check_shape(tensor, parameters[name].shape, where)
    rules = resolve(model.spec.components, linear_slots(model.spec.arch))
    content = ContentHash()

    def consume(part: LazyTensor, value: Tensor) -> None:
        name = part.name
        tensor, own, rule = tensors[name], parameters[name], rules.get(slot_name(name))
        if value.shape == tensor.shape:
            content.add(name, value)
        else:
            content.add_unread(tensor)
        if rule is not None and rule.format is not None and is_quantized(value):
            _check_stored(tensor, value, rule)
        try:
            made = _made(part, value, own, device)
        except ValueError as error:
            raise CheckpointError(f"{tensor.source}: {name}: {error}") from error
        if format_of(own) is None and not is_finite(local_part(made)):
            raise CheckpointError(
                f"{tensor.source}: {name} holds NaN or infinity in {made.dtype}; the file is "
                "damaged, or its numbers need a wider dtype"
            )
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(made, requires_grad=own.requires_grad))
        _start_from(module, tensor, value)

    stream(
        [_needed(t, parameters[n]) for n, t in tensors.items() if not (tied and n == HEAD)],
        consume,
        transient=lambda part: _is_transient(part, parameters[part.name], device),
    )
    if tied and HEAD in tensors:
        head, embedding = tensors[HEAD], model.get_parameter(EMBEDDING)
        rows = slice(*held_rows(embedding)) if is_sharded(embedding) else slice(None)
        own = local_part(embedding)
        if not torch.equal(head.load()[rows].to(own), own):
            raise CheckpointError(
                f"{head.source}: {HEAD} differs from {EMBEDDING}, but config.json ties them"
            )
    model.tie_weights()
    if tied and isinstance(model.lm_head, LoRALinear):
        model.lm_head.init_from_base()
    return content.hexdigest()


def _needed(tensor: LazyTensor, parameter: Tensor) -> LazyTensor:
    """What of a tensor this rank reads. Not every file can be read in parts; all is needed of a
    weight that is stored quantized, and of one whose codes depend on the whole."""
    format = format_of(parameter)
    is_whole = tensor.load_rows is None or tensor.quantized or (format and format.needs_whole)
    if is_whole or not is_sharded(parameter):
        return tensor
    if format is None:
        start, stop = held_rows(parameter)
    else:
        first, last = held_elements(parameter)
        columns = parameter.shape[1:].numel()
        start, stop = first // columns, -(-last // columns)
    shape = torch.Size((stop - start, *tensor.shape[1:]))
    assert tensor.load_rows is not None
    return replace(tensor, shape=shape, load=partial(tensor.load_rows, start, stop), map=None)


def _is_transient(part: LazyTensor, parameter: Tensor, device: torch.device) -> bool:
    """Whether what takes the parameter's place is other memory than what was read."""
    if is_sharded(parameter) or device.type != "cpu":
        return True
    if format_of(parameter) is not None:
        return not part.quantized
    return bool(part.quantized) or part.dtype != parameter.dtype


def _made(part: LazyTensor, value: Tensor, parameter: Tensor, device: torch.device) -> Tensor:
    """What takes the parameter's place, plain or quantized, whole or this rank's share, of what was
    read. Stored codes stay as they are.

    Raises:
        ValueError: for what cannot be quantized.
    """
    format, dtype = format_of(parameter), parameter.dtype
    if not is_sharded(parameter):
        if format is None:
            return plain(value.to(device)).to(dtype)
        return (
            value.to(device) if is_quantized(value) else quantize(value.to(device, dtype), format)
        )
    is_whole = part.shape == parameter.shape
    if format is None:
        rows = slice(*held_rows(parameter)) if is_whole else slice(None)
        return with_local(parameter, plain(value)[rows].to(device, dtype, copy=True))
    weight: Any = value.to(device)
    if is_quantized(weight):
        return shard_quantized(parameter, weight)
    if format.needs_whole:
        return shard_quantized(parameter, quantize(weight.to(dtype), format))
    start, stop = held_elements(parameter)
    columns = parameter.shape[1:].numel()
    before = start if is_whole else start % columns  # elements that were read for another rank
    elements = weight.flatten()[before : before + stop - start]
    return shard_quantized(parameter, quantize_held(parameter, elements))


def _start_from(module: nn.Module, tensor: LazyTensor, value: Tensor) -> None:
    """What of an adapter starts from the base weight, where that was just placed."""
    if isinstance(module, TokenEmbedding):
        module.token_adapter.init_from(module.weight)
    if not isinstance(module, LoRALinear) or not tensor.name.endswith(".weight"):
        return
    if is_quantized(value) and module.init_lora_weights == LOFTQ:
        raise CheckpointError(
            f"{tensor.source}: {tensor.name} is stored in 4 bits, and init_lora_weights='loftq' "
            "starts from what quantization changed; start from 16-bit weights"
        )
    module.init_from_base(value)


def _check_stored(tensor: LazyTensor, stored: QuantizedTensor, rule: ComponentRule) -> None:
    """The plan may repeat how a weight is stored, not ask for something else."""
    assert rule.format is not None
    own: dict[str, Any] = {"base": stored.format.name, **stored.format.options}
    asked = {"base": rule.format.name} | {n: v for n, v in rule.options.items() if n in own}
    differing = [name for name, value in asked.items() if own[name] != value]
    if differing:
        is_so, wanted = (", ".join(f"{n}={d[n]}" for n in differing) for d in (own, asked))
        raise CheckpointError(
            f"{tensor.source}: {tensor.name} is stored in {stored.title} with {is_so}, but rule "
            f"{rule.match!r} asks for {wanted}; leave the option out, or start from 16-bit weights"
        )


# ---- with an adapter -----------------------------------------------------------------------------


def load_with_adapter(
    path: str | Path,
    adapter: str | Path | None,
    *,
    quantize: str = "auto",
    format: str = AUTO,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    allow_base_mismatch: bool = False,
) -> CausalLM:
    """A checkpoint with its adapter, or the checkpoint alone, in eval mode.

    Args:
        path: the base checkpoint.
        adapter: an adapter directory, or None.
        quantize: as for `adapter_plan`; "auto" without an adapter is as the checkpoint is stored.
        format: of the checkpoint, as for `load_checkpoint`.
        dtype: of the base; None is the one the adapter was trained on, or that of the files.
        device, compute_dtype: as for `load_checkpoint`.
        allow_base_mismatch: as for `load_adapter`. What `quantize` or `dtype` names is the caller's
            choice and not compared anyway.

    Raises:
        CheckpointError: if either cannot be read or they do not fit each other.
    """
    check_quantize(quantize)
    info = None if adapter is None else read_adapter(adapter)
    components: Sequence[ComponentRule | dict[str, Any]]
    if info is not None:
        components, train = adapter_plan(info, quantize=quantize)
    else:
        stored = stored_plan(path, format=format) if quantize == "auto" else []
        components, train = [NF4_BASE] if quantize == "nf4" else stored, []
    recorded = None if info is None or info.base is None else info.base.dtype
    try:
        if info is not None:
            arch = read_arch(path, format=format)
            check_plan(info, resolve(components, linear_slots(arch)))
        model = load_checkpoint(
            path,
            components,
            format=format,
            train=train,
            device=device,
            dtype=dtype or recorded or stored_dtype(path, format=format),
            compute_dtype=compute_dtype,
        )
    except PlanError as error:  # the caller wrote no plan; the adapter did
        raise CheckpointError(f"{adapter}: the adapter does not fit {path}: {error}") from error
    if info is not None:
        # a LoftQ adapter is half a correction of one quantization, whatever the caller names
        rules = () if info.base is None else info.base.components
        bound = any(rule.init_lora_weights == LOFTQ for rule in rules)
        chosen = {"quantization": quantize != "auto" and not bound, "dtype": dtype is not None}
        aspects = [a for a in ASPECTS if not (allow_base_mismatch or chosen.get(a))]
        load_adapter_info(model, info, aspects)
    return model.eval()
