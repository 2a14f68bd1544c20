"""Reading a YAML file of the user's: what is wrong with it is one message, and its size is bounded.

Files that come with the package are taken as they are.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # a dependency of omegaconf
from omegaconf import OmegaConf

from qlora_builders.config.shipped import shipped_dir
from qlora_builders.confined.process import Limits, OverrunError, RaisedError, ask
from qlora_builders.errors import ConfigError

_MOST_VALUES = 100_000  # a rule for every slot of the largest Llama takes some 5,000
_MOST_BYTES = 5 * 10**6
LIMITS = Limits(seconds=20.0)  # 100,000 values take 5


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
        ConfigError: if it is too large, nested too deeply, takes too long to read, or if its
            aliases stand for too many values, or for themselves.
    """
    if Path(os.path.realpath(file)).is_relative_to(shipped_dir("configs").resolve()):
        return
    try:
        size = file.stat().st_size
        text = file.read_text("utf-8") if size <= _MOST_BYTES else ""
    except (OSError, UnicodeDecodeError):
        return
    if size > _MOST_BYTES:
        raise ConfigError(f"{file}: has {size:,} bytes; at most {_MOST_BYTES:,} are read")
    try:
        values = ask("yaml_values.count", text, _MOST_VALUES, limits=LIMITS).value
    except RaisedError as error:
        if error.kind == "RecursionError":
            raise ConfigError(f"{file}: nested too deeply") from None
        return
    except OverrunError as error:
        raise ConfigError(f"{file}: reading it {error}; write out what is needed") from error
    if values > _MOST_VALUES:
        raise ConfigError(
            f"{file}: with its aliases (*name) written out it has more than {_MOST_VALUES:,} "
            "values, or no end; write out what is needed"
        )
