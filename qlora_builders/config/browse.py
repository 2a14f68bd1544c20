"""`qlora configs`: list, show, copy and validate configs, shipped ones and your own."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qlora_builders.config.compose import draft
from qlora_builders.config.entry import OptionParser, component_problems
from qlora_builders.config.instantiate import allow_prefixes
from qlora_builders.config.own_files import GLOBAL, all_groups, config_folders, groups
from qlora_builders.config.verbs import VERBS
from qlora_builders.errors import ConfigError, did_you_mean
from qlora_builders.files.outputs import write_whole
from qlora_builders.visible import say, visible

USAGE = """\
usage: qlora configs ls                     all configs, with what each is for
       qlora configs show NAME              print a file, such as experiment/demo_qlora
       qlora configs cp NAME FILE           copy it, such as to mine/experiment/my_run.yaml, to
                                            edit and use: --config-dir mine experiment=my_run;
                                            NAME may be a file, such as a run's config.yaml
       qlora configs validate [NAME|all]    compose it and check every value

  --config-dir DIR    a folder with configs of your own
  --allow PREFIX      a package whose classes configs may name"""


def main(argv: Sequence[str]) -> int:
    """Run one `qlora configs` command; returns the exit code.

    Raises:
        ConfigError: for an unknown command or config, and for a config that is not valid.
    """
    parser = OptionParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config-dir")
    parser.add_argument("--allow", action="append", default=[])
    parser.add_argument("words", nargs="*")
    options = parser.parse_intermixed_args(argv)
    if options.help or not options.words:
        print(USAGE)
        return 0
    return _dispatch(options)


def find_configs(folders: Sequence[Path]) -> dict[str, Path]:
    """Name without `.yaml` -> file."""
    return {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for folder in folders
        for file in sorted(folder.rglob("*.yaml"))
    }


def validate(name: str, config_dir: str | Path | None = None) -> list[str]:
    """Every problem of one config in the verb that it suits best; required keys may be open."""
    group, _, option = name.rpartition("/")
    verbs = [verb for verb, row in VERBS.items() if group in groups(verb) or name == row.primary]
    if not verbs:
        return [f"{name}.yaml: no command uses it; groups are method, optimizer, data, experiment"]
    found = []
    for verb in verbs:
        overrides = [f"{group}={option}"] if group else []
        found.append(_problems(verb, overrides, config_dir))
    fewest = min(found, key=len)  # data=preference is for dpo, data=chat for the others
    return [f"{name}.yaml: {p.removeprefix(f'{name}.yaml: ')}" for p in dict.fromkeys(fewest)]


def _problems(verb: str, overrides: list[str], config_dir: str | Path | None) -> list[str]:
    cfg, problems = draft(verb, overrides, config_dir=config_dir, for_run=False)
    logging.disable(logging.WARNING)  # what packages say while they are imported
    try:
        with suppress(ImportError):  # of an optional package; a run says how to install it
            problems += component_problems(cfg)
    finally:
        logging.disable(logging.NOTSET)
    return problems


def _dispatch(options: argparse.Namespace) -> int:
    command, *names = options.words
    configs = find_configs(config_folders(options.config_dir))
    if command == "ls" and not names:
        width = max(map(len, configs))
        for name, file in configs.items():
            say(f"{name:<{width}}  {_summary(file)}")
    elif command == "show" and len(names) == 1:
        print(visible(_find(names[0], configs)[1].read_text("utf-8")), end="")
    elif command == "cp" and len(names) == 2:
        own = Path(names[0])  # such as runs/NAME/config.yaml
        source = own if own.suffix == ".yaml" and own.is_file() else _find(names[0], configs)[1]
        _copy(source, Path(names[1]))
    elif command == "validate" and len(names) <= 1:
        chosen = list(configs) if names in ([], ["all"]) else [_find(names[0], configs)[0]]
        with allow_prefixes(options.allow):
            problems = [text for name in chosen for text in validate(name, options.config_dir)]
        if problems:
            raise ConfigError(*problems)
        say(f"{len(chosen)} valid" + (f": {chosen[0]}" if names and len(chosen) == 1 else ""))
    elif command in ("ls", "show", "cp", "validate"):
        head = f"qlora configs {command}: wrong number of arguments"
        raise ConfigError(head, *USAGE.splitlines())
    else:
        near = did_you_mean(command, ("ls", "show", "cp", "validate"))
        raise ConfigError(f"qlora configs: unknown command {command!r}{near}")
    return 0


def _find(name: str, configs: dict[str, Path]) -> tuple[str, Path]:
    """A config by its full name, or by its last part where that is unique."""
    name = name.removesuffix(".yaml")
    matches = [full for full in configs if full == name or full.endswith(f"/{name}")]
    if name in configs:
        matches = [name]
    if len(matches) != 1:
        options = [*configs, *(full.rpartition("/")[2] for full in configs)]
        hint = f"; it may be {' or '.join(matches)}" if matches else did_you_mean(name, options)
        raise ConfigError(f"no single config is called {name!r}{hint}")
    return matches[0], configs[matches[0]]


def _copy(source: Path, target: Path) -> None:
    if target.is_dir() or target.suffix != ".yaml":
        raise ConfigError(f"{str(target)!r} is not a file name that ends in .yaml")
    if target.exists():
        raise ConfigError(f"{str(target)!r} exists; remove it or choose another name")
    content = source.read_bytes()
    if target.parent.name == "experiment" and not content.startswith(GLOBAL.encode()):
        content = f"{GLOBAL}\n".encode() + content
    write_whole(target, content)
    say(f"wrote {target}; {_how_to_use(target)}")


def _how_to_use(file: Path) -> str:
    folder, group = file.parent.parent, file.parent.name
    if group in all_groups():
        return f"use it with --config-dir {shlex.quote(str(folder))} {group}={file.stem}"
    return "to use it, move it to DIR/GROUP/NAME.yaml, such as mine/experiment/my_run.yaml"


def _summary(file: Path) -> str:
    """The first comment line that is not a hydra directive."""
    for line in file.read_text("utf-8").splitlines():
        if line.startswith("# ") and "@package" not in line:
            return line[2:]
    return ""
