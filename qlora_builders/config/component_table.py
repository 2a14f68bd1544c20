"""What a config may name, in one table: classes that are meant to be named, each with its use.

A config file may come from anywhere, and most of what can be imported was not written to be called
by a stranger. So there are no prefixes here: a row is one class.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_builders.errors import did_you_mean, nearest

# kind -> the arguments of such a component that the run gives, and no config
GIVEN: dict[str, tuple[str, ...]] = {
    "optimizer": ("params",),
    "logger": ("run_dir", "first_step", "config"),
}
_TORCH = (
    "AdamW", "Adam", "SGD", "Adafactor", "RMSprop", "NAdam", "RAdam", "Adagrad", "Adadelta",
    "Adamax", "ASGD", "Rprop", "Muon",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        kind: a key of `GIVEN`: what it is used as.
        extra: what installs the package it is in, where that is optional.
    """

    path: str
    kind: str
    extra: str | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


TABLE: dict[str, Row] = {
    row.path: row
    for row in (
        *(Row(f"torch.optim.{name}", "optimizer") for name in _TORCH),
        Row("bitsandbytes.optim.AdamW8bit", "optimizer", "bitsandbytes"),
        Row("bitsandbytes.optim.PagedAdamW", "optimizer", "bitsandbytes"),
        Row("bitsandbytes.optim.PagedAdamW8bit", "optimizer", "bitsandbytes"),
        Row("torchao.optim.AdamW8bit", "optimizer", "torchao"),
        Row("qlora_builders.training.loggers.TensorBoardLogger", "logger"),
        Row("qlora_builders.training.loggers.WandbLogger", "logger"),
    )
}


def nearest_row(path: str, kind: str) -> str:
    """`; did you mean 'torch.optim.AdamW'?`, by the whole path or by the class's name alone."""
    rows = [row for row in TABLE.values() if row.kind == kind]
    name = nearest(path.rpartition(".")[2], [row.name for row in rows])
    same_name = [row.path for row in rows if row.name == name]
    return did_you_mean(path, same_name or [row.path for row in rows])
