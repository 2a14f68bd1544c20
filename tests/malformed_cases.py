"""Command lines with mistakes, over the files of `malformed_files.py`."""

from __future__ import annotations

from malformed_configs import PLANS, TRAIN, Case

DATA: dict[str, Case] = {
    "no.jsonl": ("no such file: no.jsonl",),
    "god.jsonl": ("no such file: god.jsonl; did you mean 'good.jsonl'?",),
    "absent/a.jsonl": ("the directory absent does not exist either",),
    "nothing": ("nothing is a directory; name one file in it: none fits",),
    "empty.jsonl": ("empty.jsonl: there are no rows",),
    "blank.jsonl": ("blank.jsonl: there are no rows",),
    "utf8.jsonl": ("utf8.jsonl, line 2: not UTF-8 text: invalid start byte at byte 12",),
    "utf16.jsonl": ("utf16.jsonl, line 1: not UTF-8 text",),
    "gzip.jsonl": ("gzip.jsonl, line 1: not UTF-8 text",),
    "broken.jsonl": ("broken.jsonl, line 3: not JSON: Expecting value",),
    "twice.jsonl": ("twice.jsonl, line 2: not JSON: key 'prompt' appears twice",),
    "nan.jsonl": ("nan.jsonl, line 1: not JSON: NaN is not a number",),
    "deep.jsonl": ("deep.jsonl, line 1: not JSON that can be read: nested too deeply",),
    "half.jsonl": ("half.jsonl, line 2: '\\ud800'", "half of a surrogate pair"),
    "list.jsonl": ("list.jsonl, line 2: holds a list, and an object is needed",),
    "array.jsonl": ("array.jsonl, line 1: holds a list, ", "one list has to be named .json"),
    "question.jsonl": ("; write data.columns.prompt=question data.columns.completion=answer",),
    "alpaca.jsonl": (
        "; write data.columns.prompt=instruction data.columns.completion=output (which leaves out",
    ),
    "number.jsonl": ("number.jsonl, line 2: column 'prompt' holds a int, and text is needed",),
    "null.jsonl": ("null.jsonl, line 2: column 'completion' holds a NoneType, and text",),
    "column.jsonl": ("line 2: no column 'prompt' (there are: completion, promt); did you mean",),
    "unanswered.jsonl": ("line 2: column 'completion' is empty",),
    "megabytes.jsonl": ("megabytes.jsonl, line 2: not JSON: Unterminated string", "column 12"),
    "megabyte_key.jsonl": ("megabyte_key.jsonl, line 2: no column 'prompt' (there are: kkk",),
    "escape.jsonl": ("line 2: no column 'prompt' (there are: \\x1b[2J)",),
    "long.jsonl data.max_seq_len=4": (
        "1 row, and none has anything",
        "data.max_seq_len=4",
        "raise it",
    ),
    "long.jsonl": ("long.jsonl, line 1: has ", "128 positions; lower data.max_seq_len"),
    "rows.csv": ("end in '.csv'; allowed: .json, .jsonl, .parquet",),
    "rows.json": ("rows.json: holds a dict; a list of objects is needed",),
    "trailing.json": ("trailing.json: not JSON: Extra data, line 2", "has to be named .jsonl"),
    "values.json": ("values.json, row 2 of 2: holds a int, and an object",),
    "cut.json": ("cut.json: not JSON: ",),
    "no.parquet": ("no.parquet: not a Parquet file this can read: ",),
    "cut.parquet": ("cut.parquet: not a Parquet file this can read: ",),
    "other.parquet": ("other.parquet, row 1 of 9: no column 'prompt'",),
    "no_messages.jsonl data=chat": ("line 2: no column 'messages' or 'conversations'",),
    "empty_chat.jsonl data=chat": ("line 2: column 'messages' has to be a list of messages",),
    "role.jsonl data=chat": (
        "line 2: message 2 of 2 has the role 'asistant'; did you mean 'a",
        "; data.on_error=skip leaves such rows out",
    ),
    "developer.jsonl data=chat": (
        "line 2: message 1 of 3 has the role 'developer'; with 'role' it is 'system'",
    ),
    "two_systems.jsonl data=chat": (
        "line 2: column 'system' and message 1 are two different system messages; remove one",
    ),
    "human.jsonl data=chat": ("line 2: message 1 of 2 (human) has no 'value'",),
    "no_content.jsonl data=chat": ("line 2: message 1 of 2 (user) has no 'content'",),
    "no_role.jsonl data=chat": ("line 2: message 1 of 1 has neither role/content nor from/value",),
    "picture.jsonl data=chat": ("line 2: message 1 of 2 holds something other than text",),
    "questions.jsonl data=chat": ("line 2: the conversation has no assistant turn", "remove the"),
    "silent.jsonl data=chat": ("line 2: message 2 of 2 is an assistant turn without text",),
    "good.jsonl data=chat tokenizer.path=no_template": ("no chat template", "data.format=instru"),
    "masked.jsonl data=text tokenizer.path=no_bos": (
        "masked.jsonl, line 1: no token is trained on; remove the row",
    ),
    "good.jsonl data=text": ("line 1: no column 'text' (there are: completion, prompt)",),
    "good.jsonl data.eval=empty.jsonl": ("empty.jsonl: there are no rows",),
    "good.jsonl data.columns.prompt=null": ("data.columns.prompt: null is not allowed here",),
    "good.jsonl data.columns.text=a": ("data.columns.text=a has no effect: data.format=instruct",),
    "human.jsonl data=chat data.columns.prompt=a": ("data.columns.prompt=a has no effect: data.f",),
    "good.jsonl data.on_error=ignore": ("data.on_error='ignore' is not allowed; allowed: raise",),
    "nan.jsonl data.on_error=skip": ("no row is left: 1 row skipped", "line 1: not JSON: NaN"),
    "good.jsonl data.max_rows=0": ("data.max_rows=0 must be >= 1",),
    "good.jsonl checkpoint.dir=small_vocab tokenizer.path=tiny": (
        "good.jsonl, line 1: token ",
        "the model's vocabulary has 100 entries; tokenizer and model do not belong together",
    ),
}
PAIRS: dict[str, Case] = {
    "same.jsonl": ("2 rows, and in none the two answers differ",),
    "rejected.jsonl": ("rejected.jsonl, line 2: no column 'rejected'",),
    "questions.jsonl": (
        "line 1: no columns 'chosen' and 'rejected' (there are: messages); dpo ta",
    ),
    "questions.jsonl data=chat": ("dpo takes preference, rows with prompt, chosen and rejected",),
    "differ.jsonl": ("line 2: columns 'chosen' and 'rejected' differ",),
}
# prompts_file -> the same
PROMPTS: dict[str, Case] = {
    "no.txt": ("prompts_file=no.txt: no such file; name one with prompts",),
    "no.jsonl": ("prompts_file=no.jsonl: no such file; name one with prompts",),
    "empty.txt": ("empty.txt: holds no prompt; write at least one",),
    "empty.jsonl": ("empty.jsonl: holds no prompt; write at least one",),
    "latin.txt": ("latin.txt: not UTF-8 text",),
    "long.txt": ("long.txt, line 3: the prompt has ", "tokens; allowed: 1 to 128"),
    "long_prompt.jsonl": ("long_prompt.jsonl, line 2: the prompt has ", "allowed: 1 to 128"),
    "broken.jsonl": ("broken.jsonl, line 3: not JSON: Expecting value",),
    "list.jsonl": ("list.jsonl, line 2: holds a list, and an object is needed",),
    "values.json": ("values.json, row 2 of 2: holds a int, and an object",),
    "rows.csv": ("rows.csv: cannot read files that end in '.csv'; allowed: .json, .jsonl",),
    "question.jsonl": ("; write data.columns.prompt=question data.columns.completion=answer",),
    "cut.parquet": ("cut.parquet: not a Parquet file this can read: ",),
    "number.jsonl": ("number.jsonl, line 2: column 'prompt' holds a int, and text is needed",),
    "answer.jsonl": ("answer.jsonl, line 2: column 'completion' holds a int, and text is needed",),
    "half.jsonl": ("half.jsonl, line 2: '\\ud800'", "half of a surrogate pair"),
    "column.jsonl": (
        "column.jsonl, line 2: no column 'prompt', 'messages' or 'conversations' (there are: "
        "completion, promt); name the one with prompts: data.columns.prompt=...",
    ),
    "empty_chat.jsonl": ("empty_chat.jsonl, line 2: column 'messages' has to be a list of mess",),
    "role.jsonl": ("role.jsonl, line 2: message 2 of 2 has the role 'asistant'; did you",),
    "unasked.jsonl": ("unasked.jsonl, line 2: nothing to answer: ", "and there is none"),
    "instructed.jsonl": ("instructed.jsonl, line 2: nothing to answer: ", "and it has 'system'"),
    "questions.jsonl chat=false": ("line 1: holds messages", "leave out chat=false"),
    "questions.jsonl tokenizer.path=no_template": (
        "questions.jsonl, line 1: holds messages, and the tokenizer has no chat template to put",
        "or write the row with a prompt",
    ),
}

# checkpoint.dir -> what its message has to say
BASES: dict[str, Case] = {
    "absent": ("absent: no such directory",),
    "file": ("checkpoint.dir=file is a file; give its folder: checkpoint.dir=.",),
    "tiny/model.safetensors": ("is a file; give its folder: checkpoint.dir=tiny",),
    "adapter": (
        "checkpoint.dir=adapter holds an adapter and no model; write adapter.path=adapter",
    ),
    "owner/name": ("owner/name: no such directory", "hf download owner/name --local-dir name"),
    "nothing": (
        "checkpoint.dir=nothing holds no model",
        "nothing",
        "expected a Hugging Face checkpoint directory",
    ),
    "no_config": ("no_config/config.json: missing; expected a Hugging Face checkpoint directory",),
    "cut_config": ("cut_config/config.json: not JSON: ",),
    "twice_config": ("config.json: not JSON: key 'vocab_size' appears twice",),
    "latin_config": ("config.json: not UTF-8 text: ",),
    "list_config": ("config.json: holds list, expected an object",),
    "gemma": (
        "config.json: model_type is 'gemma'; allowed: granite, llama, mistral, olmo2, phi3, ",
    ),
    "no_layers": ("config.json: missing keys: num_hidden_layers",),
    "many_layers": ("many_layers", "1000 layers are announced, but there are 12 tensors"),
    "negative": ("negative/config.json: ", "hidden_size"),
    "heads": ("heads/config.json: num_attention_heads is 2 and num_key_value_heads 3; ",),
    "text_size": ("text_size/config.json: ", "vocab_size"),
    "relu2": ("relu2/config.json: hidden_act ", "relu2"),
    "proportional": ("config.json: rope_scaling: rope type 'proportional' is not supported; allo",),
    "no_factor": ("config.json: rope_scaling: rope type 'linear' needs factor",),
    "gptq": ("config.json: ", "quant_method 'gptq'", "allowed: bitsandbytes"),
    "other_size": ("gate_proj.weight has shape [48, 32]; the model needs [64, 32]: compare",),
    "other_vocab": ("embed_tokens.weight has shape [1024, 32]; the model needs [1000, 32]",),
    "vocab": ("embed_tokens.weight has shape [1000, 32]; the model needs [1024, 32]",),
    "shapes": ("mlp.down_proj.weight has shape [48, 32]; the model needs [32, 48]",),
    "no_weights": ("neither model.safetensors nor model.safetensors.index.json there; expected",),
    "cut_weights": (
        "model.safetensors: cannot be read as safetensors: ",
        "it is damaged or cut short",
    ),
    "no_header": ("model.safetensors: cannot be read as safetensors: 5 bytes cannot hold",),
    "html": ("html/model.safetensors: cannot be read as safetensors: ",),
    "nan_norm": ("nan_norm/model.safetensors: model.norm.weight holds NaN or infinity",),
    "inf_embedding": ("model.safetensors: model.embed_tokens.weight holds NaN or infinity",),
    "nan_q": ("model.safetensors: model.layers.0.self_attn.q_proj.weight", "NaN"),
    "integers": ("model.norm.weight has dtype torch.int32; expected floating point",),
    "missing": ("tensors missing: model.norm.weight; not expected: none",),
    "extra": ("tensors missing: none; not expected: model.bias",),
    "headless": ("tensors missing: lm_head.weight; not expected: none",),
    "tied": ("lm_head.weight differs from model.embed_tokens.weight, but config.json ties",),
    "missing_shard": ("shards missing: model-00002-of-00002.safetensors; download again",),
    "absent_tensor": ("model.safetensors: no tensor 'model.absent.weight', though",),
    "no_map": ("model.safetensors.index.json: not a safetensors index: it has no weight_map",),
    "cut_index": ("model.safetensors.index.json: not JSON: ",),
    "damaged_nf4": ("nf4.safetensors: model.layers.0.self_attn.q_proj.weight: ", "checksum"),
    "tiny checkpoint.format=nf4": ("tiny: format is 'nf4', but the directory is 'hf'",),
    "tiny checkpoint.format=meta": ("tiny/params.json: missing",),
    "tiny checkpoint.format=gguf": ("checkpoint.format='gguf' is not allowed; allowed: auto, hf",),
    "small_vocab": ("vocabulary has 100 entries; tokenizer and model do not belong together",),
}
# tokenizer.path -> the same
TOKENIZERS: dict[str, Case] = {
    "absent": (
        "no such directory: absent; set checkpoint.dir (or tokenizer.path)",
        "downloaded first",
    ),
    "tiny/tokenizer.json": ("is a file; give its folder: tokenizer.path=tiny",),
    "no_tokenizer": ("no tokenizer.json in no_tokenizer; set tokenizer.path to a directory",),
    "cut_tokenizer": ("cut_tokenizer/tokenizer.json: not a tokenizer.json this can read: ",),
    "stray_token": ("stray_token/tokenizer.json: not a tokenizer.json this can read: ",),
    "empty_vocabulary": ("empty_vocabulary/tokenizer.json: ", "no tokens"),
    "stranger_eos": ("tokenizer_config.json: eos_token is '</s>', which tokenizer.json does not",),
    "twice_tokens": ("tokenizer_config.json: not JSON: key 'a' appears twice",),
    "deep_tokens": ("tokenizer_config.json: not JSON that can be read: nested too deeply",),
    "untyped_template": ("chat_template is a int; a string or a list of {name, template}",),
    "named_templates": ("chat_template has no entry named 'default' with text (it has: none)",),
    "open_template": ("tokenizer_config.json: the chat template does not compile: ",),
    "latin_template": ("latin_template/chat_template.jinja: not UTF-8 text: ",),
}
# adapter.path -> the same
FAULTS: dict[str, Case] = {
    "absent": ("absent/adapter_config.json: missing; expected a PEFT adapter directory",),
    "nothing": ("nothing/adapter_config.json: missing; expected a PEFT adapter directory",),
    "a_no_config": ("a_no_config/adapter_config.json: missing",),
    "a_cut_config": ("a_cut_config/adapter_config.json: not JSON: ",),
    "a_ia3": ("adapter_config.json: peft_type is 'IA3'; only LORA is read",),
    "a_no_rank": ("adapter_config.json: r is missing; it must be an integer >= 1",),
    "a_rank": ("q_proj has rank 2, but adapter_config.json says 8",),
    "a_alpha": ("adapter_config.json: lora_alpha is '16'; it must be a finite number > 0",),
    "a_bias": ("adapter_config.json: bias='all' is not supported",),
    "a_regex": ("target_modules entry '(q_proj' is no regex",),
    "a_targets": ("target_modules entries without a module in the file: w_proj",),
    "a_lacks": ("modules_to_save entries without a module in the file: norm",),
    "a_tokens": ("trainable_token_indices is [1, 1]; it must be token ids >= 0, none twice",),
    "a_no_weights": ("a_no_weights/adapter_model.safetensors: cannot be read as safetensors",),
    "a_cut_weights": (
        "adapter_model.safetensors: cannot be read as safetensors: ",
        "damaged or cut",
    ),
    "a_nan": ("adapter_model.safetensors: ", "q_proj.lora_B.weight holds NaN or infinity"),
    "a_half": ("q_proj needs lora_A [rank, in] and lora_B [out, rank], got lora_A none",),
    "a_shape": ("q_proj.lora_A.weight has shape [2, 31]; the model needs [2, 32]",),
    "a_extra": ("neither lora_A, lora_B nor in modules_to_save of adapter_config.json: ",),
    "a_prefix": ("keys must begin with 'base_model.model.', but these do not: model.w",),
    "a_record": ("a_record/qlora_base.json: not a record of a base: 3 is not a list",),
    "a_dtype": ("qlora_base.json: dtype is 'int8'; allowed: float32, bfloat16, float16",),
    "a_plan": ("qlora_base.json plans other adapters, ranks or use_dora than",),
    "adapter checkpoint.dir=other": (
        "this is not the base that the adapter was trained on",
        "Load that one, ",
    ),
    "adapter checkpoint.dir=nf4": ("this is not the base that the adapter was trained on",),
    "adapter quantize=int8": ("quantize='int8' is not allowed; allowed: auto, nf4, none",),
}
COMMANDS: dict[str, Case] = {
    "no such verb": ("fintune", "unknown command 'fintune'; did you mean 'finetune'?"),
    "option for a verb": ("--verbose", "unknown command '--verbose'"),
    "no value": ("finetune training.batch_size", "'training.batch_size' is not KEY=VALUE"),
    "no key": ("finetune =3", "'=3' is not KEY=VALUE"),
    "dashes": ("finetune --training.seed=1", "write training.seed=1, without dashes"),
    "underscores": ("finetune --nproc_per_node 2", "did you mean '--nproc-per-node'?"),
    "verb of another library": ("train", "unknown command 'train'; did you mean 'finetune'?"),
    "no such option": ("finetune --verbose", "unknown option '--verbose'; see --help"),
    "option without value": ("finetune --config-dir", "expected one argument; see --help"),
    "removal": ("finetune ~training.seed=1", "keys cannot be removed; write training.seed=null"),
    "no quotes": (
        "finetune components=[{match:layers.[0-1].**,kind:linear}]",
        "cannot read the override",
        "quote text with commas",
    ),
    "open bracket": ("finetune train=[norm", "cannot read the override 'train=[norm'"),
    "no processes": ("finetune --nproc-per-node 0", "'0' is not a whole number >= 1"),
    "odd processes": ("finetune --nproc-per-node two", "'two' is not a whole number >= 1"),
    "negative restarts": ("dpo --nproc-per-node 2 --max-restarts=-1", "whole number >= 0"),
    "processes without number": ("finetune --nproc-per-node", "expected one argument"),
    "processes of generate": ("generate --nproc-per-node 2 prompt=hi", "--nproc-per-node"),
    "processes and a typo": ("finetune --nproc-per-node 2 training.sed=1", "'training.seed'?"),
    "no prompt": ("generate", "a prompt is required: write prompt='...', prompts_file=FILE or"),
    "a conversation without a template": (
        "generate checkpoint.dir=tiny tokenizer.path=no_template interactive=true",
        "interactive=true needs a chat template, and the tokenizer has none: put a",
        "or ask with prompt='...'",
    ),
    "columns without rows": (
        "generate prompt=hi data.columns.prompt=a",
        "data.columns.prompt=a has no effect: only the rows of prompts_file have columns",
    ),
    "no adapter": ("merge output_dir=out", "adapter.path is required: write adapter.path=..."),
    "no budget": ("plan", "a budget is required: write budget=6GiB or bits=4.6"),
    "no runs": ("report", "a run is required: write qlora report RUN"),
    "no run": ("report nothing", "'nothing' is no run directory", "give the output_dir"),
    "no text in a prompt": (
        "generate 'prompt= '",
        "prompt is empty, so there is nothing to answer",
    ),
    "empty prompt": (
        "generate checkpoint.dir=tiny tokenizer.path=no_bos prompt= chat=false",
        "the prompt has 0 tokens; allowed: 1 to 128",
    ),
    "a wrong adapter and wrong rows": (
        "evaluate checkpoint.dir=tiny adapter.path=absent data.eval=broken.jsonl",
        "absent/adapter_config.json: missing; expected a PEFT adapter directory",
    ),
    "chat rows read as instruct": (
        "evaluate checkpoint.dir=tiny data.eval=empty_chat.jsonl",
        "(there are: messages); rows like this one are read with data=chat",
    ),
    "rows longer than the positions": (
        "evaluate checkpoint.dir=tiny data.eval=long.jsonl data.max_seq_len=9999",
        "but the model was made for 128 positions; lower data.max_seq_len",
    ),
    "long prompt": (
        f"generate checkpoint.dir=tiny prompt='{'word ' * 99}'",
        "tokens; allowed: 1 to 128",
    ),
    "half a character": (
        "generate checkpoint.dir=tiny prompt='\udcff'",
        "'\\udcff', character 59 of the text, is",
        "half of a surrogate pair",
    ),
    "hot": ("generate checkpoint.dir=tiny prompt=hi temperature=-1", "temperature=-1.0 must be >="),
    "no configs command": ("configs shwo", "unknown command 'shwo'; did you mean 'show'?"),
    "no config": ("configs show demo_qlor", "no single config is called 'demo_qlor'"),
    "unknown key": ("finetune training.bach_size=2", "did you mean 'training.batch_size'?"),
    "configs arguments": ("configs cp finetune", "wrong number of arguments"),
    "configs validate": ("configs validate --config-dir configs twice", "twice.yaml", "seed"),
    "resume true": ("finetune training.resume=true", "training.resume=true: write auto, for the"),
    "resume checkpoints": (
        "finetune training.resume=stopped/checkpoints",
        "the newest is training.resume=stopped/checkpoints/step_20, or write auto",
    ),
    "resume a run": (
        "finetune training.resume=stopped",
        "is training.resume=stopped/checkpoints/s",
    ),
    "no such run": ("finetune training.resume=gone/step_3", "gone/step_3"),
}
FT = "finetune checkpoint.dir=tiny data.train=good.jsonl"
OUTPUTS: dict[str, Case] = {
    "file": (f"{FT} output_dir=file", "output_dir=file is a file; give the name of a new or empt"),
    "in a file": (f"{FT} output_dir=file/out", "file is a file, not a folder; choose another"),
    "device": (f"{FT} output_dir=/dev/null", "output_dir=/dev/null is no plain file; give the"),
    "long name": (f"{FT} output_dir={'a' * 300}", "cannot be used: File name too long; choose"),
    "taken": (f"{FT} output_dir=full", "output_dir=full is not empty; choose another"),
    "no run there": (f"{FT} output_dir=full overwrite=true", "output_dir=full holds no run; over"),
    "resume nothing": (f"{FT} output_dir=full training.resume=auto", "full holds no run; training"),
    "no folder": (
        f"{FT} output_dir=/proc/out",
        "/proc/out cannot be used: ",
        "; choose another pl",
    ),
    "quantize": ("quantize output_dir=full checkpoint.dir=tiny", "output_dir=full exists; choose"),
    "quantize in a file": ("quantize checkpoint.dir=tiny output_dir=file/a", "file is a file, not"),
    "merge": ("merge adapter.path=adapter output_dir=full", "output_dir=full exists; choose a new"),
    "merge report": (
        "merge adapter.path=adapter checkpoint.dir=tiny output_dir=out report=full",
        "report=full is a folder; give the name of a file",
    ),
    "merge error": (
        "merge adapter.path=adapter checkpoint.dir=tiny output_dir=out max_error=1e-9",
        "max_error",
    ),
    "evaluate": (
        "evaluate checkpoint.dir=tiny data.eval=good.jsonl output=full",
        "output=full is a folder; give the name of a file",
    ),
    "evaluate to a device": (
        "evaluate checkpoint.dir=tiny data.eval=good.jsonl output=/dev/null",
        "output=/dev/null is no plain file; give the name of a file",
    ),
    "evaluate in a file": (
        "evaluate checkpoint.dir=tiny data.eval=good.jsonl output=file/a.json",
        "file is a file, not a folder; choose another place",
    ),
    "generate": ("generate prompt=hi output=good.jsonl", "output=good.jsonl exists; choose anoth"),
    "generate in a file": (
        "generate prompt=hi output=file/a.jsonl",
        "file is a file, not a folder; choose another place",
    ),
    "generate ending": ("generate prompt=hi output=a.json", "output=a.json must end in .jsonl"),
    "plan": ("plan bits=4.6 output=plan.yaml", "figures go to plan.json, which exists; choose"),
    "generate after Ctrl-C": (
        "generate prompt=hi output=stopped.jsonl",
        "stopped.jsonl.partial holds what an interrupted run had finished; rename or remove",
    ),
    "evaluate again": (
        "evaluate checkpoint.dir=tiny data.eval=good.jsonl output=taken.json",
        "output=taken.json exists; choose another name",
    ),
    "merge report again": (
        "merge adapter.path=adapter checkpoint.dir=tiny output_dir=out report=taken.json",
        "report=taken.json exists; choose another name",
    ),
    "plan ending": ("plan bits=4.6 output=a.txt", "output=a.txt must end in .yaml"),
    "report": ("report run output=full", "output=full is a folder; give the name of a file"),
    "configs cp": ("configs cp finetune full", "'full' is not a file name that ends in .yaml"),
    "configs cp there": (
        "configs cp finetune bare_rules.yaml",
        "exists; remove it or choose anoth",
    ),
    "configs cp in a file": ("configs cp finetune file/a.yaml", "file"),
}


def table() -> dict[str, Case]:
    """Every case by a name that says where it comes from."""
    found: dict[str, Case] = {}
    groups = {"plan": PLANS, "command": COMMANDS, "output": OUTPUTS}
    for group, cases in groups.items():
        found |= {f"{group}: {name}": case for name, case in cases.items()}
    for words, pieces in DATA.items():
        found[f"data: {words}"] = (f"{TRAIN} data.train={words}", *pieces)
    for words, pieces in PAIRS.items():
        found[f"pairs: {words}"] = (f"dpo checkpoint.dir=tiny data.train={words}", *pieces)
    for words, pieces in PROMPTS.items():
        found[f"prompts: {words}"] = (f"generate checkpoint.dir=tiny prompts_file={words}", *pieces)
    commands = {
        "checkpoint": ("generate prompt=hi tokenizer.path=tiny checkpoint.dir=", BASES),
        "tokenizer": ("generate prompt=hi checkpoint.dir=tiny tokenizer.path=", TOKENIZERS),
        "adapter": ("generate prompt=hi checkpoint.dir=tiny adapter.path=", FAULTS),
    }
    for group, (command, cases) in commands.items():
        found |= {f"{group}: {words}": (command + words, *case) for words, case in cases.items()}
    return found


TABLE = table()
