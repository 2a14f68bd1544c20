"""The `qlora` command: finds the recipe of a verb and runs it.

Only the standard library is imported here, and a recipe is loaded after its config is known to be
right, so help and mistakes answer at once.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qlora_builders import __version__
from qlora_builders.config.verbs import VERBS
from qlora_builders.errors import did_you_mean

COMMANDS = {verb: row.summary for verb, row in VERBS.items()} | {
    "configs": "list, show, copy and validate the shipped configs"
}
LAUNCH_OPTIONS = {"--nproc-per-node": 1, "--max-restarts": 0}  # with the least they may be
MULTIRUN = "--multirun"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2 for anything the user can put right)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"qlora {__version__}")
        return 0
    verb, *rest = words
    if verb not in COMMANDS:
        from qlora_builders.config.verbs import OTHER_VERBS

        meant = OTHER_VERBS.get(verb)
        hint = f"; did you mean {meant!r}?" if meant else did_you_mean(verb, COMMANDS)
        print(f"error: unknown command {verb!r}{hint}", file=sys.stderr)
        return 2
    if verb == "configs":
        return _browse(rest)
    if MULTIRUN in rest:
        return _sweep(verb, [word for word in rest if word != MULTIRUN])
    if any(word.startswith(tuple(LAUNCH_OPTIONS)) for word in rest):
        return _launch(verb, rest)
    from qlora_builders.config.entry import run_recipe

    return run_recipe(lambda cfg: load_recipe(recipe_path(verb))(cfg), verb, rest)


def usage() -> str:
    """What `qlora --help` prints."""
    verbs = "\n".join(f"  {verb:<10} {summary}" for verb, summary in COMMANDS.items())
    return (
        "usage: qlora COMMAND [KEY=VALUE ...]\n\n"
        f"{verbs}\n\n"
        "qlora finetune --nproc-per-node N [--max-restarts M] ... trains in N processes.\n"
        "qlora finetune --multirun KEY=A,B ... is a sweep: a run for each combination of values.\n"
        "qlora COMMAND --help lists the keys of a command; qlora --version prints the version.\n"
        "Try: qlora finetune experiment=demo_qlora"
    )


def recipe_path(verb: str) -> Path:
    """The recipe's file, in a wheel or a checkout."""
    from qlora_builders.config.shipped import shipped_dir

    return shipped_dir("recipes") / VERBS[verb].recipe


def load_recipe(path: Path) -> Callable[[Any], object]:
    """The `main` of a recipe file; recipes are scripts, so none is importable by name."""
    spec = importlib.util.spec_from_file_location(f"qlora_recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up here
    spec.loader.exec_module(module)
    recipe_main: Callable[[Any], object] = module.main
    return recipe_main


def _launch(verb: str, words: Sequence[str]) -> int:
    """A training verb in several processes, once the config is known to be right."""
    from qlora_builders.config.entry import run_recipe, with_errors
    from qlora_builders.distributed.ranks import launch

    def run() -> int:
        options, rest = _launch_options(verb, words)

        def start(cfg: Any) -> None:
            command = ["-m", "qlora_builders.cli", verb, *rest]
            if not any(word.startswith("output_dir=") for word in rest):
                command.append(f"output_dir={cfg.output_dir}")  # a restart goes on in the same
            nproc_per_node, max_restarts = (
                options[name] or least for name, least in LAUNCH_OPTIONS.items()
            )
            sys.exit(launch(command, nproc_per_node=nproc_per_node, max_restarts=max_restarts))

        return run_recipe(start, verb, rest)

    return with_errors(run)


def _sweep(verb: str, words: Sequence[str]) -> int:
    """A run for each combination of values, in several processes where that is asked for."""
    from qlora_builders.config.entry import run_recipe, with_errors

    if "-h" in words or "--help" in words:
        return run_recipe(print, verb, ["--help"])

    def run() -> int:
        from qlora_builders.sweep import sweep

        options, rest = _launch_options(verb, words)
        return sweep(verb, rest, [f"{name}={n}" for name, n in options.items() if n is not None])

    return with_errors(run)


def _launch_options(verb: str, words: Sequence[str]) -> tuple[dict[str, int | None], list[str]]:
    """The values of LAUNCH_OPTIONS, and all other words."""
    from qlora_builders.config.entry import OptionParser
    from qlora_builders.errors import ConfigError

    given = [word for word in words if word.startswith(tuple(LAUNCH_OPTIONS))]
    if given and not VERBS[verb].trains:
        takers = " and ".join(name for name, row in VERBS.items() if row.trains)
        raise ConfigError(f"qlora {verb} runs in one process; only {takers} take {given[0]}")
    parser = OptionParser(add_help=False, allow_abbrev=False)
    for option, least in LAUNCH_OPTIONS.items():
        parser.add_argument(option, type=partial(_count, least=least), dest=option)
    options, rest = parser.parse_known_args(words)
    return vars(options), rest


def _count(text: str, least: int) -> int:
    from argparse import ArgumentTypeError

    if not text.isdecimal() or int(text) < least:
        raise ArgumentTypeError(f"{text!r} is not a whole number >= {least}")
    return int(text)


def _browse(words: Sequence[str]) -> int:
    from qlora_builders.config import browse
    from qlora_builders.config.entry import with_errors

    return with_errors(lambda: browse.main(words))


if __name__ == "__main__":
    sys.exit(main())
