"""`--multirun`: overrides with several values become jobs, each with a checked config of its own.

What counts as several values is hydra's grammar: `1e-4,2e-4`, `choice(a,b)`, `range(0,4)`, and
`glob(llama*)` for the options of a group. https://hydra.cc/docs/advanced/override_grammar/extended
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from qlora_builders.config.checks import flatten
from qlora_builders.config.entry import draft_run
from qlora_builders.config.overrides import OVERRIDE, key_of
from qlora_builders.config.own_files import config_folders, group_options
from qlora_builders.config.verbs import VERBS
from qlora_builders.errors import ConfigError

_LONGEST_NAME = 120  # file systems take 255 bytes


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        name: what sets it apart, as the name of a file: lr_0.0001+seed_0.
        swept: the same as overrides: {"optimizer.lr": "0.0001", "training.seed": "0"}.
        overrides: all of them, with its own path.
        path: its folder, or its file where the verb writes one.
    """

    name: str
    swept: Mapping[str, str]
    overrides: Sequence[str]
    path: Path
    cfg: Any


def plan_sweep(
    verb: str, overrides: Sequence[str], config_dir: str | None = None
) -> tuple[Path, list[Job]]:
    """The folder of a sweep and its jobs, every config of which is right.

    Raises:
        ConfigError: with everything that is wrong in any job.
    """
    swept_verbs = {name: row.swept for name, row in VERBS.items() if row.swept}
    if verb not in swept_verbs:
        raise ConfigError(f"qlora {verb} takes no --multirun; {', '.join(swept_verbs)} do")
    path_key, ending = swept_verbs[verb]
    splits = list(split(overrides, config_dir))
    labels = short_names(splits[0][0])
    jobs: list[Job] = []
    problems: list[str] = []
    for swept, words in splits:
        cfg, wrong = draft_run(verb, words, config_dir)
        resume = getattr(getattr(cfg, "training", None), "resume", None)
        if not wrong and resume not in (None, "auto"):
            wrong = [f"training.resume={resume} is of one run; a sweep goes on with auto"]
        if path_key in swept:
            wrong.append(f"{path_key} cannot be swept: it names the folder of all jobs")
        problems += wrong
        given = getattr(cfg, path_key) or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}"
        folder = jobs[0].path.parent if jobs else Path(given.removesuffix(ending))
        name = job_name({labels[key]: value for key, value in swept.items()})
        path = folder / f"{name}{ending}"
        setattr(cfg, path_key, str(path))
        own = [word for word in words if key_of(word) != path_key]
        jobs.append(Job(name, swept, [*own, f"{path_key}={path}"], path, cfg))
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return folder, jobs


def split(
    overrides: Sequence[str], config_dir: str | None = None
) -> Iterator[tuple[dict[str, str], list[str]]]:
    """For every combination: the values that it takes of the swept keys, and all its overrides.

    Raises:
        ConfigError: if no key has several values, or they cannot be listed.
    """
    loader: Any = _Groups(config_folders(config_dir))
    parser = OverridesParser.create(config_loader=loader)
    choices: dict[str, list[str]] = {}  # the last word on a key counts
    swept: set[str] = set()
    problems = []
    for override in overrides:
        key = key_of(override)
        try:
            values = _values(override, parser)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if values is not None:
            swept.add(key)
        choices[key] = [override] if values is None else [f"{key}={value}" for value in values]
    if problems:
        raise ConfigError(*problems)
    if not swept:
        raise ConfigError(
            "--multirun needs a key with several values, such as optimizer.lr=1e-4,2e-4"
        )
    for words in itertools.product(*choices.values()):
        by_key = dict(zip(choices, words, strict=True))
        yield {key: by_key[key].partition("=")[2] for key in choices if key in swept}, list(words)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """`optimizer.lr` -> `lr`, where no other key ends like that."""
    last = {key: key.rpartition(".")[2] for key in keys}
    count = Counter(last.values())
    return {key: name if count[name] == 1 else key for key, name in last.items()}


def job_name(swept: Mapping[str, str]) -> str:
    """A name for a file, the same for the same values whatever else a sweep holds.

    Without `=` and commas, which mean something on the command lines of a sweep.
    """
    full = "+".join(f"{key}_{value}" for key, value in swept.items())
    last = "+".join(f"{key}_{Path(value).name}" for key, value in swept.items())
    name = re.sub(r"[^\w.+-]+", "-", last)[:_LONGEST_NAME]
    if name == full:
        return name
    return f"{name.strip('-')}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys of which a job has another value now, but for those that say how it is started."""
    started = ("output_dir", "training.resume", "overwrite")
    before, now = flatten(before), flatten(now)
    return [
        f"{key}={now.get(key)}, was {before.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if key not in started and before.get(key) != now.get(key)
    ]


class _Groups:
    """What hydra's `glob` asks a config loader."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders

    def get_group_options(self, group: str, **_: Any) -> list[str]:
        return group_options(group, self.folders)


def _values(override: str, parser: Any) -> list[str] | None:
    """The values of an override that has several; None for one that is to be taken as it is."""
    match = OVERRIDE.fullmatch(override)
    if match is None or match[1] == "~":
        return None  # and refused later
    try:
        (parsed,) = parser.parse_overrides([override])
    except HydraException as error:
        if "," not in match[3]:
            return None  # text that means nothing in hydra's grammar
        raise ConfigError(
            f"cannot read the values of {override!r}: quote text with commas, braces, brackets or "
            "colons, as in key=\"'one, two','three'\""
        ) from error
    if not parsed.is_sweep_override():
        return None
    if not parsed.is_discrete_sweep():
        raise ConfigError(f"{override!r} has no list of values; write choice(...) or range(...)")
    values = list(parsed.sweep_string_iterator())
    if not values:
        raise ConfigError(f"{override!r} matches nothing")
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"{override!r} has {value} twice")
    return values
