"""Every mistake in an override or in a file of one's own has readable messages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from own_configs import write_own

from qlora_builders import cli
from qlora_builders.config.compose import compose
from qlora_builders.errors import ConfigError

# A command, and behind each | a piece of its messages.
COMMANDS = r"""
finetune training.bach_size=2
    | error: unknown key 'training.bach_size'; did you mean 'training.batch_size'?
finetune trainig.seed=1 | unknown key 'trainig.seed'; did you mean
generate method=lora prompt=hi | unknown key 'method'
finetune training.learning_rate=1 | 'training.learning_rate'; it is 'optimizer.lr' here
finetune training.bf16=true | it is 'training.compute_dtype' here
generate bf16=true | 'bf16'; it is 'compute_dtype' here
finetune training.save_steps=5 | it is 'training.save_every' here
finetune r=8 | unknown key 'r'; it is 'method.rank' here
finetune batch_size=2 | unknown key 'batch_size'; did you mean 'training.batch_size'?
finetune +training.foo=1 | unknown key 'training.foo'
finetune ++foo=1 | unknown key 'foo'
finetune xxxxxxxx=1 | unknown key 'xxxxxxxx'; 'qlora finetune --help' lists the keys
finetune hydra.run.dir=x | unknown key 'hydra.run.dir'
finetune training={bach:2} | unknown key 'training.bach'; | 'training.batch_size'
finetune data.columns.promt=q | did you mean 'data.columns.prompt'?
finetune metod=qlora | unknown key 'metod'; did you mean 'method'?
finetune training.seed.x=1 | unknown key 'training.seed.x'
finetune adapter.path=a | a key of generate, evaluate, merge; 'qlora
generate data.eval=a | 'data.eval': rows to answer are given by prompts_f

finetune method=qlroa | method=qlroa: no such config; did you mean 'qlora'?
finetune method=null | method=null: no such config; did you mean 'full'
finetune method=dora | method=dora: no such config; write method.use_dora=true
finetune data=sharegpt | data=sharegpt: no such config; write data=chat
finetune experiment=demo_qlor | no such config; did you mean 'demo_qlora'?
finetune optimizer=zzz | optimizer=zzz: no such config; allowed: adamw, adamw_8bit,
generate data=chat | data=chat: rows of prompts_file show their format
finetune experiment=mine
    | experiment=mine: no such config; 'qlora configs ls' lists those there are; one of your own,
    | DIR/experiment/NAME.yaml, needs --config-dir DIR
finetune --config-dir configs experiment=mine | experiment=mine: no such config;
finetune --config-dir | expected one argument; see --help
finetune --config-dir nowhere | --config-dir 'nowhere' is not a folder
finetune config=mine.yaml | qlora configs cp FILE DIR/experiment/NAME.yaml
finetune --verbose | unknown option '--verbose'; see --help
finetune --training.seed=1 | unknown option '--training.seed=1'; write training.seed=1, without
finetune --config mine.yaml | unknown option '--config': a file of keys, such
finetune mine.yaml | then --config-dir DIR experiment=NAME

finetune components.0.rank=4 | components: takes a list, such as [a,b]
finetune method.targets=q_proj | method.targets: takes a list, such as [a,b]
finetune training.seed=[1,2] | training.seed:
finetune training.batch_size=abc | training.batch_size: Value 'abc' is not a whole number
finetune training.batch_size=1.5 | training.batch_size: Value '1.5'
finetune method.rank=16.0 | rank: Value '16.0' is not a whole number
finetune training.epochs=inf | training.epochs:
finetune overwrite=maybe | overwrite: Value 'maybe'
finetune training.batch_size=null | training.batch_size: null is not allowed here
finetune output_dir=null | output_dir: null is not allowed here
finetune training.batch_size=1,2 | training.batch_size=1,2
    | has several values; write [1,2] for a list
finetune optimizer.lr=2e-4, | the override 'optimizer.lr=2e-4,': remove the comma
finetune components=[{match:layers.[0-1].**,kind:linear}] | cannot read the override | quote
finetune training.batch_size | 'training.batch_size' is not KEY=VALUE
finetune ~training.seed=1 | keys cannot be removed; write training.seed=null
finetune output_dir=${output_dir} | output_dir: Recursive interpolation
finetune data.eval=${foo} | data.eval: Interpolation key 'foo' not found
generate adapter=a | a section takes keys of its own, such as adapter.path
finetune lr_schedule=linear | keys of its own, such as lr_schedule.name
finetune model=merged | did you mean 'checkpoint.dir'?

finetune training.seed=18446744073709551616 | is too large a number; it must be <
finetune lr_schedule.min_lr_ratio=-1 | lr_schedule.min_lr_ratio=-1.0 must be >= 0
finetune data.max_seq_len=2000000000 | must be <= 1048576
finetune training.clip_grad_norm=inf | must be a finite number
finetune optimizer.lr=fast | optimizer.lr='fast' must be a number > 0
finetune training.compile=of | allowed: auto, on, off; did you mean 'off'?
finetune train_tokens=[-1] | train_tokens=-1 must be >= 0
generate prompt=hi device=cuda:99 | device=cuda:99: torch | use device=cp
generate prompt=hi device=cuda:1180591620717411303424 | is not allowed; allowed: auto
estimate memory=8 | memory='8' is not a size: write a number with MiB or GiB, such as 24GiB
plan budget=9999999999999999999999999GiB | is not a size | such as 24GiB
dpo method=full data.train=same.jsonl | use qlora or lora
dpo data=text data.train=a data.packing=best_fit data.train_on=all
| data.format=text holds no pairs of answers; dpo takes preference, rows with prompt, chosen and re
    | data.packing=best_fit: dpo does not pack pairs; write none
    | data.train_on=all has no effect: dpo compares the last answers
dpo data.train=a dpo.loss_type=hinge dpo.label_smoothing=0.1
    | dpo.label_smoothing=0.1 has no effect with dpo.loss_type=hinge
finetune data=preference | which only `qlora dpo` takes
finetune data=text data.train=a training.samples=2
    | training.samples=2 needs questions in data.eval, which is null
evaluate data=text data.eval=a exact_match=3
    | exact_match=3 needs questions in data.eval, which is plain text
evaluate lm_eval.limit=3 compare=true quantize=nf4
    | lm_eval.limit=3 has no effect without lm_eval.tasks
    | quantize=nf4 has no effect: without an adapter, compare=true compares the base in both
finetune training.lora_plus_ratio=8 optimizer.lr=null
    | training.lora_plus_ratio multiplies optimizer.lr, which is missing
finetune loggers=[{}]
    | loggers[0].component is missing: name the class, such as qlora_builders.training.loggers.T
finetune data=text data.columns.prompt=q data.train=a
    | data.columns.prompt=q has no effect: data.format=text does not read it
generate prompt=hi data.columns.prompt=q
    | data.columns.prompt=q has no effect: only the rows of prompts_file have columns
finetune method=full method.rank=4 | method.rank=4 has no effect: method=full
finetune method.name=lora | method=lora chooses a preset, method.name do
plan budget=1GiB bits=4.5 | budget=1GiB and bits=4.5: give one of them
plan bits=4 alpha=8 output=plan.json | alpha=8.0 has no effect without rank
    | output=plan.json must end in .yaml
finetune data=chat | data.train is required: the demo file has instruct rows | write data.train=FILE
finetune experiment=llama3_2_1b_qlora_1x8gb | checkpoint.dir is required | data.train is required
plan | a budget is required: write budget=6GiB or bits=4.6
report | a run is required: write qlora report RUN, with the output_dir of a finetune or dpo
finetune training.batch_size=0 training.epochs=0 device=gpu data.packing=best method.dropout=1
    | training.batch_size=0 must be >= 1 | training.epochs=0 must be >= 1
    | device='gpu' is not allowed | did you mean 'best_fit'? | method.dropout=1.0 must be < 1

finetune optimizer.learning_rate=1 | AdamW; did you mean 'lr'?
finetune optimizer.component=os.system | optimizer.component='os.system' is no optimizer
finetune optimizer.xyz=1 | lr, maximize, weight_decay
finetune optimizer.component=torch.optim.AdmaW | did you mean 'torch.optim.AdamW'?
finetune optimizer.component=null | name the class, such as torch.optim.Ad
finetune --allow qlora_builders | allow a package of your own
finetune +optimizer.params=[] | optimizer.params is given by the run; take it out
finetune 'loggers=[{component: qlora_builders.training.loggers.Nothing}]' | loggers[0].component
    | did you mean 'qlora_builders.training.loggers.

finetune data.train=[a,b] | takes one file; write the rows of all into one
generate prompt=hi checkpoint.dir=file.txt
    | checkpoint.dir=file.txt is a file; give its folder: checkpoint.dir=.
generate prompt=hi checkpoint.dir=meta-llama/Llama-3.2-1B
    | no such directory; models of the hub are downloaded first: hf download meta-llama/Llama-3.2-1B
generate prompt=hi checkpoint.dir=adapter
| checkpoint.dir=adapter holds an adapter and no model; write adapter.path=adapter, and as checkpo
finetune checkpoint.dir=adapter
    | checkpoint.dir=adapter holds an adapter and no model; name the base it was trained on
generate prompt=hi checkpoint.dir=run
| checkpoint.dir=run holds no model; expected a Hugging Face checkpoint directory, with config.jso
finetune training.resume=true
    | training.resume=true: write auto, for the newest good checkpoint in output_dir
finetune training.resume=run
| training.resume=run holds checkpoints and is none; the newest is training.resume=run/checkpoints

inspect model.arch=llama3_8 | llama3_8b
inspect components=[3] | components[0]: takes {key: value, ...}, not int
inspect components=absent.yaml | components=absent.yaml: no such file
"""
# name of an experiment -> its text, and what the messages say
EXPERIMENTS: dict[str, tuple[str, ...]] = {
    "brackets": ("training: [a: }", "brackets.yaml, line 2: not valid YAML: "),
    "tab": ("training:\n\tseed: 1", "tab.yaml, line 3: not valid YAML: "),
    "twice": ("training:\n  seed: 1\n  seed: 2", "twice.yaml, line 4: not valid YAML: ", "seed"),
    "latin": ("output_dir: caf\udce9", "latin.yaml", "not UTF-8 text"),
    "control": ("output_dir: a\0b", "control.yaml", "not valid YAML"),
    "listed": ("- training", "listed.yaml: holds a list; keys and values are"),
    "text": ("training", "text.yaml: training: null is not allowed here"),
    "deep": (f"loggers: {'[' * 20_000}", "deep.yaml", "nested too deeply"),
    "long": (f"#{'x' * 5 * 10**6}", "long.yaml: has 5,000,0", " bytes; at most 5,000,000 are read"),
    "key": (
        "training: {max_stps: 3}",
        "error: experiment/key.yaml: unknown key 'training.max_stps'; did you mean 'training.max_s",
    ),
    "option": (
        "defaults: [{override /optimizer: adamv}]",
        "experiment/option.yaml: optimizer=adamv: no such config; did you mean 'adamw'",
    ),
    "number": (
        "defaults: [{override /optimizer: 3.5}]",
        "experiment/number.yaml: Unsupported item",
    ),
    "name": (f"defaults: [{{override /optimizer: {'x' * 999}}}]", "experiment/name.yaml: "),
    "group": (
        "defaults: [override /metod: qlora]",
        "group.yaml: unknown group 'metod'; did you mean 'method'?",
    ),
    "defaults": ("defaults: 3", "defaults.yaml", "defaults must be a list"),
    "type": ("training: {max_steps: many}", "type.yaml: training.max_steps: Value 'many'"),
    "section": ("training: 3", "section.yaml: ", "a section takes keys of its own, such as trai"),
    "section_and_defaults": (
        "defaults: [{override /data: chat}]\ntraining: 3",
        "section_and_defaults.yaml: ",
        "training=3: a section takes keys of its own",
    ),
    "circle": (
        "output_dir: ${checkpoint.dir}\ncheckpoint: {dir: '${output_dir}'}",
        "checkpoint.dir: Recursive interpolation",
    ),
    "rules": (
        "components: {match: lm_head, kind: lora}",
        "rules.yaml: ",
        "components: takes a list, such as [a,b]",
    ),
    "choices": (
        "data: chat\nmethod: lora\ntraining: {max_steps: 3}",
        "choices.yaml: a config is chosen in the list of defaults; instead of 'data: chat' write: "
        "defaults: [{override /data: chat}]",
        "instead of 'method: lora' write: defaults: [{override /method: lora}]",
    ),
    "choices_and_more": (
        "method: lroa\ntraining: {max_stps: 3}",
        "choices_and_more.yaml: a config is chosen in the list of defaults; instead of 'method: lr",
        "choices_and_more.yaml: unknown key 'training.max_stps'; did you mean",
    ),
    "aliases": (
        "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
        "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c]\n"
        "e: [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d]",
        "aliases.yaml: with its aliases (*name) written out it has more than 100,000 values",
    ),
}
# a file of rules -> the same
RULES = {
    "components.yaml": ("rules: []", "no list of rules under components:"),
    "option.yaml": ("components: [{'a b': 1}]", "'a b' is no option of a rule"),
    "letters.yaml": ("components: [{'é': 1}]", "'é' is no option of a"),
    "list.yaml": (
        "components: [{match: lm_head, kind: linear}, [1]]",
        "rule 2 of 2 is [1]; write {match",
    ),
    "bytes.yaml": (
        "components: [{match: lm_head, kind: !!binary aGk=}]",
        "kind of a rule is b'hi', which none",
    ),
    "tag.yaml": ("components: [{rank: !!int x}]", "tag.yaml: not valid YAML: inv"),
    "scalar.yaml": ("3", "scalar.yaml: holds no keys and values: "),
    "more.yaml": (
        "components: []\ntrain: [norm]\nmethod: full",
        "more.yaml: method, train beside components:, which alone is read from such a file;",
    ),
}


CASES = {
    command: pieces
    for line in re.sub(r"\s*\n *\| ", " | ", COMMANDS).splitlines()
    if line
    for command, *pieces in [line.split(" | ")]
}


@pytest.fixture
def refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, Sequence[str]], None]:
    """Runs a command that has to be refused, with these pieces in its messages."""
    (tmp_path / "file.txt").touch()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "run" / "checkpoints" / "step_3").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)

    def run(command: str, pieces: Sequence[str]) -> None:
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(shlex.split(command)) == 2
        errors = capsys.readouterr().err
        assert all(line.startswith("error: ") for line in errors.splitlines()), errors
        assert all(len(line) < 2100 for line in errors.splitlines())
        for piece in pieces:
            assert piece in errors
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.mark.parametrize("command", CASES)
def test_on_the_command_line(command: str, refuse: Callable[[str, Sequence[str]], None]) -> None:
    assert CASES[command]
    refuse(command, CASES[command])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_in_an_experiment(
    name: str, tmp_path: Path, refuse: Callable[[str, Sequence[str]], None]
) -> None:
    text, *pieces = EXPERIMENTS[name]
    write_own(tmp_path / "configs", {f"experiment/{name}": text + "\n"})
    refuse(f"finetune --config-dir configs experiment={name}", pieces)


@pytest.mark.parametrize("name", RULES)
def test_in_a_file_of_rules(
    name: str, tmp_path: Path, refuse: Callable[[str, Sequence[str]], None]
) -> None:
    text, *pieces = RULES[name]
    (tmp_path / name).write_text(text + "\n", "utf-8")
    refuse(f"inspect components={name}", pieces)


def problems(verb: str, overrides: list[str], config_dir: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        compose(verb, overrides, config_dir=config_dir)
    return str(raised.value).splitlines()


def test_every_kind_of_mistake_is_in_one_error() -> None:
    overrides = [
        "training.bach_size=2",
        "training.max_steps=ten",
        "method=full",
        "method.rank=4",
        "optimizer=adamv",
        "training.seed",
        "device=gpu",
        "training.epochs=0",
    ]
    assert problems("finetune", overrides) == [
        "unknown key 'training.bach_size'; did you mean 'training.batch_size'?",
        "optimizer=adamv: no such config; did you mean 'adamw'?",
        "'training.seed' is not KEY=VALUE, such as training.batch_size=8; "
        "put quotes around a value with spaces",
        "training.max_steps: Value 'ten' is not a whole number",
        "training.epochs=0 must be >= 1",
        "device='gpu' is not allowed; allowed: auto, cpu, cuda, cuda:N",
    ]
    overrides.remove("optimizer=adamv")  # which may have set anything
    assert problems("finetune", overrides)[-1] == (
        "method.rank=4 has no effect: method=full does not take it"
    )


@pytest.mark.parametrize(
    ("verb", "overrides", "message"),
    [
        ("generate", ["temprature=0.7", "top_k=5", "prompt=a"], "did you mean 'temperature'"),
        ("generate", ["temperature=warm", "top_k=5", "prompt=a"], "temperature: Value 'warm'"),
        ("evaluate", ["data.evl=x", "data=text"], "unknown key 'data.evl'; did you mean"),
        ("merge", ["adapter.pth=x", "output_dir=y"], "unknown key 'adapter.pth'; did you mean"),
        ("finetune", ["experiment=min", "training.eval_every=5", "data.train=x"], "experiment=min"),
        ("generate", ["promt=a"], "did you mean 'prompt'"),
    ],
)
def test_what_follows_from_a_mistake_is_no_other_one(
    verb: str, overrides: list[str], message: str
) -> None:
    (problem,) = problems(verb, overrides)
    assert message in problem


def test_an_experiment_without_its_first_line(tmp_path: Path) -> None:
    write_own(tmp_path, {"experiment/mine": ""})
    (tmp_path / "experiment" / "mine.yaml").write_text("training: {max_steps: 3}\n")
    (problem,) = problems("finetune", ["experiment=mine"], tmp_path)
    assert "mine.yaml: unknown key 'experiment'; an experiment file starts with the line" in problem


def test_all_mistakes_of_a_file_are_in_one_error(tmp_path: Path) -> None:
    files = {
        "experiment/mine": "training: {max_stps: 3, seed: x, epochs: 0}\ndata: {format: chatt}\n",
        "method/mine": "name: qlora\nrnak: 4\ntargets: q_proj\n",
    }
    own = write_own(tmp_path, files)
    found = problems("finetune", ["method=mine", "experiment=mine", "training.epoch=2"], own)
    assert found == [
        "unknown key 'training.epoch'; did you mean 'training.epochs'?",
        "method/mine.yaml: unknown key 'method.rnak'; did you mean 'method.rank'?",
        "method/mine.yaml: method.targets: takes a list, such as [a,b]",
        "experiment/mine.yaml: unknown key 'training.max_stps'; did you mean 'training.max_steps'?",
        "experiment/mine.yaml: training.seed: Value 'x' is not a whole number",
        "data.format='chatt' is not allowed; allowed: chat, instruct, text, preference; did you "
        "mean 'chat'?",
    ]


def test_config_dir_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'nowhere' is not a folder"):
        compose("finetune", config_dir="nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="loop cannot be used: Too many levels"):
        compose("finetune", config_dir=tmp_path / "loop")
    (tmp_path / "loop").unlink()
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    with pytest.raises(ConfigError, match="is no file that can be read; take it out"):
        compose("finetune", config_dir=tmp_path)
    (tmp_path / "loop.yaml").unlink()
    own = write_own(tmp_path, {"method/qlora": "name: mine\n"})
    with pytest.raises(ConfigError, match="has the name of a shipped config; rename it"):
        compose("finetune", config_dir=own)
