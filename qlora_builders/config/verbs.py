"""The verbs of the command line, one row each: all that knows them by name is derived from here.

A recipe of your own is a file in `recipes/` and a row; its YAML is `configs/NAME.yaml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_builders.config import schema


@dataclass(frozen=True)
class Verb:
    """
    Attributes:
        root: the dataclass of its config.
        summary: a line in `qlora --help`; its own help shows the docstring of `root`.
        examples: command lines; `tests/test_docs.py` composes them.
        recipe: the file in `recipes/`; NAME.py if empty.
        primary: the YAML in `configs/` that it starts from; NAME if empty.
        trains: writes a run's folder, and runs in several processes.
        swept: takes --multirun: the key with the path of a job, and how that path ends.
        needs_files: what it does needs the data and weights that its config names.
    """

    name: str
    root: type
    summary: str
    examples: Sequence[str]
    recipe: str = ""
    primary: str = ""
    trains: bool = False
    swept: tuple[str, str] | None = None
    needs_files: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", self.recipe or f"{self.name}.py")
        object.__setattr__(self, "primary", self.primary or self.name)


_ROWS = (
    Verb(
        "finetune",
        schema.FinetuneConfig,
        "train adapters or all weights on a data file",
        examples=(
            "qlora finetune experiment=demo_qlora",
            "qlora finetune checkpoint.dir=Llama-3.2-1B data.train=rows.jsonl training.epochs=2",
            "qlora finetune output_dir=runs/NAME training.save_every=50 training.resume=auto",
            "qlora finetune method=lora method.rank=8 method.targets=[q_proj,v_proj]",
            "qlora finetune 'components=[{match: \"layers.0.**\", kind: linear}]'",
            "qlora finetune --multirun optimizer.lr=1e-4,2e-4 method.rank=8,16 output_dir=runs/LR",
        ),
        trains=True,
        swept=("output_dir", ""),
    ),
    Verb(
        "dpo",
        schema.DPOConfig,
        "train adapters on pairs of answers, one better than the other",
        examples=(
            "qlora dpo experiment=demo_dpo",
            "qlora dpo checkpoint.dir=Llama-3.2-1B data.train=pairs.jsonl dpo.beta=0.05",
        ),
        trains=True,
        swept=("output_dir", ""),
    ),
    Verb(
        "generate",
        schema.GenerateConfig,
        "answer prompts with a checkpoint, or a checkpoint and an adapter",
        examples=(
            "qlora generate adapter.path=runs/NAME/adapter prompt='Hello, who are you?'",
            "qlora generate checkpoint.dir=merged prompts_file=prompts.txt temperature=0.7",
            "qlora generate checkpoint.dir=merged prompts_file=rows.jsonl output=answers.jsonl",
            "qlora generate checkpoint.dir=merged interactive=true system='Answer in one word.'",
        ),
    ),
    Verb(
        "evaluate",
        schema.EvaluateConfig,
        "loss, perplexity, exact match and tasks; base and fine-tuned compared",
        examples=(
            "qlora evaluate adapter.path=runs/NAME/adapter exact_match=20",
            "qlora evaluate checkpoint.dir=merged data.eval=rows.jsonl output=result.json",
            "qlora evaluate --multirun adapter.path=runs/A/adapter,runs/B/adapter output=both.json",
            "qlora evaluate adapter.path=runs/NAME/adapter exact_match=50 compare=true",
            "qlora evaluate checkpoint.dir=merged data.eval=null lm_eval.tasks=[arc_easy]",
        ),
        swept=("output", ".json"),
    ),
    Verb(
        "merge",
        schema.MergeConfig,
        "add an adapter to the weights and write a Hugging Face folder",
        examples=(
            "qlora merge adapter.path=runs/NAME/adapter output_dir=merged",
            "qlora merge adapter.path=runs/NAME/adapter base=Llama-3.2-1B output_dir=merged",
        ),
    ),
    Verb(
        "quantize",
        schema.QuantizeConfig,
        "write a checkpoint with its linear layers in NF4",
        examples=(
            "qlora quantize checkpoint.dir=Llama-3.2-1B output_dir=Llama-3.2-1B-nf4",
            "qlora quantize checkpoint.dir=Llama-3.2-1B output_dir=out format=bnb-4bit",
        ),
    ),
    Verb(
        "plan",
        schema.PlanConfig,
        "choose the precision of every linear under a memory budget",
        examples=(
            "qlora plan bits=4.6",
            "qlora plan checkpoint.dir=Llama-3.1-8B data.train=a.jsonl budget=6GiB",
            "qlora quantize components=plan.yaml output_dir=nf4",
            "qlora plan bits=4.6 rank=16 output=qlora.yaml && qlora finetune components=qlora.yaml",
        ),
        swept=("output", ".yaml"),
    ),
    Verb(
        "inspect",
        schema.FinetuneConfig,
        "show which component fills each linear, and what trains",
        examples=(
            "qlora inspect model.arch=llama3_1_8b method.rank=64",
            "qlora inspect 'components=[{match: \"layers.*.mlp.*\", kind: linear}]'",
        ),
        # `python recipes/inspect.py` would hide the standard library's module from all it imports
        recipe="inspect_plan.py",
        primary="finetune",
        needs_files=False,
    ),
    Verb(
        "estimate",
        schema.EstimateConfig,
        "predict the peak memory of a finetune, and what fits into a given one",
        examples=(
            "qlora estimate model.arch=llama3_1_70b device=cuda data.max_seq_len=4096",
            "qlora estimate model.arch=llama3_1_8b device=cuda memory=24GiB",
        ),
        needs_files=False,
    ),
    Verb(
        "report",
        schema.ReportConfig,
        "one HTML page of a run, or of several beside each other",
        examples=(
            "qlora report runs/NAME",
            "qlora report runs/ONE runs/TWO output=comparison.html",
        ),
    ),
)
VERBS = {row.name: row for row in _ROWS}

# what other programs call them
OTHER_VERBS = {
    "chat": "generate",
    "cp": "configs cp",
    "ls": "configs ls",
    "run": "finetune",
    "sft": "finetune",
    "train": "finetune",
    "validate": "configs validate",
}
