"""PEFT's adapter_config.json, read: types checked, every entry accounted for.

PEFT selects modules by regular expressions and name suffixes, and takes whatever they happen to
match. `PeftConfig` applies the same rules and adds the ones PEFT lacks: an entry that matches
nothing is an error, and so is a module in the file that no entry selects.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_builders.confined import patterns as confined_patterns
from qlora_builders.confined.process import Limits, OverrunError, RaisedError, ask
from qlora_builders.errors import CheckpointError, listed
from qlora_builders.files.outputs import step_folders
from qlora_builders.files.reading import read_json_object

CONFIG_FILE = "adapter_config.json"

# keys that change the function computed, with the values we can honour
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    # other values (pissa, olora, corda, loftq ...) also change the base weights
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_INIT_HINT = (
    ": such an adapter needs a base that PEFT changed. Let PEFT make it one for the original base: "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
)
LIMITS = Limits()  # of matching the entries of one key
_PLAIN = re.compile(r"[\w.-]*")  # as a regex it repeats nothing, so it is fast
# keys whose entries PEFT compiles
_REGEXES = (
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
)


@dataclass(frozen=True)
class AdapterModule:
    """The adapter of one linear slot."""

    rank: int
    alpha: float
    use_rslora: bool = False
    lora_bias: bool = False
    use_dora: bool = False

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True)
class PeftConfig:
    """The part of adapter_config.json that says what is adapted, and how strongly."""

    file: Path
    rank: int
    alpha: float
    use_rslora: bool
    lora_bias: bool
    use_dora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | list[str]
    exclude_modules: str | list[str]
    layers_to_transform: list[int]
    layers_pattern: list[str]
    modules_to_save: list[str]
    tokens: list[int]  # whose rows of the embedding were trained

    def ranks(self, names: Collection[str]) -> dict[str, int]:
        return self._values("rank_pattern", names, self.rank)

    def alphas(self, names: Collection[str]) -> dict[str, float]:
        return self._values("alpha_pattern", names, self.alpha)

    def targeted(self, names: Collection[str]) -> set[str]:
        """The linear modules to which PEFT would give an adapter."""
        excluded = self._selected("exclude_modules", names)
        entries = [rf"(^|.*\.){entry}($|\..*)" for entry in self.modules_to_save]
        for saved in self._matched("modules_to_save", entries, names):
            excluded |= saved.keys()
        if self.target_modules == "all-linear":
            return {name for name in names if name != "lm_head"} - excluded
        selected = self._selected("target_modules", names) - excluded
        if isinstance(self.target_modules, str) or not self.layers_to_transform:
            return selected
        layers = self._layers(selected)
        return {
            name
            for name in selected  # a full name has the last word
            if name in self.target_modules or layers.get(name) in self.layers_to_transform
        }

    def saves(self, name: str) -> bool:
        """Whether PEFT would train and store the module `name` as a whole."""
        return name.endswith(tuple(self.modules_to_save))

    def check_entries(self, adapted: Collection[str], saved: Collection[str]) -> None:
        """
        Args:
            adapted: modules of the file with lora_A and lora_B.
            saved: modules of the file that are stored as a whole.

        Raises:
            CheckpointError: for entries that match no module of the file, and modules of the file
                that no entry selects.
        """
        layers = self._layers(adapted).values() if self.layers_to_transform else ()
        unused = {
            "target_modules": [
                entry
                for entry in self._target_list()
                if not any(_is_suffix(entry, name) for name in adapted)
            ],
            "layers_to_transform": [
                str(index) for index in self.layers_to_transform if index not in layers
            ],
            "modules_to_save": [
                entry
                for entry in self.modules_to_save
                if not any(name.endswith(entry) for name in saved)
            ],
        } | {
            key: [entry for entry, fitting in self._fitting(key, adapted).items() if not fitting]
            for key in ("rank_pattern", "alpha_pattern")
        }
        problems = [
            f"{key} entries without a module in the file: {listed(sorted(entries))}"
            for key, entries in unused.items()
            if entries
        ]
        strays = sorted(set(adapted) - self.targeted(adapted))
        if strays:
            problems.append(f"adapters in the file that target_modules excludes: {listed(strays)}")
        if problems:
            raise CheckpointError(
                f"{self.file}: {'; '.join(problems)}. PEFT skips such mistakes silently; correct "
                "the entries, or remove those that are not meant"
            )

    def _target_list(self) -> list[str]:
        return self.target_modules if isinstance(self.target_modules, list) else []

    def _layers(self, names: Collection[str]) -> dict[str, int]:
        """The layer indices that PEFT reads from module names."""
        starts = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern]
        patterns = [rf"{start}\.(?P<index>\d+)\." for start in starts or [r".*?\.[^.]*"]]
        found: dict[str, int] = {}
        for matched in self._matched("layers_pattern", patterns, names):
            for name, index in matched.items():
                found.setdefault(name, int(index))
        return found

    def _selected(self, key: str, names: Collection[str]) -> set[str]:
        """A string is a regex for the whole name; a list holds names and suffixes of segments."""
        entries = getattr(self, key)
        if isinstance(entries, str):
            (matched,) = self._matched(key, [entries], names, whole=True)
            return set(matched)
        return {name for name in names if any(_is_suffix(entry, name) for entry in entries)}

    def _fitting(self, key: str, names: Collection[str]) -> dict[str, set[str]]:
        """Of each key of a pattern, a regex for a suffix of whole segments, the names it fits."""
        entries = list(getattr(self, key))
        found = self._matched(key, [rf"(.*\.)?({entry})$" for entry in entries], names)
        return {entry: set(matched) for entry, matched in zip(entries, found, strict=True)}

    def _values(self, key: str, names: Collection[str], default: Any) -> dict[str, Any]:
        """PEFT's rule: the first key that fits."""
        values = dict.fromkeys(names, default)
        fitting = self._fitting(key, names)
        for entry in reversed(fitting):
            values |= dict.fromkeys(fitting[entry], getattr(self, key)[entry])
        return values

    def _matched(
        self, key: str, patterns: Sequence[str], names: Collection[str], *, whole: bool = False
    ) -> list[dict[str, str]]:
        """Of each pattern the names that it matches, each with its group `index` or ""."""
        ordered = list(names)
        found = _evaluate(self.file, key, getattr(self, key), "matches", patterns, ordered, whole)
        return [
            {name: index for name, index in zip(ordered, row, strict=True) if index is not None}
            for row in found
        ]


def _is_suffix(entry: str, name: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _evaluate(
    file: Path, key: str, entries: Any, function: str, patterns: Sequence[str], *arguments: Any
) -> Any:
    """A function of `confined.patterns`, here if plain names are all there is to evaluate.

    Raises:
        CheckpointError: if it takes more than the limits, or does not fit into a regex of ours.
    """
    if not patterns:
        return []
    texts = [entries] if isinstance(entries, str) else entries
    if all(_PLAIN.fullmatch(text) for text in texts):
        return getattr(confined_patterns, function)(list(patterns), *arguments)
    try:
        return ask(f"patterns.{function}", list(patterns), *arguments, limits=LIMITS).value
    except OverrunError as error:
        shown = listed([repr(text)[:200] for text in texts])
        raise CheckpointError(
            f"{file}: matching {key} {shown} {error}; write the names of the modules instead"
        ) from error
    except RaisedError as error:
        raise CheckpointError(f"{file}: {key} cannot be matched: {error}") from error


# ---- in -----------------------------------------------------------------------------------------


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_switch(value: Any) -> bool:
    return type(value) is bool


def _is_token(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_names(value: Any) -> bool:
    return _is_name(value) or _list_of(_is_name)(value)


def _is_layers(value: Any) -> bool:
    return type(value) is int or _list_of(lambda index: type(index) is int)(value)


def _list_of(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(valid, value))


def _map_of(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(valid, value.values()))


# key -> what it may hold, in code and in words, and its default if it has one
_FIELDS: dict[str, tuple[Callable[[Any], bool], str, Any]] = {
    "r": (_is_rank, "an integer >= 1", None),
    "lora_alpha": (_is_alpha, "a finite number > 0", None),
    "use_rslora": (_is_switch, "true or false", False),
    "lora_bias": (_is_switch, "true or false", False),
    "use_dora": (_is_switch, "true or false", False),
    "rank_pattern": (_map_of(_is_rank), "names to integers >= 1", {}),
    "alpha_pattern": (_map_of(_is_alpha), "names to numbers > 0", {}),
    "target_modules": (_is_names, "a string or a list of names", None),
    "exclude_modules": (_is_names, "a string or a list of names", []),
    "layers_to_transform": (_is_layers, "an integer or a list of integers", []),
    "layers_pattern": (_is_names, "a string or a list of names", []),
    "modules_to_save": (_list_of(_is_name), "a list of names", []),
}


def _value(
    file: Path,
    config: dict[str, Any],
    key: str,
    valid: Callable[[Any], bool],
    wanted: str,
    default: Any,
) -> Any:
    """null is the default, or an error where there is none."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not valid(value):
        got = repr(value) if key in config else "missing"
        raise CheckpointError(f"{file}: {key} is {got[:200]}; it must be {wanted}")
    return value


def _meant(directory: Path) -> str:
    """A hint for a run's folder, and for the result of a run that was stopped before it had one."""
    for other in (directory / "adapter", *reversed(step_folders(directory.parent))):
        if (other / CONFIG_FILE).is_file():
            return f"; did you mean {other}?"
    return ""


def read_peft_config(directory: Path) -> PeftConfig:
    """
    Raises:
        CheckpointError: for a missing file, a value of the wrong type or out of range, or a
            feature that we do not have.
    """
    file = directory / CONFIG_FILE
    config = read_json_object(file, expected=f"a PEFT adapter directory{_meant(directory)}")
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {config['peft_type']!r}; only LORA is read")
    for key, allowed in _UNSUPPORTED.items():
        value = config.get(key)
        if not any(type(value) is type(ok) and value == ok for ok in allowed):
            hint = _INIT_HINT if key == "init_lora_weights" else ""
            raise CheckpointError(f"{file}: {key}={value!r} is not supported{hint}")
    values = {key: _value(file, config, key, *field) for key, field in _FIELDS.items()}
    for key in ("layers_to_transform", "layers_pattern"):
        values[key] = values[key] if isinstance(values[key], list) else [values[key]]
    parsed = PeftConfig(
        file,
        rank=values.pop("r"),
        alpha=values.pop("lora_alpha"),
        tokens=_tokens(file, config.get("trainable_token_indices")),
        **values,
    )
    for key in _REGEXES:
        value = getattr(parsed, key)
        entries = [value] if isinstance(value, str) else list(value)
        problems = _evaluate(file, key, entries, "problems", entries)
        for entry, problem in zip(entries, problems, strict=True):
            if problem is not None:
                raise CheckpointError(f"{file}: {key} entry {entry!r} is no regex: {problem}")
    if parsed.use_dora and parsed.lora_bias:
        raise CheckpointError(f"{file}: use_dora and lora_bias exclude each other, as in PEFT")
    return parsed


def _tokens(file: Path, value: Any) -> list[int]:
    """A list, or one for the embedding alone: a head that is not tied could have another."""
    tokens = value or []
    if isinstance(tokens, dict):
        strays = sorted(str(name) for name in tokens if str(name).split(".")[-1] != "embed_tokens")
        if strays:
            raise CheckpointError(
                f"{file}: trainable_token_indices of {listed(strays)} is not supported; of "
                "embed_tokens, and with it of a tied head, it is"
            )
        (tokens,) = tokens.values()
    if not _list_of(_is_token)(tokens) or len(set(tokens)) < len(tokens):
        raise CheckpointError(
            f"{file}: trainable_token_indices is {value!r:.200}; it must be token "
            "ids >= 0, none twice"
        )
    return tokens
