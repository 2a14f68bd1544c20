"""Reading a YAML file of the user's: what is wrong with it is one message, and its size is bounded.

YAML names a part once and repeats it by aliases, so that ten lines can stand for a billion values,
and OmegaConf writes all of them out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # a dependency of omegaconf
from omegaconf import OmegaConf

from qlora_builders.errors import ConfigError

_MOST_VALUES = 100_000  # a rule for every slot of the largest Llama takes some 5,000


def load_yaml(file: Path) -> Any:
    """What a YAML file says, as it is written.

    Raises:
        ConfigError: if it is not YAML, not UTF-8, nested too deeply or too large.
    """
    check_bounded(file)
    try:
        return OmegaConf.to_container(OmegaConf.load(file))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{file}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply") from None
    except (ValueError, TypeError) as error:  # such as !!int x
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{file}: not valid YAML: {reason}") from error


def check_bounded(file: Path) -> None:
    """What else is wrong with the file is for those who read it.

    Raises:
        ConfigError: if its aliases stand for too many values, or for themselves.
    """
    try:
        node = yaml.compose(file.read_text("utf-8"), yaml.SafeLoader)
        values = 0 if node is None else _count(node, {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return
    if values > _MOST_VALUES:
        raise ConfigError(
            f"{file}: its aliases (*name) stand for more than {_MOST_VALUES:,} values, or for "
            "themselves; write out what is needed"
        )


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Values below a node with every alias written out; too many for one that holds itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = _MOST_VALUES + 1  # until it is known
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        counts[id(node)] = 1 + sum(_count(part, counts) for part in parts)
    return counts[id(node)]
