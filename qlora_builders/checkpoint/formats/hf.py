"""What a checkpoint format is, and the first of them: Hugging Face's, config.json <-> `LlamaArch`.

A table of `Key`s says what each key of a checkpoint's JSON file may hold, and one reader reads all.
Files of checkpoints come from anywhere: what is of another type, or beyond any model there could
be, is refused by name before anything is built by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_builders.checkpoint.tensor_files import STEM, LazyTensor, open_tensors
from qlora_builders.errors import CheckpointError, QLoRAError
from qlora_builders.files.reading import read_json_object
from qlora_builders.models import FAMILIES, LlamaArch, RopeScaling, family_config

CONFIG_FILE = "config.json"
REQUIRED: Any = object()
_Quantization = Callable[[Sequence[Any], Sequence[str], torch.dtype], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """A row of `formats.FORMATS`.

    Attributes:
        arch, tensors: of a directory; tensors have Hugging Face names, and are read when loaded.
        marker: a file that tells such a directory.
        quant_method: config.json's, where several formats have that file; None: not quantized.
        check: raises CheckpointError for a quantization_config of that method which cannot be read.
        is_written: `save_checkpoint` writes it.
        pack: a quantized weight as the tensors that the files hold of it, by what they add to its
            name; without it such weights are written plain.
        types: of quantized weights that it can hold; None: all.
        quantization: (weights, names of plain linears, their dtype) -> quantization_config.
        stem: of the weight files' names.
    """

    name: str
    arch: Callable[[Path], LlamaArch]
    tensors: Callable[[Path], dict[str, LazyTensor]]
    marker: str = CONFIG_FILE
    quant_method: str | None = None
    check: Callable[[dict[str, Any], Path], None] = lambda config, source: None
    is_written: bool = True
    pack: Callable[[Any], dict[str, Tensor]] | None = None
    types: tuple[str, ...] | None = None
    quantization: _Quantization | None = None
    stem: str = STEM


# ---- a checkpoint's JSON -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a key may hold, and the field that it fills.

    Attributes:
        field: the name of the same thing in `LlamaArch` or `RopeScaling`.
        kind: int, float (an integer is one too), bool, str, or a list of positive numbers.
        default: what a missing key stands for.
        low, high: the least and the most, both allowed.
        above: a bound that is not allowed itself.
        null: it stands for the default too.
    """

    field: str
    kind: type
    default: Any = REQUIRED
    low: float | None = None
    above: float | None = None
    high: float | None = None
    null: bool = False

    @property
    def allowed(self) -> str:
        words = {bool: "true or false", str: "a string", list: "a list of numbers > 0"}
        if self.kind in words:
            text = words[self.kind]
        else:
            text = "an integer" if self.kind is int else "a number"
            least = f"> {self.above:g}" if self.low is None else f">= {self.low:g}"
            text += f" {least} and <= {self.high:,}"
        return f"{text}, or null" if self.null else text

    def holds(self, value: Any) -> bool:
        if type(value) not in ((int, float) if self.kind is float else (self.kind,)):
            return False
        if self.kind is list:
            return all(type(x) in (int, float) and 0 < x < 1e30 for x in value)
        return self.kind in (bool, str) or (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
        )


def size(field: str, most: int, **options: Any) -> Key:
    return Key(field=field, kind=int, low=1, high=most, **options)


def read_keys(keys: Mapping[str, Key], content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Field -> value, or its default.

    Args:
        source: the file, and where in it, for messages.

    Raises:
        CheckpointError: naming the first key that is missing or holds something else.
    """
    values = {}
    missing = sorted(k for k, key in keys.items() if key.default is REQUIRED and k not in content)
    if missing:
        raise CheckpointError(f"{source}: missing keys: {', '.join(missing)}")
    for name, key in keys.items():
        value = content.get(name, key.default)
        if name not in content or (value is None and key.null):
            value = key.default
        elif not key.holds(value):
            raise CheckpointError(f"{source}: {name} is {value!r}; expected {key.allowed}")
        elif key.kind is float:
            value = float(value)
        elif key.kind is list:
            value = tuple(map(float, value))
        values[key.field] = value
    return values


def make_arch(keys: Mapping[str, Key], values: dict[str, Any], source: str) -> LlamaArch:
    """With what a file need not say: the number of key-value heads, and how large a head is.

    Raises:
        CheckpointError: for fields that do not fit each other, by the names that the file has.
    """
    names = {key.field: name for name, key in keys.items()}
    num_heads, hidden_size = values["num_heads"], values["hidden_size"]
    if values["num_kv_heads"] is None:
        values["num_kv_heads"] = num_heads
    if values["head_dim"] is None:
        if hidden_size % num_heads:
            raise CheckpointError(
                f"{source}: {names['hidden_size']} is {hidden_size} and {names['num_heads']} "
                f"{num_heads}; without head_dim the first must be a multiple of the second"
            )
        values["head_dim"] = hidden_size // num_heads
    try:
        return LlamaArch(**values)
    except QLoRAError as error:
        message = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(error))
        raise CheckpointError(f"{source}: {message}") from error


# ---- config.json ---------------------------------------------------------------------------------

THETA = Key(field="rope_theta", kind=float, default=10_000.0, above=0, high=1e30)
# key -> what it may hold; defaults, and where null stands for one, are transformers' of LlamaConfig
KEYS: dict[str, Key] = {
    "vocab_size": size("vocab_size", 2**24),
    "hidden_size": size("hidden_size", 2**18),
    "intermediate_size": size("intermediate_size", 2**20),
    "num_hidden_layers": size("num_layers", 2**10),
    "num_attention_heads": size("num_heads", 2**14),
    "num_key_value_heads": size("num_kv_heads", 2**14, default=None, null=True),
    "head_dim": size("head_dim", 2**14, default=None, null=True),
    "max_position_embeddings": size("max_position_embeddings", 2**31 - 1, default=2048),
    "rms_norm_eps": Key(field="norm_eps", kind=float, default=1e-6, above=0, high=1),
    "hidden_act": Key(field="hidden_act", kind=str, default="silu"),
    "attention_bias": Key(field="attention_bias", kind=bool, default=False),
    "attention_dropout": Key(
        field="attention_dropout", kind=float, default=0.0, low=0, high=1, null=True
    ),
    "mlp_bias": Key(field="mlp_bias", kind=bool, default=False),
    "tie_word_embeddings": Key(field="tie_word_embeddings", kind=bool, default=False),
    "rope_theta": THETA,
}


def positive(field: str, **options: Any) -> Key:
    return Key(field=field, kind=float, above=0, high=1e30, **options)


# those of some families
FAMILY_KEYS: dict[str, Key] = {
    name: positive(name, default=1.0)
    for name in (
        "embedding_multiplier",
        "residual_multiplier",
        "attention_multiplier",
        "logits_scaling",
    )
}
_WINDOW_KEYS: dict[str, Key] = {
    "use_sliding_window": Key(field="used", kind=bool, default=False),
    "sliding_window": size("window", 2**31 - 1, default=None, null=True),
    "max_window_layers": Key(field="first", kind=int, default=28, low=0, high=2**10),
}
_NULL: Any = {"default": None, "null": True}
_ORIGINAL = size("original_max_position_embeddings", 2**31 - 1)
# rope type -> what it needs, and what it may have
_ROPE_KEYS: dict[str, dict[str, Key]] = {
    "linear": {"factor": positive("factor")},
    "dynamic": {"factor": positive("factor")},
    "yarn": {
        "factor": positive("factor", **_NULL),
        "original_max_position_embeddings": _ORIGINAL,
        "attention_factor": positive("attention_factor", **_NULL),
        "beta_fast": positive("beta_fast", default=32.0, null=True),
        "beta_slow": positive("beta_slow", default=1.0, null=True),
        "mscale": positive("mscale", **_NULL),
        "mscale_all_dim": positive("mscale_all_dim", **_NULL),
        "truncate": Key(field="truncate", kind=bool, default=True, null=True),
    },
    "longrope": {
        "short_factor": Key(field="short_factor", kind=list),
        "long_factor": Key(field="long_factor", kind=list),
        "factor": positive("factor", **_NULL),
        "original_max_position_embeddings": _ORIGINAL,
        "attention_factor": positive("attention_factor", **_NULL),
    },
    "llama3": {
        "factor": positive("factor"),
        "low_freq_factor": positive("low_freq_factor"),
        "high_freq_factor": positive("high_freq_factor"),
        "original_max_position_embeddings": _ORIGINAL,
    },
}
# transformers 5 writes the first, with rope_theta in it; 4 the second, with rope_theta beside it
_ROPE_SPELLINGS = ("rope_parameters", "rope_scaling")


def read_config(directory: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: if config.json is missing or not JSON.
    """
    return read_json_object(directory / CONFIG_FILE, expected="a Hugging Face checkpoint directory")


def arch_from_config(config: dict[str, Any], *, source: str = "config.json") -> LlamaArch:
    """
    Raises:
        CheckpointError: for another family, a key whose value cannot be, or two that contradict
            each other; the message names the key.
    """
    try:
        config = family_config(config)
    except QLoRAError as error:
        raise CheckpointError(f"{source}: {error}") from error
    values = read_keys(KEYS, config, source)
    values["rope_theta"], values["rope_scaling"] = _rope(config, source)
    values |= _of_family(config, values["num_layers"], source)
    values["model_type"] = config.get("model_type", "llama")
    return make_arch(KEYS, values, source)


def _of_family(config: dict[str, Any], num_layers: int, source: str) -> dict[str, Any]:
    """Fields that not every family has."""
    family = FAMILIES[config.get("model_type", "llama")]
    keys = {name: FAMILY_KEYS[name] for name in family.keys if name in FAMILY_KEYS}
    values = read_keys(keys, config, source)
    if "no_rope_layers" in family.keys:
        values["nope_layers"] = _nope_layers(config, num_layers, source)
    if family.windows is None:
        return values
    windows = read_keys(_WINDOW_KEYS, config, source)
    sliding = {
        "all": None,
        "last": tuple(range(windows["first"], num_layers)),
        "without rope": values.get("nope_layers"),
    }[family.windows]
    if family.windows != "all":
        types = config.get("layer_types")
        if types is not None:
            known = ("full_attention", "sliding_attention")
            if not isinstance(types, list) or [t in known for t in types] != [True] * num_layers:
                raise CheckpointError(
                    f"{source}: layer_types is {types!r:.200}; expected a list of {num_layers}, "
                    f"each of them {' or '.join(known)}"
                )
            sliding = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
        if not windows["used"] or not sliding:
            windows["window"] = None
    if windows["window"] is not None:
        values |= {"sliding_window": windows["window"], "sliding_layers": sliding}
    return values


def _nope_layers(config: dict[str, Any], num_layers: int, source: str) -> tuple[int, ...]:
    flags = config.get("no_rope_layers")
    if flags is None:
        key = size("interval", 2**10, default=4)
        name = "no_rope_layer_interval"
        every = read_keys({name: key}, config, source)["interval"]
        return tuple(range(every - 1, num_layers, every))
    if (
        not isinstance(flags, list)
        or len(flags) < num_layers
        or any(f not in (0, 1) for f in flags)
    ):
        raise CheckpointError(
            f"{source}: no_rope_layers is {flags!r:.200}; expected a list of {num_layers}, each "
            "of them 1 for a layer with RoPE or 0"
        )
    return tuple(index for index, rope in enumerate(flags[:num_layers]) if not rope)


def _rope(config: dict[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, which both spellings may give, if they agree."""
    thetas = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    scalings: dict[str, RopeScaling | None] = {}
    for key in _ROPE_SPELLINGS:
        rope = config.get(key)
        if rope is not None and not isinstance(rope, dict):
            raise CheckpointError(f"{source}: {key} is {rope!r}; expected an object, or null")
        if rope:
            scalings[key] = _rope_scaling(rope, config, f"{source}: {key}")
            if "rope_theta" in rope:
                thetas[f"{key}.rope_theta"] = rope["rope_theta"]
    values = [read_keys({key: THETA}, {key: thetas[key]}, source)["rope_theta"] for key in thetas]
    for found, spelled in ((values, list(thetas)), (list(scalings.values()), list(scalings))):
        if any(value != found[0] for value in found[1:]):
            raise CheckpointError(
                f"{source}: {' and '.join(spelled)} contradict each other; keep the one that the "
                "model was trained with"
            )
    theta = values[0] if values else FAMILIES[config.get("model_type", "llama")].rope_theta
    return theta, next(iter(scalings.values()), None)


def _rope_scaling(rope: dict[str, Any], config: dict[str, Any], where: str) -> RopeScaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", rope_type) != rope_type:
        raise CheckpointError(
            f"{where}: rope_type is {rope_type!r} and type {rope['type']!r}; keep one of them"
        )
    by_layer = next((key for key, value in rope.items() if isinstance(value, dict)), None)
    if by_layer is not None:
        raise CheckpointError(
            f"{where}: {by_layer} is an object; one set of numbers for all layers is expected"
        )
    if rope_type == "default":
        return None
    known = isinstance(rope_type, str) and rope_type in _ROPE_KEYS
    if not known:
        raise CheckpointError(
            f"{where}: rope type {rope_type!r} is not supported; "
            f"allowed: default, {', '.join(_ROPE_KEYS)}"
        )
    if rope_type in ("yarn", "longrope"):
        for name in ("original_max_position_embeddings", "max_position_embeddings"):
            if config.get(name) is not None:
                rope = {"original_max_position_embeddings": config[name]} | rope
    keys = _ROPE_KEYS[rope_type]
    missing = [name for name, key in keys.items() if key.default is REQUIRED and name not in rope]
    if missing:
        raise CheckpointError(f"{where}: rope type {rope_type!r} needs {', '.join(missing)}")
    values = read_keys(keys, rope, where)
    if "low_freq_factor" in values and values["low_freq_factor"] == values["high_freq_factor"]:
        raise CheckpointError(f"{where}: low_freq_factor and high_freq_factor must differ")
    return RopeScaling(rope_type=rope_type, **values)


def function_keys(arch: LlamaArch) -> dict[str, Any]:
    """What of an arch decides the function of its weights, flat and by the names in config.json.

    Every arch has the same keys. `max_position_embeddings` is none: it bounds rows, and RoPE that
    depends on a length has `original_max_position_embeddings`.
    """
    keys = {name: getattr(arch, key.field) for name, key in (KEYS | FAMILY_KEYS).items()}
    del keys["max_position_embeddings"]
    keys["sliding_window"] = arch.sliding_window
    keys["sliding_layers"] = arch.sliding_layers and list(arch.sliding_layers)
    keys["nope_layers"] = list(arch.nope_layers)
    scaling = arch.rope_scaling
    rope_type = "default" if scaling is None else scaling.rope_type
    keys["rope_scaling.rope_type"] = rope_type
    for key in {key: None for keys in _ROPE_KEYS.values() for key in keys}:
        used = key in _ROPE_KEYS.get(rope_type, ())
        value = getattr(scaling, key) if used else None
        keys[f"rope_scaling.{key}"] = list(value) if isinstance(value, tuple) else value
    return keys


def config_from_arch(arch: LlamaArch, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a model of this arch, readable by transformers 4 and 5."""
    dtype_name = str(dtype).removeprefix("torch.")
    family, layers = arch.family, range(arch.num_layers)
    names = KEYS | {name: FAMILY_KEYS[name] for name in family.keys if name in FAMILY_KEYS}
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": arch.model_type,
        **{name: getattr(arch, key.field) for name, key in names.items()},
    }
    if "no_rope_layers" in family.keys:
        config["no_rope_layers"] = [int(layer not in arch.nope_layers) for layer in layers]
    if family.windows is not None:
        config["sliding_window"] = arch.sliding_window
    if family.windows in ("last", "without rope"):
        slides = [arch.window(layer) is not None for layer in layers]
        config["use_sliding_window"] = any(slides)
        config["max_window_layers"] = slides.index(True) if any(slides) else arch.num_layers
        kinds = "full_attention", "sliding_attention"
        config["layer_types"] = [kinds[slid] for slid in slides]
    # some families have a default that need not be in this vocabulary
    config |= {"rope_scaling": None, "torch_dtype": dtype_name, "pad_token_id": None}
    scaling = arch.rope_scaling
    if scaling is not None:
        values = {key: getattr(scaling, key) for key in _ROPE_KEYS[scaling.rope_type]}
        config["rope_scaling"] = {"rope_type": scaling.rope_type} | {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if value is not None
        }
    return config


def config_arch(directory: Path) -> LlamaArch:
    return arch_from_config(read_config(directory), source=str(directory / CONFIG_FILE))


HF = CheckpointFormat(name="hf", arch=config_arch, tensors=open_tensors)
