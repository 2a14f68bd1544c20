"""How a recipe becomes a command: options, composed config, and errors a person can read.

if __name__ == "__main__":
    sys.exit(run_recipe(main, "finetune"))
"""

from __future__ import annotations

import argparse
import io
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qlora_builders.config.checks import name_problems, path_problems, value_of
from qlora_builders.config.compose import compose, draft, to_yaml
from qlora_builders.config.help import OPTIONS, help_text
from qlora_builders.config.instantiate import allow_prefixes, resolve_component
from qlora_builders.config.overrides import FILE_WORDS, OWN_FILE, quote
from qlora_builders.config.sections import knobs
from qlora_builders.config.verbs import VERBS
from qlora_builders.errors import ConfigError, QLoRAError, nearest
from qlora_builders.visible import visible

USER_ERROR = 2
_LONGEST_LINE = 2000  # characters
INTERRUPTED = 130  # what shells report for Ctrl-C
BROKEN_PIPE = 141  # and for a reader that has left


def run_recipe(main: Callable[[Any], object], verb: str, argv: Sequence[str] | None = None) -> int:
    """Run `main(cfg)` with the config that the command line composes; returns the exit code.

    Args:
        main: the recipe; it gets an instance of the verb's root dataclass.
        verb: a key of `VERBS`; a recipe of your own has a row there.
        argv: the command line after the program's name; None: the process's own.
    """
    words = sys.argv[1:] if argv is None else argv
    return with_errors(lambda: _run(main, verb, words))


def with_errors(run: Callable[[], int]) -> int:
    """The exit code of `run()`; what a user can put right is printed, and is USER_ERROR."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # its encoding may lack a character
    try:
        code = run()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError as error:
        if not _has_lost_its_reader(sys.stdout.fileno()):
            report(error)
            return USER_ERROR
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest of the buffer
        return BROKEN_PIPE
    except (QLoRAError, ImportError, OSError) as error:
        if isinstance(error, ImportError) and not _is_missing_extra(error):
            raise
        report(error)
        return USER_ERROR
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        report(QLoRAError(f"out of memory: {_short(error)}; see `qlora estimate --help`"))
        return USER_ERROR


def _has_lost_its_reader(descriptor: int) -> bool:
    """As where `| head` has seen enough."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def report(error: Exception) -> None:
    """Print what went wrong, one line per problem, to stderr.

    What a file says is quoted there, so it may be long, and have characters that move a cursor or
    begin a line.
    """
    problems = error.problems if isinstance(error, QLoRAError) else (str(error),)
    if isinstance(error, OSError) and error.filename is not None:
        where = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        problems = (f"{where} cannot be used: {error.strerror}; choose another place",)
    for problem in problems:
        line = visible(problem.strip() or type(error).__name__, keep="")
        if len(line) > _LONGEST_LINE:
            line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
        print(f"error: {line}", file=sys.stderr)


class OptionParser(argparse.ArgumentParser):
    """argparse whose complaints are ConfigErrors, printed like every other."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def _run(main: Callable[[Any], object], verb: str, argv: Sequence[str]) -> int:
    if verb not in VERBS:
        raise ConfigError(
            f"no verb is called {verb!r}; a recipe needs a row in qlora_builders/config/verbs.py"
        )
    options, overrides = parse_options(argv)
    if options.help:
        print(help_text(verb))
        return 0
    if "runs" in knobs(VERBS[verb].root):
        overrides = _name_runs(overrides)
    if options.print_config:
        print(visible(to_yaml(compose(verb, overrides, config_dir=options.config_dir))), end="")
        return 0
    with allow_prefixes(options.allow):
        cfg, problems = draft_run(verb, overrides, options.config_dir)
        if problems:
            raise ConfigError(*problems)
        main(cfg)
    return 0


def draft_run(
    verb: str,
    overrides: Sequence[str],
    config_dir: str | None = None,
) -> tuple[Any, list[str]]:
    """`compose.draft`, and what is wrong with the components that a config names.

    Looking at these imports torch, so other mistakes come without them, unless the command line
    has arguments of theirs.
    """
    cfg, problems = draft(verb, overrides, config_dir=config_dir)
    problems += names_of_code(cfg, overrides)
    if not problems:
        problems += name_problems(cfg)
    if not problems and VERBS[verb].needs_files:
        problems += path_problems(cfg)
    if not problems or any(word.startswith(("optimizer.", "loggers")) for word in overrides):
        problems += component_problems(cfg)
    return cfg, problems


def names_of_code(cfg: Any, overrides: Sequence[str]) -> list[str]:
    """A config file may come from anywhere, and is not to choose code that runs.

    Returns:
        A message for each key that does so and has a value that is not from the command line.
    """
    problems = []
    for key, knob in knobs(type(cfg)).items():
        value = value_of(cfg, key)
        typed = any(one.startswith(f"{key}=") and "${" not in one for one in overrides)
        if knob.names_code and value != knob.default and not typed:
            problems.append(
                f"{key}={value} is in a config file, but code runs from there: write it on the "
                "command line"
            )
    return problems


def component_problems(cfg: Any) -> list[str]:
    """What is wrong with the `component:` nodes, before anything slow happens.

    Raises:
        ImportError: if a component's package is optional and missing.
    """
    problems = []
    for key, knob in knobs(type(cfg)).items():
        if knob.names is None:
            continue
        value = value_of(cfg, key)
        nodes = {key: value}
        if isinstance(value, list):
            nodes = {f"{key}[{index}]": node for index, node in enumerate(value)}
        for node_key, node in nodes.items():
            if isinstance(node, dict) and "component" in node:
                try:
                    resolve_component(node, knob.names, key=node_key)
                except ConfigError as error:
                    problems.append(str(error))
    return problems


def parse_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split a command line into our options and hydra's overrides, in any order."""
    parser = OptionParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config-dir")
    parser.add_argument("--allow", action="append", default=[])
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--dry-run", action="store_const", const=["dry_run=true"], default=[])
    options, overrides = parser.parse_known_args(argv)
    for override in overrides:
        if override.startswith("-"):
            raise ConfigError(f"unknown option {override!r}{_option_hint(override.lstrip('-'))}")
    return options, [*overrides, *options.dry_run]


def _option_hint(word: str) -> str:
    name = word.partition("=")[0]
    option = f"--{name.replace('_', '-')}"
    if name in FILE_WORDS:
        return f": {OWN_FILE}"
    if "=" in word and option not in OPTIONS:
        return f"; write {word}, without dashes"
    near = nearest(option, OPTIONS)
    return f"; did you mean {near!r}?" if near else "; see --help"


def _name_runs(words: Sequence[str]) -> list[str]:
    """`RUN1 RUN2 output=F` -> `runs=[RUN1,RUN2] output=F`; a folder may have a = in its name."""
    runs = [word for word in words if "=" not in word or Path(word).is_dir()]
    named = [f"runs=[{','.join(map(quote, runs))}]"] if runs else []
    return [word for word in words if word not in runs] + named


def _is_out_of_memory(error: Exception) -> bool:
    """torch has a class for GPUs only, and may not be imported here."""
    names = ("OutOfMemoryError", "MemoryError")
    return type(error).__name__ in names or "can't allocate memory" in str(error)


def _short(error: Exception) -> str:
    """How much was asked for, without where in the source."""
    asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    return f"{asked[1]} were asked for" if asked else "more was asked for than there is"


def _is_missing_extra(error: ImportError) -> bool:
    """Whether `errors.optional_import` raised this; any other ImportError is a bug of ours."""
    return type(error) is ImportError and isinstance(error.__cause__, ImportError)
