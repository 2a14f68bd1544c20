"""Command lines with mistakes in plans and components, over the files of `malformed_files.py`."""

from __future__ import annotations

Case = tuple[str, ...]  # a command line, and what its message has to say
TRAIN = "finetune checkpoint.dir=tiny output_dir=out"

RULE = "inspect checkpoint.dir=tiny components='[{match: \"layers.*.mlp.*\", %s}]'"
PLANS: dict[str, Case] = {
    "small budget": (
        "plan bits=2 checkpoint.dir=tiny output=p.yaml",
        "bits=2 is too small: the smallest plan",
    ),
    "no match": (
        "inspect checkpoint.dir=tiny components='[{match: layers.9.mlp.up_proj, kind: linear}]'",
        "layers.9.mlp.up_proj",
        "rule of kind 'linear': match ",
    ),
    "range": (
        "inspect checkpoint.dir=tiny components='[{match: \"layers.[3-1].**\", kind: linear}]'",
        "layers.[3-1].**",
    ),
    "kind": (RULE % "kind: lroa", "unknown kind 'lroa'; did you mean 'lora'?"),
    "option": (RULE % "kind: lora, rnak: 4", "unknown option 'rnak'; did you mean 'rank'?"),
    "option of another kind": (
        RULE % "kind: frozen_nf4, rank: 4",
        "kind 'frozen_nf4' does not take 'rank'; it takes block_size, scale_block_size",
    ),
    "no rank": (RULE % "kind: lora", "kind 'lora' needs rank and alpha"),
    "rank 0": (RULE % "kind: lora, rank: 0, alpha: 1", "rank"),
    "rank as text": (RULE % "kind: lora, rank: big, alpha: 1", "'big'; it must be an integer"),
    "block": (RULE % "kind: frozen_nf4, block_size: 0", "block_size"),
    "scale format": (RULE % "kind: frozen_nf4, scale_format: log", "scale_format"),
    "loftq on 16 bits": (
        RULE % "kind: lora, rank: 2, alpha: 4, init_lora_weights: loftq",
        "loftq",
    ),
    "mixed dora": (RULE % "kind: lora, rank: 2, alpha: 4, use_dora: true", "use_dora"),
    "nothing trains": (
        "finetune checkpoint.dir=tiny data.train=good.jsonl output_dir=out "
        "components='[{match: \"**\", kind: linear}]'",
        "the plan trains nothing; add a rule of kind 'lora' or 'qlora'",
    ),
    "train pattern": ("inspect checkpoint.dir=tiny train=[nrom]", "nrom"),
    "train token": ("inspect checkpoint.dir=tiny train_tokens=[1024]", "1024"),
    "bare rules file": (
        "inspect checkpoint.dir=tiny components=bare_rules.yaml",
        "layers.9.mlp.up_proj",
    ),
    "adapters in quantize": (
        "quantize checkpoint.dir=tiny output_dir=out components=qlora_rules.yaml",
        "the rule with match 'lm_head' is of kind 'qlora'",
        "quantize takes frozen_nf4 and linear",
    ),
}
ALLOW = "--allow torch.optim"
OPTIMIZER = f"{TRAIN} --config-dir configs data.train=good.jsonl optimizer="
PLANS |= {
    "endless rank": (
        f"{TRAIN} data.train=good.jsonl method.rank=1000000000000",
        "out of memory: 128000000000000 bytes were asked for; see `qlora estimate --help`",
    ),
    "betas": (
        f"{TRAIN} data.train=good.jsonl optimizer.betas=[2,2]",
        "optimizer: torch.optim.AdamW refuses its arguments: Invalid beta",
    ),
    "one beta": (
        f"{TRAIN} data.train=good.jsonl optimizer.betas=[0.9]",
        "optimizer: torch.optim.AdamW refuses its arguments: IndexError('list index out of range')",
    ),
    "foreach and fused": (
        f"{TRAIN} data.train=good.jsonl optimizer.foreach=true optimizer.fused=true",
        "optimizer: torch.optim.AdamW refuses its arguments: ",
    ),
    "closure": (f"{OPTIMIZER}lbfgs {ALLOW}", "LBFGS computes the loss several times per step"),
    "sparse": (
        f"{OPTIMIZER}sparse {ALLOW}",
        "SparseAdam takes sparse gradients, and these are dense; name",
    ),
    "no optimizer": (
        f"{OPTIMIZER}no_optimizer --allow torch.nn",
        "torch.nn.ParameterList gives a ParameterList; name an optimizer",
    ),
    "schedule": (
        f"{OPTIMIZER}schedule {ALLOW}",
        "optimizer: torch.optim.lr_scheduler.StepLR refuses its",
    ),
    "no row of the table": (
        f"{OPTIMIZER}lbfgs",
        "'torch.optim.LBFGS' is no optimizer that a config may name",
        "--allow PREFIX",
    ),
    "estimated closure": (
        f"estimate --config-dir configs {ALLOW} optimizer=lbfgs",
        "LBFGS computes the loss several times per step",
    ),
    "no logger": (
        f"{TRAIN} data.train=good.jsonl --allow collections "
        "'loggers=[{component: collections.UserDict}]'",
        "loggers[0].component=collections.UserDict gives a UserDict; name a class with log and clo",
    ),
}
