"""LoRALinear: a frozen linear layer, plain or quantized, and the low-rank update that trains on it.

Shapes: n = product of the input's leading axes, in = in_features, out = out_features, r = rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.modules.linear import Linear, add_frozen_base, describe_linear
from qlora_builders.modules.lora_parts import DEFAULT_INIT, LOFTQ, Magnitudes, Start, stored_rank
from qlora_builders.tensor import Format, NF4Format, linear, plain


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update (https://arxiv.org/abs/2106.09685).

        y = x W^T + b + scaling * dropout(x) A^T B^T

    with scaling = alpha / rank, or alpha / sqrt(rank) with `use_rslora`
    (https://arxiv.org/abs/2312.03732). B starts at zero, so an untrained adapter changes nothing.

    Parameters: `weight` [out, in] (NF4 with `quantize_base`), `bias` [out],
    `lora_A.weight` [r, in] and `lora_B.weight` [out, r], both float32 and never quantized; with
    `lora_bias` also `lora_B.bias` [out], trained from zero and scaled like the rest of the update;
    with `use_dora` also `lora_magnitude_vector` [out], the trained lengths of the rows of
    W + scaling * B A, which start as those of W; with a PiSSA start also the frozen `lora_A_init`
    and `lora_B_init`, which the update subtracts. `lora_parts.py` explains DoRA and the starts.

    Attributes:
        adapter_enabled: off, the layer computes as its base does; see `adapters_disabled`.

    Args:
        rank: r >= 1.
        alpha: numerator of the scaling, > 0.
        dropout: probability of dropping an input of the adapter, in [0, 1).
        quantize_base: store `weight` in NF4, or in the format given.
        init_lora_weights: `default` is as above; `pissa` or `pissa_niter_N`; `loftq`, only with
            `quantize_base`.
        dtype: dtype of the base weight; None is torch's default dtype.
        nf4_options: as for `FrozenNF4Linear`; only with `quantize_base`.

    Raises:
        ValueError: for a rank, alpha or dropout out of range, options that exclude each other, or
            NF4 options on a plain base.
    """

    weight: Tensor
    bias: Tensor | None
    adapter_enabled = True
    lora_magnitude_vector: Tensor | None
    lora_A_init: Tensor | None
    lora_B_init: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        bias: bool = False,
        quantize_base: bool | Format = False,
        use_rslora: bool = False,
        lora_bias: bool = False,
        use_dora: bool = False,
        init_lora_weights: str = DEFAULT_INIT,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **nf4_options: Any,
    ) -> None:
        super().__init__()
        format = _base_format(quantize_base, nf4_options)
        check_lora_options(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            lora_bias=lora_bias,
            use_dora=use_dora,
            init_lora_weights=init_lora_weights,
            quantize_base=format is not None,
        )
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.alpha = alpha
        self.use_rslora = use_rslora
        self.init_lora_weights = init_lora_weights
        original = add_frozen_base(self, bias=bias, format=format, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_A = Linear(in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = Linear(rank, out_features, bias=lora_bias, device=device, dtype=torch.float32)
        self.start = Start(init_lora_weights)
        self.start.add_to(self)
        self.magnitudes = Magnitudes() if use_dora else None
        self.register_parameter("lora_magnitude_vector", None)
        if self.magnitudes is not None:
            self.magnitudes.add_to(self, device)
        self.reset_lora_parameters(original)

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)  # [n, in]
        if not self.adapter_enabled:
            output = linear(rows, self.weight, self.bias)  # [n, out]
        else:
            dropped = self.dropout(rows)  # [n, in]
            down = self.lora_A(dropped)  # [n, r]
            if self.magnitudes is None:
                output = self.updated(rows, down, self._whole_bias())  # [n, out]
            else:
                output = self.magnitudes.output(self, rows, dropped, down)  # [n, out]
        return output.view(*input.shape[:-1], self.out_features)

    def updated(self, rows: Tensor, down: Tensor, bias: Tensor | None) -> Tensor:
        """Base and update: rows [n, in] through W, down [n, r] through B. [n, out]"""
        output = self.start.take_off_(self, rows, linear(rows, self.weight, bias))
        up = self.lora_B.weight.to(down.dtype).t()  # [r, out]
        return output.addmm_(down, up, alpha=self.scaling)

    def _whole_bias(self) -> Tensor | None:
        update = self.lora_bias_delta()
        if update is None or self.bias is None:
            return self.bias if update is None else update
        return self.bias.float() + update

    # ---- where it starts ------------------------------------------------------------------------

    def reset_lora_parameters(self, original: Tensor | None = None) -> None:
        """A as PEFT and the LoRA authors' code draw it, B zero; then `init_from_base`."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        for parameter in self.lora_B.parameters():
            nn.init.zeros_(parameter)
        self.init_from_base(original)

    @torch.no_grad()
    def init_from_base(self, original: Tensor | None = None) -> None:
        """What starts from the base weight: A and B under PiSSA and LoftQ, magnitudes under DoRA.

        Args:
            original: [out, in], the weight before it was quantized; LoftQ needs it.
        """
        self.base_changed()
        if self.weight.is_meta:
            return
        self.start.fill(self, original)
        if self.magnitudes is not None:
            self.magnitudes.fill(self)

    @torch.no_grad()
    def base_changed(self) -> None:
        """To be called after `weight` was replaced or written to; loading a state_dict does it."""
        if self.magnitudes is not None:
            self.magnitudes.base_changed(self)

    # ---- what files and merging see -------------------------------------------------------------

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def stored_rank(self) -> int:
        return stored_rank(self.rank, self.init_lora_weights)

    @property
    def stored_alpha(self) -> float:
        """The alpha that gives `scaling` with `stored_rank`."""
        ratio = self.stored_rank / self.rank
        return self.alpha * (math.sqrt(ratio) if self.use_rslora else ratio)

    def stored_factors(self) -> tuple[Tensor, Tensor]:
        """A and B as an adapter file has them: [stored_rank, in] and [out, stored_rank]."""
        return self.start.factors(self)

    def lora_delta(self, weight: Tensor | None = None) -> Tensor:
        """The float32 [out, in] update that merging adds to `weight`, by default the layer's own.

        That is scaling * B A. With DoRA it depends on the weight: W' - W.
        """
        a, b = self.stored_factors()
        update = self.scaling * (b.float() @ a.float())
        if self.magnitudes is None:
            return update
        return self.magnitudes.delta(self, update, plain(self.weight if weight is None else weight))

    def lora_bias_delta(self) -> Tensor | None:
        """What merging adds to the bias: float32 [out], or None without `lora_bias`."""
        bias = self.lora_B.bias
        return None if bias is None else self.scaling * bias.float()

    def extra_repr(self) -> str:
        dora = "" if self.magnitudes is None else ", use_dora=True"
        init = self.init_lora_weights
        start = "" if init == DEFAULT_INIT else f", init_lora_weights={init!r}"
        return f"{describe_linear(self)}, rank={self.rank}, alpha={self.alpha}{dora}{start}"


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, every `LoRALinear` of `model` computes as its base does; nothing is copied or moved.

    Nested uses are fine, and an error inside leaves the adapters as they were before.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    before = [layer.adapter_enabled for layer in layers]
    try:
        for layer in layers:
            layer.adapter_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.adapter_enabled = enabled


def is_adapter(parameter_name: str) -> bool:
    """Whether a parameter of a model belongs to an adapter, by its name."""
    return ".lora_" in parameter_name or ".token_adapter." in parameter_name


def _base_format(quantize_base: bool | Format, nf4_options: dict[str, Any]) -> Format | None:
    """None for a plain base."""
    if nf4_options and quantize_base is not True:
        names = ", ".join(sorted(nf4_options))
        if quantize_base:
            raise ValueError(f"{names} contradict quantize_base={quantize_base}, a whole format")
        raise ValueError(f"{names} need quantize_base=True; the base weight is not quantized")
    return NF4Format(**nf4_options) if quantize_base is True else quantize_base or None


def check_lora_options(
    *,
    rank: int,
    alpha: float,
    dropout: float,
    lora_bias: bool = False,
    use_dora: bool = False,
    init_lora_weights: str = DEFAULT_INIT,
    quantize_base: bool = True,
) -> None:
    """
    Raises:
        ValueError: naming the option, the value and the allowed range.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank!r}; it must be an integer >= 1")
    if not 0 < alpha < math.inf:
        raise ValueError(
            f"alpha is {alpha!r}; it must be > 0 and finite (the update is scaled by alpha / rank)"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}; it must be in [0, 1)")
    if lora_bias and use_dora:
        raise ValueError("lora_bias and use_dora exclude each other, here as in PEFT; drop one")
    if Start(init_lora_weights).init == LOFTQ and not quantize_base:
        raise ValueError(
            "init_lora_weights='loftq' corrects a quantized base, and this one is not (kind lora, "
            "quantize_base=False)"
        )
