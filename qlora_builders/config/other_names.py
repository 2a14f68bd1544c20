"""What other libraries call keys, options and commands, and what these are here."""

from __future__ import annotations

# the last part of a key -> the key; where a verb has the key without its section, that one
OTHER_NAMES = {
    "base_model": "checkpoint.dir",
    "bf16": "training.compute_dtype",
    "eval_steps": "training.eval_every",
    "fp16": "training.compute_dtype",
    "gradient_accumulation_steps": "training.grad_accumulation",
    "gradient_checkpointing": "training.activation_checkpointing",
    "learning_rate": "optimizer.lr",
    "logging_steps": "training.log_every",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_r": "method.rank",
    "lr": "optimizer.lr",
    "max_seq_length": "data.max_seq_len",
    "model": "checkpoint.dir",
    "model_name_or_path": "checkpoint.dir",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "r": "method.rank",
    "save_steps": "training.save_every",
    "target_modules": "method.targets",
}
# GROUP=OPTION -> what to write
OTHER_OPTIONS = {
    "data=alpaca": "data.columns.prompt=instruction data.columns.completion=output",
    "data=sharegpt": "data=chat",
    "method=dora": "method.use_dora=true",
    "method=loftq": "method.init_lora_weights=loftq",
    "method=pissa": "method.init_lora_weights=pissa",
    "method=rslora": "method.use_rslora=true",
}
OTHER_VERBS = {
    "chat": "generate",
    "cp": "configs cp",
    "ls": "configs ls",
    "run": "finetune",
    "sft": "finetune",
    "train": "finetune",
    "validate": "configs validate",
}
# verb, key -> why it has none
NOT_NEEDED = {
    ("generate", "data"): "rows of prompts_file show their format; leave it out",
    ("generate", "data.format"): "rows of prompts_file show theirs; leave it out",
    ("generate", "data.train"): "rows to answer are given by prompts_file=FILE",
    ("generate", "data.eval"): "rows to answer are given by prompts_file=FILE",
}
# what is written where a file of keys is meant
FILE_WORDS = ("c", "cfg", "config", "config-file", "config_file", "config-name", "config_name")
OWN_FILE = (
    "a file of keys, such as a run's config.yaml, is used as an experiment: "
    "qlora configs cp FILE DIR/experiment/NAME.yaml, then --config-dir DIR experiment=NAME"
)
