"""Adapters into weights: W + scaling * B A in float32, one weight at a time, each measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qlora_builders.checkpoint.base_record import ALLOW, hash_tensors
from qlora_builders.checkpoint.formats import FORMATS, read_tensors
from qlora_builders.checkpoint.formats.hf import CheckpointFormat
from qlora_builders.checkpoint.formats.quantized import BNB_4BIT
from qlora_builders.checkpoint.merge_report import (
    MAX_ERROR,
    LayerError,
    MergeReport,
    check_merge,
    logit_agreement,
    measure_layer,
    streamed_model,
)
from qlora_builders.checkpoint.peft.write import adapters_of
from qlora_builders.checkpoint.save import (
    base_parameters,
    check_types,
    lazy_parameter,
    save_checkpoint,
    write_hf_files,
    written_format,
)
from qlora_builders.checkpoint.tensor_files import MAX_SHARD_BYTES, LazyTensor
from qlora_builders.errors import CheckpointError, listed
from qlora_builders.files.folders import atomic_directory
from qlora_builders.models import ComponentRule, LlamaArch, hf_name, linear_slots, llama, slot_name
from qlora_builders.modules import LOFTQ, CausalLM, LoRALinear, TokenEmbedding
from qlora_builders.tensor import Format, NF4Format, format_of, quantize

DEQUANTIZED = "dequantized"
# NF4 leaves about 0.1 of a weight's norm; a weight that is no relative of the other has 1.4
_MAX_BASE_CHANGE = 0.5


def merge_adapter(
    model: CausalLM,
    *,
    base: str | Path = DEQUANTIZED,
    dtype: torch.dtype | None = None,
    max_error: float = MAX_ERROR,
    allow_base_mismatch: bool = False,
) -> CausalLM:
    """A new model of plain layers that computes what base + adapter computes.

    Args:
        model: with adapters; left as it is. Tensors that merging does not change are shared.
        base: "dequantized" adds the update to the weights the adapter was trained on. The path of
            the original 16-bit checkpoint adds it to those: a better base, but another function.
        dtype: of the merged weights; by default each weight's own.
        max_error: as for `save_merged`.
        allow_base_mismatch: merge onto a `base` whose content hash is not the model's.

    Raises:
        MergeError: if rounding loses more of the update than `max_error`.
        CheckpointError: if the model has no adapter, or `base` is not its checkpoint.
    """
    plan = _MergePlan(model, base, dtype, allow_base_mismatch, formats={})
    merged = plan.build()
    plan.check(merged, max_error)
    return merged


def save_merged(
    model: CausalLM,
    path: str | Path,
    *,
    base: str | Path = DEQUANTIZED,
    dtype: torch.dtype | None = None,
    format: str = "hf",
    max_error: float = MAX_ERROR,
    allow_base_mismatch: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    companions: str | Path | None = None,
) -> MergeReport:
    """`merge_adapter` straight into a directory; at most one shard is in memory.

    What was written is read back, layer by layer, and its logits compared with the model's before
    the directory gets its name.

    Args:
        format: "hf", or another of `save_checkpoint` to quantize the merged weights again: those
            slots that are quantized in the model, or all of the decoder's where none is. That
            erases most updates below 10 % of the weight's norm, so it is refused unless `max_error`
            allows it.
        max_error: largest |error| / |delta|, over all weights and, with base="dequantized", of the
            logits; see `merge_report`.

    Raises:
        MergeError: if more than `max_error` is lost; its `report` has every figure.
        CheckpointError: as `merge_adapter`, and for an unknown format.
    """
    row = written_format(format)
    plan = _MergePlan(model, base, dtype, allow_base_mismatch, formats=_formats(model, row))
    if row.pack is not None:
        merged = plan.build()
        report = plan.check(merged, max_error)
        save_checkpoint(
            merged, path, format=format, max_shard_bytes=max_shard_bytes, companions=companions
        )
        return report
    tensors = list(plan.tensors())
    with atomic_directory(path, marker="config.json") as temporary:
        write_hf_files(
            tensors,
            temporary,
            arch=plan.arch,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            companions=companions,
        )
        return plan.check(streamed_model(temporary), max_error)


class _MergePlan:
    """Every parameter of the merged model, computed and measured when it is loaded."""

    def __init__(
        self,
        model: CausalLM,
        base: str | Path,
        dtype: torch.dtype | None,
        allow_base_mismatch: bool,
        formats: dict[str, Format],  # slot -> format of the output
    ) -> None:
        self.model, self.base, self.dtype, self.formats = model, base, dtype, formats
        self.measured: dict[str, LayerError] = {}
        adapters = adapters_of(model)
        if not adapters:
            raise CheckpointError("the model has no LoRA adapter to merge; load one first")
        self.arch = _merged_arch(model, adapters)
        loftq = sorted(n for n, m in adapters.items() if m.init_lora_weights == LOFTQ)
        if base != DEQUANTIZED and loftq:
            raise CheckpointError(
                f"adapters that started as LoftQ correct their quantized base ({listed(loftq)}); "
                f"{base} needs no correction, so merge with base={DEQUANTIZED}"
            )
        self.originals = None if base == DEQUANTIZED else self._find_originals(allow_base_mismatch)

    def build(self) -> CausalLM:
        rules = [ComponentRule.of_format(slot, format) for slot, format in self.formats.items()]
        merged = llama(
            self.arch,
            rules,
            device="meta",
            dtype=self.dtype or self.model.spec.dtype,
            compute_dtype=self.model.model.compute_dtype,
        )
        tensors = {tensor.name: tensor.load() for tensor in self.tensors()}
        merged.load_state_dict(tensors, assign=True)
        return merged

    def check(self, merged: CausalLM, max_error: float) -> MergeReport:
        logits = logit_agreement(self.model, merged)
        report = MergeReport(tuple(self.measured.values()), logits)
        check_merge(report, max_error, compare_logits=self.originals is None)
        return report

    def tensors(self) -> Iterator[LazyTensor]:
        for name, parameter in base_parameters(self.model).items():
            if not (self.arch.tie_word_embeddings and name == "lm_head.weight"):
                trained = lazy_parameter(name, parameter, None)
                is_frozen = self.originals is not None and not parameter.requires_grad
                source = self._original(trained, parameter.device) if is_frozen else trained
                yield self._merged(source, trained)
        # where a lora_bias gave a whole group of slots a bias: its share, or zeros
        for slot in linear_slots(self.arch):
            attention, mlp = ".self_attn." in slot, ".mlp." in slot
            if slot.endswith("o_proj"):
                attention = self.arch.family.has_output_bias
            needed = (attention and self.arch.attention_bias) or (mlp and self.arch.mlp_bias)
            module = self.model.get_submodule(hf_name(slot))
            if needed and module.bias is None:
                weight = module.weight
                zeros = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
                bias = lazy_parameter(f"{hf_name(slot)}.bias", zeros, None)
                yield self._merged(bias, bias)

    def _merged(self, source: LazyTensor, trained: LazyTensor) -> LazyTensor:
        """`source`, added to in float32 and rounded once; `trained` is the model's own tensor."""
        owner, _, leaf = source.name.rpartition(".")
        module, slot = self.model.get_submodule(owner), slot_name(source.name)
        dtype = self.dtype or trained.dtype

        @torch.no_grad()
        def load() -> Tensor:
            weight, delta = source.load(), None
            if isinstance(module, TokenEmbedding):
                weight = module.token_adapter.put_into(weight)
            if isinstance(module, LoRALinear):
                delta = module.lora_bias_delta() if leaf == "bias" else module.lora_delta(weight)
            written = (weight if delta is None else weight.float() + delta).to(dtype)
            if slot in self.formats:
                written = quantize(written, self.formats[slot])
            if delta is not None and leaf == "weight":
                before = trained.load()
                if self.originals is not None:
                    self._check_relation(source.name, weight, before)
                self.measured[slot] = measure_layer(slot, weight, before, delta, written)
            return written

        return replace(source, dtype=dtype, load=load)

    def _find_originals(self, allow_base_mismatch: bool) -> dict[str, LazyTensor]:
        originals, own = read_tensors(self.base), self.model.spec.base
        quantized = sorted(name for name, tensor in originals.items() if tensor.quantized)
        if quantized:
            raise CheckpointError(
                f"{self.base}: holds 4-bit weights ({listed(quantized)}); give 16- or 32-bit ones"
            )
        if own is None or FORMATS[own.format].pack is not None or allow_base_mismatch:
            return originals  # the weights themselves are compared as they come
        found = hash_tensors(originals.values(), tied=self.model.tie_word_embeddings)
        if found != own.content_hash:
            raise CheckpointError(
                f"{self.base}: not the checkpoint that the model was loaded from (content hash "
                f"{found[:12]}, the model's is {own.content_hash[:12]}); give that one, or merge "
                f"onto this one with {ALLOW}"
            )
        return originals

    def _original(self, weight: LazyTensor, device: torch.device) -> LazyTensor:
        """The tensor of the original checkpoint in place of the model's (possibly 4-bit) one."""
        assert self.originals is not None
        original = self.originals.get(weight.name)
        if original is None and weight.name == "lm_head.weight":
            original = self.originals.get("model.embed_tokens.weight")  # tied in the original
        if original is None:
            raise CheckpointError(
                f"{self.base}: no tensor {weight.name!r}; is it the base of this adapter?"
            )
        if original.shape != weight.shape:
            raise CheckpointError(
                f"{original.source}: {original.name} has shape {list(original.shape)}; "
                f"the model needs {list(weight.shape)}"
            )
        return replace(weight, load=lambda: original.load().to(device))

    def _check_relation(self, name: str, weight: Tensor, trained: Tensor) -> None:
        """A hash cannot tell which 16-bit checkpoint a quantized one was made from; this can."""
        change = (weight.float() - trained.float()).norm() / trained.float().norm()
        if not change <= _MAX_BASE_CHANGE:
            raise CheckpointError(
                f"{self.base}: {name} differs from the weight that the adapter was trained on by "
                f"{change:.0%} of its norm; this is not its original"
            )


def _formats(model: CausalLM, row: CheckpointFormat) -> dict[str, Format]:
    """slot -> format of the merged model's weight, where it is quantized."""
    if row.pack is None:
        return {}
    slots = linear_slots(model.spec.arch)
    held = {slot: format_of(model.get_parameter(f"{hf_name(slot)}.weight")) for slot in slots}
    formats: dict[str, Format] = {slot: own for slot, own in held.items() if own is not None} or {
        slot: NF4Format() for slot in slots if slot != "lm_head"
    }
    check_types(formats.values(), row)
    return dict.fromkeys(formats, NF4Format(scale_format="bnb")) if row is BNB_4BIT else formats


def _merged_arch(model: CausalLM, adapters: dict[str, LoRALinear]) -> LlamaArch:
    """A head with an adapter of its own is no longer the embedding, and a Llama has biases in all
    projections of a kind or in none."""
    arch: LlamaArch = model.spec.arch
    biased = [name for name, module in adapters.items() if module.lora_B.bias is not None]
    for name in biased:
        of = {".self_attn.": "attention_bias", ".mlp.": "mlp_bias"}
        key = next((key for part, key in of.items() if part in name), None)
        fixed = key is None or arch.family.fixed.get(key) is False
        if fixed or (name.endswith("o_proj") and not arch.family.has_output_bias):
            raise CheckpointError(
                f"{name} has a lora_bias, but {arch.model_type} models have no bias there"
            )
    return replace(
        arch,
        tie_word_embeddings=arch.tie_word_embeddings and "lm_head" not in adapters,
        attention_bias=arch.attention_bias or any(".self_attn." in name for name in biased),
        mlp_bias=arch.mlp_bias or any(".mlp." in name for name in biased),
    )
