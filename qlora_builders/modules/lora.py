"""LoRALinear: a frozen linear layer, plain or NF4, and the low-rank update that trains on it.

Shapes: n = product of the input's leading axes, in = in_features, out = out_features, r = rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.modules.dora import row_squares, updated_norms
from qlora_builders.modules.linear import (
    Linear,
    add_frozen_base,
    describe_linear,
    linear,
    plain,
    quantize_weight_,
)


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update (https://arxiv.org/abs/2106.09685).

        y = x W^T + b + scaling * dropout(x) A^T B^T

    with scaling = alpha / rank, or alpha / sqrt(rank) with `use_rslora`
    (https://arxiv.org/abs/2312.03732). B starts at zero, so an untrained adapter changes nothing.

    Parameters: `weight` [out, in] (NF4 with `quantize_base`), `bias` [out],
    `lora_A.weight` [r, in] and `lora_B.weight` [out, r], both float32 and never quantized; with
    `lora_bias` also `lora_B.bias` [out], trained from zero and scaled like the rest of the update;
    with `use_dora` also `lora_magnitude_vector` [out], the trained lengths of the rows of
    W + scaling * B A (see `dora.py`), which start as those of W.

    Args:
        rank: r >= 1.
        alpha: numerator of the scaling, > 0.
        dropout: probability of dropping an input of the adapter, in [0, 1).
        quantize_base: store `weight` in NF4.
        dtype: dtype of the base weight; None is torch's default dtype.
        nf4_options: as for `FrozenNF4Linear`; only with `quantize_base`.

    Raises:
        ValueError: for a rank, alpha or dropout out of range, options that exclude each other, or
            NF4 options on a plain base.
    """

    weight: Tensor
    bias: Tensor | None
    lora_magnitude_vector: Tensor | None
    base_squares: Tensor | None  # of the weight's rows, for DoRA; follows the weight, never saved

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        bias: bool = False,
        quantize_base: bool = False,
        use_rslora: bool = False,
        lora_bias: bool = False,
        use_dora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **nf4_options: Any,
    ) -> None:
        super().__init__()
        check_lora_options(
            rank=rank, alpha=alpha, dropout=dropout, lora_bias=lora_bias, use_dora=use_dora
        )
        if nf4_options and not quantize_base:
            names = ", ".join(sorted(nf4_options))
            raise ValueError(f"{names} need quantize_base=True; the base weight is not quantized")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.alpha = alpha
        self.use_rslora = use_rslora
        add_frozen_base(self, bias=bias, device=device, dtype=dtype)
        if quantize_base:
            quantize_weight_(self, **nf4_options)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_A = Linear(in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = Linear(rank, out_features, bias=lora_bias, device=device, dtype=torch.float32)
        lengths = torch.empty(out_features, device=device, dtype=torch.float32)
        magnitudes = nn.Parameter(lengths) if use_dora else None
        self.register_parameter("lora_magnitude_vector", magnitudes)
        self.register_buffer("base_squares", None, persistent=False)
        if use_dora:
            self.register_load_state_dict_post_hook(_after_load)
        self.reset_lora_parameters()

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def reset_lora_parameters(self) -> None:
        """A as PEFT and the LoRA authors' code draw it, B zero, magnitudes the base's."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        for parameter in self.lora_B.parameters():
            nn.init.zeros_(parameter)
        self.reset_magnitudes()

    @torch.no_grad()
    def reset_magnitudes(self) -> None:
        """With DoRA, give the rows of W + s B A the lengths that they have."""
        self.base_changed()
        if self.lora_magnitude_vector is None or self.weight.is_meta:
            return
        lengths = self._lengths(torch.float32)
        if self.lora_magnitude_vector.is_meta:
            self.lora_magnitude_vector = nn.Parameter(lengths)
        else:
            self.lora_magnitude_vector.copy_(lengths)

    @torch.no_grad()
    def base_changed(self) -> None:
        """To be called after `weight` was replaced or written to; loading a state_dict does it."""
        if self.lora_magnitude_vector is None:
            return
        if self.weight.is_meta:
            self.base_squares = torch.empty(self.out_features, device="meta")
        else:
            self.base_squares = row_squares(plain(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)  # [n, in]
        dropped = self.dropout(rows)  # [n, in]
        down = self.lora_A(dropped)  # [n, r]
        magnitudes = self.lora_magnitude_vector
        bias = self._whole_bias() if magnitudes is None else None
        output = linear(rows, self.weight, bias)  # [n, out]
        up = self.lora_B.weight.to(down.dtype).t()  # [r, out]
        output = output.addmm_(down, up, alpha=self.scaling)
        if magnitudes is not None:
            scaled = output  # [n, out], what the magnitudes act on
            if self.training and not isinstance(self.dropout, nn.Identity):
                scaled = linear(dropped, self.weight, None).addmm_(down, up, alpha=self.scaling)
            # not by stretch itself, which is 1.0078 in bfloat16 for 1.005
            stretch = magnitudes / self._lengths(rows.dtype)
            output = torch.addcmul(output, scaled, (stretch - 1).to(output.dtype))
            output = output if self.bias is None else output + self.bias.to(output.dtype)
        return output.view(*input.shape[:-1], self.out_features)

    @torch.no_grad()
    def _lengths(self, dtype: torch.dtype) -> Tensor:
        """|W + scaling * B A| of each row, float32 [out]; the product with W is in `dtype`."""
        assert self.base_squares is not None
        a, b = self.lora_A.weight.float(), self.lora_B.weight.float()
        products = linear(a.to(dtype), self.weight, None)  # [r, out]
        return updated_norms(self.base_squares, products, a, b, self.scaling)

    def _whole_bias(self) -> Tensor | None:
        update = self.lora_bias_delta()
        if update is None or self.bias is None:
            return self.bias if update is None else update
        return self.bias.float() + update

    def lora_delta(self, weight: Tensor | None = None) -> Tensor:
        """The float32 [out, in] update that merging adds to `weight`, by default the layer's own.

        That is scaling * B A. With DoRA it depends on the weight: W' - W, see `dora.py`.
        """
        delta = self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())
        if self.lora_magnitude_vector is None:
            return delta
        base = plain(self.weight if weight is None else weight).float()
        whole = base + delta
        stretch = self.lora_magnitude_vector.float() / row_squares(whole).sqrt()
        # a row of zeros stays one
        return whole.mul_(stretch.nan_to_num_(nan=0.0)[:, None]).sub_(base)

    def lora_bias_delta(self) -> Tensor | None:
        """What merging adds to the bias: float32 [out], or None without `lora_bias`."""
        bias = self.lora_B.bias
        return None if bias is None else self.scaling * bias.float()

    def extra_repr(self) -> str:
        dora = ", use_dora=True" if self.lora_magnitude_vector is not None else ""
        return f"{describe_linear(self)}, rank={self.rank}, alpha={self.alpha}{dora}"


def _after_load(module: LoRALinear, incompatible_keys: Any) -> None:
    """load_state_dict post-hook. A model on meta is being filled, and asks when it is whole."""
    if module.lora_magnitude_vector is not None and not module.lora_magnitude_vector.is_meta:
        module.base_changed()


def is_adapter(parameter_name: str) -> bool:
    """Whether a parameter of a model belongs to an adapter, by its name."""
    return ".lora_" in parameter_name


def check_lora_options(
    *,
    rank: int,
    alpha: float,
    dropout: float,
    lora_bias: bool = False,
    use_dora: bool = False,
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
