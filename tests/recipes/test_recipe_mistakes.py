"""Command lines that cannot be: one message that says why, exit code 2, and nothing is written.

What a config says without a checkpoint is in tests/config/test_mistakes.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = "training.max_steps=1 training.batch_size=4 training.compute_dtype=float32"
F32 = "checkpoint.dir={base} compute_dtype=float32"
# what each verb needs, so that nothing else is wrong
GIVEN = {
    "finetune": f"checkpoint.dir={{base}} data.train={{rows}} output_dir={{out}} {TINY}",
    "generate": F32,
    "evaluate": f"{F32} data.eval={{rows}}",
    "quantize": "checkpoint.dir={base} output_dir={out}",
    "plan": f"{F32} data.train={{rows}} data.eval={{rows}} output={{out}}.yaml",
    "inspect": "checkpoint.dir={base}",
}
MISTAKES = """
evaluate data.eval=null | data.eval is required: write data.eval=FILE
evaluate lm_eval.tasks_dir=here | lm_eval.tasks_dir=here has no effect without lm_eval.tasks
evaluate data=preference | holds pairs of answers, which only `qlora dpo` takes
evaluate checkpoint.format=nf4 | format is 'nf4', but the directory is 'hf'
generate checkpoint.format=nf4 prompt=hi | format is 'nf4', but the directory is 'hf'
quantize checkpoint.format=nf4 | format is 'nf4', but the directory is 'hf'
quantize block_size=63 | block_size is 63
quantize scale_format=bnb scale_search=true | scale_search cannot be combined with
quantize components=[{match: 'layers.*', kind: frozen_nf4}] | layers.*
estimate memory=0GiB | memory='0GiB' is not a size
estimate method.targets=[q_porj] | did you mean 'q_proj'?
estimate components=[{match: '**', kind: linear}] | the plan trains nothing
inspect checkpoint.format=nf4 | format is 'nf4', but the directory is 'hf'
inspect method.targets=[q_porj] | did you mean 'q_proj'?
inspect components=[{match: lm_head, kind: qlora, rnak: 4}] | did you mean 'rank'?
inspect components=[{match: layers.99.**, kind: linear}] | the layers are 0 to 1
inspect components=[{match: lm_head, kind: qlroa}] | did you mean 'qlora'?
plan budget=6GB | budget='6GB' is not a size: write a number with MiB or GiB
plan bits=0 | bits=0.0 must be > 0
plan bits=4 | bits=4 is too small: the smallest plan has bits=4.044 or budget=0.08MiB
plan budget=0.01MiB | budget=0.01MiB is too small: the smallest plan has bits=4.044
plan bits=16 | bits=16 is too large: without quantization the base has bits=16.0
plan budget=1GiB | budget=1GiB is too large: without quantization the base has
plan bits=5 data.train=nowhere.jsonl | nowhere.jsonl
plan bits=5 data.format=text | text
report missing | 'missing' is no run directory: it has neither metrics.jsonl nor con
report missing outptu=x | unknown key 'outptu'; did you mean 'output'?
report --html | unknown option '--html'
finetune checkpoint.format=nf4 data.eval=null | format is 'nf4', but the directory is 'hf'
finetune components=[{match: '**', kind: linear}] | the plan trains nothing
finetune output_dir={rows}/run | rows.jsonl is a file, not a folder; choose another
finetune loggers=[{component: os.system}] | ='os.system' is no logger that a config may name
finetune loggers=[{component: {log}TensorBordLogger}] | did you mean '{log}TensorBoardLogger'?
finetune loggers=[{component: {log}WandbLogger, projct: p}] | loggers[0].projct is not an argument
finetune dpo.beta=1 | unknown key 'dpo.beta'
dpo  | data.train is required: the demo file has instruct rows, but data.format=pre
dpo data=chat | data.format=chat holds no pairs of answers; dpo takes preference
dpo dpo.beta=0 | dpo.beta=0.0 must be > 0
dpo dpo.label_smoothing=0.5 | dpo.label_smoothing=0.5 must be < 0.5
dpo dpo.loss_type=ipo | dpo.loss_type='ipo' is not allowed; allowed: sigmoid, hin
dpo dpo.bata=1 | unknown key 'dpo.bata'; did you mean 'dpo.beta'?
merge --multirun x=1,2 | qlora merge takes no --multirun; finetune, dpo,
evaluate --multirun --nproc-per-node=2 | qlora evaluate runs in one process; on
finetune --multirun --print-config | --print-config is for one run; leave out
finetune --multirun training.seed=1 | --multirun needs a key with several val
finetune --multirun training.epochs=1,0 optimizer.lr=0.1,-1 | error: training.epochs=0 must be >= 1
finetune --multirun training.epochs=1,0 optimizer.lr=0.1,-1 | error: optimizer.lr=-1 must be a num
"""


@pytest.mark.parametrize("line", MISTAKES.strip("\n").splitlines())
def test_mistakes(
    refused: Callable[..., str], checkpoint: Path, rows: Path, tmp_path: Path, line: str
) -> None:
    names = {"base": checkpoint, "rows": rows, "out": tmp_path / "out"}
    logger = "qlora_builders.training.loggers."
    command, message = line.replace("{log}", logger).replace("{rows}", str(rows)).split(" | ")
    verb, *options = re.split(r" (?=[\w.]+=|--|missing)", command.strip())
    given = [word.format_map(names) for word in GIVEN.get(verb, "").split()]
    error = refused(verb, *given, *options)
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("- {match: 'layers.**', kind: linnear}\n", "did you mean 'linear'"),
        ("rules: []\n", "no list of rules under components:"),
        ("components: nothing\n", "no list of rules under components:"),
        (
            "components: [{match: lm_head, kind: linear}]\ntrain: [norm]\n",
            "train beside components:, which alone is read from such a file",
        ),
        ("components: [\n", "plan.yaml, line 2: not valid YAML: expected the node content"),
        ("components: [{'a b': 1}]\n", "'a b' is no option of a rule"),
        ("components: [{match: 'layers.**', kind: linnear}]\n", "did you mean 'linear'"),
        ("components: \xe9\n", "not UTF-8 text"),
    ],
)
def test_a_file_that_holds_no_rules(
    refused: Callable[..., str], checkpoint: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "plan.yaml"
    if content is not None:
        file.write_text(content, "latin-1")
    argv = ["inspect", f"checkpoint.dir={checkpoint}", f"components={file}"]
    assert message in refused(*argv)
