"""Command lines with mistakes in configs and plans, over the files of `malformed_files.py`."""

from __future__ import annotations

Case = tuple[str, ...]  # a command line, and what its message has to say
TRAIN = "finetune checkpoint.dir=tiny output_dir=out"
OWN = "finetune --config-dir configs output_dir=out experiment="

CONFIGS: dict[str, Case] = {
    "unknown key": ("finetune training.bach_size=2", "did you mean 'training.batch_size'?"),
    "unknown section": ("finetune trainig.seed=1", "unknown key 'trainig.seed'; did you mean"),
    "key of another verb": ("generate method=lora prompt=hi", "unknown key 'method'"),
    "word for a number": ("finetune training.batch_size=abc", "training.batch_size: Value 'abc'"),
    "fraction": ("finetune training.batch_size=1.5", "training.batch_size: Value '1.5'"),
    "null": ("finetune training.epochs=null", "training.epochs: null is not allowed here"),
    "infinite integer": ("finetune training.epochs=inf", "training.epochs: "),
    "word for a switch": ("finetune overwrite=maybe", "overwrite: Value 'maybe'"),
    "text for a list": ("finetune method.targets=q_proj", "takes a list, such as [a,b]"),
    "list for a number": ("finetune training.seed=[1,2]", "training.seed: "),
    "two values": ("finetune training.seed=1,2", "training.seed=1,2", "write [1,2] for a list"),
    "too small": ("finetune training.batch_size=0", "training.batch_size=0 must be >= 1"),
    "too large": ("finetune lr_schedule.warmup_ratio=2", "lr_schedule.warmup_ratio=2.0 must be <="),
    "beyond integers": (f"finetune training.seed={2**64}", "is too large a number; it must be <"),
    "beyond sequences": ("finetune data.max_seq_len=2000000000", "must be <= 1048576"),
    "not finite": ("finetune training.clip_grad_norm=inf", "must be a finite number"),
    "word for a rate": ("finetune optimizer.lr=fast", "optimizer.lr='fast' must be a number > 0"),
    "choice": ("finetune training.compile=of", "allowed: auto, on, off; did you mean 'off'?"),
    "element of a list": ("finetune train_tokens=[-1]", "train_tokens=-1 must be >= 0"),
    "size": ("quantize output_dir=out max_shard_size=5XB", "write a number with KB, MB or GB"),
    "endless size": (f"plan budget={'9' * 400}GiB", "is not a size", "such as 24GiB"),
    "device": ("generate prompt=hi device=gpu", "device='gpu' is not allowed; allowed: auto, cpu"),
    "absent device": (
        "generate prompt=hi device=cuda:99",
        "device=cuda:99: torch",
        "use device=cp",
    ),
    "endless device": (f"generate prompt=hi device=cuda:{2**70}", "is not allowed; allowed: auto"),
    "rank of full": ("finetune method=full method.rank=4", "method.rank=4 has no effect"),
    "full dpo": ("dpo method=full data.train=same.jsonl", "use qlora or lora"),
    "resume and overwrite": (
        "finetune training.resume=auto overwrite=true",
        "goes on with a run and overwrite=true deletes it; give one of them",
    ),
    "evaluation of nothing": ("finetune training.eval_every=2 data.eval=null", "which is null"),
    "warmup": ("finetune lr_schedule.warmup_steps=9 training.max_steps=3", "must be <= training.m"),
    "greedy top_p": ("generate prompt=hi top_p=0.5", "top_p=0.5 has no effect at temperature=0"),
    "conversation into a file": (
        "generate interactive=true output=a.jsonl",
        "interactive=true is a conversation in the terminal and does not go with output; leave",
    ),
    "two prompts": ("generate prompt=hi prompts_file=a", "prompt and prompts_file are both given"),
    "pairs to finetune": ("finetune data=preference", "which only `qlora dpo` takes"),
    "forgotten data": ("finetune data=chat", "data.train is required", "write data.train=FILE"),
    "two budgets": ("plan budget=1GiB bits=4.5", "budget=1GiB and bits=4.5: give one of them"),
    "small budget": (
        "plan bits=2 checkpoint.dir=tiny output=p.yaml",
        "bits=2 is too small: the smallest plan",
    ),
    "several": (
        "finetune training.batch_size=0 training.epochs=0 device=gpu data.packing=best "
        "method.dropout=1 lr_schedule.min_lr_ratio=-1",
        "training.batch_size=0 must be >= 1",
        "training.epochs=0 must be >= 1",
        "device='gpu' is not allowed",
        "did you mean 'best_fit'?",
        "method.dropout=1.0 must be < 1",
        "lr_schedule.min_lr_ratio=-1.0 must be >= 0",
    ),
    "absent option": ("finetune method=qlroa", "method=qlroa: no such config; did you mean 'qlora"),
    "absent experiment": (f"{OWN}mine", "experiment=mine: no such config; "),
    "circle": ("finetune output_dir=${output_dir}", "output_dir: Recursive interpolation"),
    "absent reference": ("finetune data.eval=${foo}", "data.eval: Interpolation key 'foo' not fou"),
    "no config folder": ("finetune --config-dir nowhere", "--config-dir 'nowhere' is not a folder"),
    "shipped name": ("finetune --config-dir replaced", "has the name of a shipped config; rename"),
    "yaml": (f"{OWN}brackets", "brackets.yaml, line 2: not valid YAML: "),
    "yaml tab": (f"{OWN}tab", "tab.yaml, line 3: not valid YAML: "),
    "yaml twice": (f"{OWN}twice", "twice.yaml, line 4: not valid YAML: ", "seed"),
    "yaml latin": (f"{OWN}latin", "latin.yaml", "not UTF-8 text"),
    "yaml control": (f"{OWN}control", "control.yaml", "not valid YAML"),
    "yaml list": (f"{OWN}listed", "listed.yaml: holds a list; keys and values are"),
    "yaml text": (f"{OWN}text", "text.yaml: training: null is not allowed here"),
    "yaml deep": (f"{OWN}deep", "deep.yaml", "nested too deeply"),
    "yaml key": (f"{OWN}unknown_key", "unknown_key.yaml: ", "did you mean 'training.max_steps'?"),
    "yaml no option": (f"{OWN}no_such_group", "experiment/no_such_group.yaml: optimizer=adamv: no"),
    "yaml number": (
        f"{OWN}number_of_a_group",
        "experiment/number_of_a_group.yaml: Unsupported item",
    ),
    "yaml long name": (f"{OWN}long_name_of_a_group", "experiment/long_name_of_a_group.yaml: "),
    "yaml group": (f"{OWN}unknown_group", "unknown group 'metod'; did you mean 'method'?"),
    "yaml defaults": (f"{OWN}bad_defaults", "bad_defaults", "defaults must be a list"),
    "yaml type": (f"{OWN}wrong_type", "wrong_type.yaml: training.max_steps: Value 'many'"),
    "yaml section": (
        f"{OWN}section",
        "section.yaml: ",
        "a section takes keys of its own, such as training",
    ),
    "yaml package": (f"{OWN}unpackaged", "starts with the line '# @package _global_'"),
    "yaml circle": (
        "finetune --config-dir configs experiment=circle",
        "checkpoint.dir: Recursive interpolation",
    ),
    "yaml rules": (f"{OWN}rules", "rules.yaml: ", "components: takes a list, such as [a,b]"),
}
CONFIGS |= {
    "yaml section and defaults": (
        f"{OWN}section_and_defaults",
        "section_and_defaults.yaml: ",
        "training=3: a section takes keys of its own",
    ),
    "yaml choices": (
        f"{OWN}choices",
        "choices.yaml: a config is chosen in the list of defaults; instead of 'data: chat' write: "
        "defaults: [{override /data: chat}]",
        "instead of 'method: lora' write: defaults: [{override /method: lora}]",
    ),
    "yaml choices and more": (
        f"{OWN}choices_and_more",
        "choices_and_more.yaml: a config is chosen in the list of defaults; instead of 'method: lr",
        "choices_and_more.yaml: unknown key 'training.max_stps'; did you mean",
    ),
    "config=": ("finetune config=mine.yaml", "qlora configs cp FILE DIR/experiment/NAME.yaml"),
    "--config": ("finetune --config mine.yaml", "unknown option '--config': a file of keys, such"),
    "a bare file": ("finetune mine.yaml", "then --config-dir DIR experiment=NAME"),
    "no config folder given": (
        "finetune experiment=mine",
        "experiment=mine: no such config; 'qlora configs ls' lists those there are; one of your "
        "own, DIR/experiment/NAME.yaml, needs --config-dir DIR",
    ),
    "format of prompts": (
        "generate data=chat",
        "data=chat: rows of prompts_file show their format",
    ),
    "rows of prompts": (
        "generate data.eval=a",
        "'data.eval': rows to answer are given by prompts_f",
    ),
    "key of others": (
        "finetune adapter.path=a",
        "a key of generate, evaluate, merge; 'qlora",
    ),
    "half precision": ("finetune training.bf16=true", "it is 'training.compute_dtype' here"),
    "half precision of generate": ("generate bf16=true", "'bf16'; it is 'compute_dtype' here"),
    "save_steps": ("finetune training.save_steps=5", "it is 'training.save_every' here"),
    "learning rate": ("finetune optimizer.learning_rate=1", "AdamW; did you mean 'lr'?"),
    "arguments": ("finetune optimizer.xyz=1", "lr, maximize, weight_decay"),
    "adapter": ("generate adapter=a", "a section takes keys of its own, such as adapter.path"),
    "schedule": ("finetune lr_schedule=linear", "keys of its own, such as lr_schedule.name"),
    "model": ("finetune model=merged", "did you mean 'checkpoint.dir'?"),
    "dora": ("finetune method=dora", "method=dora: no such config; write method.use_dora=true"),
    "sharegpt": ("finetune data=sharegpt", "data=sharegpt: no such config; write data=chat"),
    "name of a method": (
        "finetune method.name=lora",
        "method=lora chooses a preset, method.name do",
    ),
    "comma": ("finetune optimizer.lr=2e-4,", "the override 'optimizer.lr=2e-4,': remove the comma"),
    "whole number": ("finetune method.rank=16.0", "rank: Value '16.0' is not a whole number"),
    "several files": (
        f"{TRAIN} data.train=[a,b]",
        "takes one file; write the rows of all into one",
    ),
}
RULE = "inspect checkpoint.dir=tiny components='[{match: \"layers.*.mlp.*\", %s}]'"
PLANS: dict[str, Case] = {
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
    "no mapping": ("inspect components=[3]", "components[0]: takes {key: value, ...}, not int"),
    "nothing trains": (
        "finetune checkpoint.dir=tiny data.train=good.jsonl output_dir=out "
        "components='[{match: \"**\", kind: linear}]'",
        "the plan trains nothing; add a rule of kind 'lora' or 'qlora'",
    ),
    "train pattern": ("inspect checkpoint.dir=tiny train=[nrom]", "nrom"),
    "train token": ("inspect checkpoint.dir=tiny train_tokens=[1024]", "1024"),
    "no rules file": ("inspect components=mine.yaml", "components=mine.yaml: no such file"),
    "bare rules file": (
        "inspect checkpoint.dir=tiny components=bare_rules.yaml",
        "layers.9.mlp.up_proj",
    ),
    "adapters in quantize": (
        "quantize checkpoint.dir=tiny output_dir=out components=qlora_rules.yaml",
        "the rule with match 'lm_head' is of kind 'qlora'",
        "quantize takes frozen_nf4 and linear",
    ),
    "rules file": ("inspect components=no_rules.yaml", "no list of rules under components:"),
    "rules with other letters": ("inspect components=foreign_rules.yaml", "'é' is no option of a"),
    "rules with a list": (
        "inspect components=listed_rules.yaml",
        "rule 2 of 2 is [1]; write {match",
    ),
    "rules with bytes": (
        "inspect components=dated_rules.yaml",
        "kind of a rule is b'hi', which none",
    ),
    "rules with a tag": (
        "inspect components=tagged_rules.yaml",
        "tagged_rules.yaml: not valid YAML: inv",
    ),
    "odd rules file": ("inspect components=odd_rules.yaml", "'a b' is no option of a rule"),
    "architecture": ("inspect model.arch=llama3_8", "llama3_8", "llama3_8b"),
    "component": (
        "finetune optimizer.component=torch.optim.AdmaW",
        "did you mean 'torch.optim.AdamW'?",
    ),
    "argument": ("finetune optimizer.lrr=1", "optimizer.lrr is not an argument of torch.optim.Ada"),
    "no component": ("finetune optimizer.component=null", "name the class, such as torch.optim.Ad"),
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
    "own package": (f"{TRAIN} --allow qlora_builders", "allow a package of your own"),
    "argument of the run": (
        f"{TRAIN} +optimizer.params=[]",
        "optimizer.params is given by the run; take it out",
    ),
    "no logger": (
        f"{TRAIN} data.train=good.jsonl --allow collections "
        "'loggers=[{component: collections.UserDict}]'",
        "loggers[0].component=collections.UserDict gives a UserDict; name a class with log and clo",
    ),
    "logger": (
        f"{TRAIN} 'loggers=[{{component: qlora_builders.training.loggers.Nothing}}]'",
        "loggers[0].component",
        "did you mean 'qlora_builders.training.loggers.",
    ),
}
