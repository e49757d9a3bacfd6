"""An experiment from a config file and typed flags: `CONFIG [--field.sub value ...]`."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import io
import os
import pathlib
import re
import sys
import traceback
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmsr_jax.cli.endings import UsageError, one_line
from mmsr_jax.cli.words import Parser, nearest


def parser(prog: str, own: str, description: str, example: str) -> Parser:
    """A parser for `CONFIG [own flags] [--field.sub VALUE ...]`; `own` is how usage shows them."""
    fields = f"`{prog} CONFIG --help` lists every field of the experiment."
    made = Parser(
        prog,
        f"{description}\n{fields}",
        example,
        usage=f"{prog} CONFIG {own} [--field.sub VALUE ...] [--debug]",
        add_help=False,
    )
    made.add_argument("config", metavar="CONFIG", help="Python file: get_config() -> Experiment")
    return made


def read(parser: Parser, words: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """(experiment, the command's own arguments) of `CONFIG [own flags] [--field.sub value ...]`.

    `--help` before CONFIG is the command's, after it the experiment's.
    """
    if words and words[0] in ("-h", "--help"):
        parser.print_help()
        raise SystemExit(0)
    if words and words[0].startswith("-"):
        parser.error(f"CONFIG comes first, then flags such as {words[0]}")
    given, rest = parser.parse_known_args(list(words))
    return override(load(given.config), rest, f"{parser.prog} {given.config}"), given


def load(path: str | os.PathLike) -> Any:
    """Runs a config file and returns what its `get_config()` returns.

    The file may import its neighbours. Raises FileNotFoundError if there is no such file, and
    UsageError, with file and line, for whatever goes wrong inside it.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(2, "there is no such config file" + _neighbour(path), str(path))
    if path.is_dir() or path.suffix != ".py":
        raise UsageError(f"{path} is no config: a Python file with a function get_config()")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses defined in the file look themselves up
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UsageError(f"{path} has no function get_config()")
        config = module.get_config()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(_where(error, path)) from error
    finally:
        sys.path.pop(0)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UsageError(f"get_config() of {path} returns a {type(config).__name__}, no Experiment")
    return config


def override(config: Any, words: Sequence[str], prog: str) -> Any:
    """The config with the fields that flags name replaced: `--grpo.steps 10`.

    Every field of every nested record is a flag; `--help` prints them all and exits. A record that
    is None is made when a flag names one of its fields (`--lora.rank 16`), and one that may be
    None is dropped by `--lora None`. Raises UsageError for an unknown flag or a value of the wrong
    type.
    """
    import tyro  # only here: it takes a tenth of a second

    options = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    shown = io.StringIO()
    config, words = _optional(config, list(words))
    try:
        with contextlib.redirect_stderr(shown):
            changed, unknown = tyro.cli(
                type(config),
                prog=prog,
                default=config,
                args=words,
                config=options,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise UsageError(f"{_unboxed(shown.getvalue())} ({prog} --help lists all)") from None
    if unknown:
        word = unknown[0].partition("=")[0]
        kind = "flag" if word.startswith("-") else "word"
        hint = nearest(word, flags(config)) if kind == "flag" else ""
        raise UsageError(f"unknown {kind} {word}{hint} ({prog} --help lists all)")
    return changed


def _optional(config: Any, words: list[str], prefix: str = "--") -> tuple[Any, list[str]]:
    """The config with records that may be None made or dropped as the flags say; the other flags.

    tyro by itself takes the fields of a record only where the config has one.
    """
    hints, changes = typing.get_type_hints(type(config)), {}
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), prefix + field.name.replace("_", "-")
        kinds = typing.get_args(hints[field.name])
        records = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        spelt = [word.replace("_", "-") for word in words]
        if records and type(None) in kinds:
            if f"{flag}=None" in spelt:
                at = spelt.index(f"{flag}=None")
                value, words = None, words[:at] + words[at + 1 :]
            elif flag in spelt and spelt[spelt.index(flag) + 1 :][:1] == ["None"]:
                at = spelt.index(flag)
                value, words = None, words[:at] + words[at + 2 :]
            elif value is None and any(w.startswith(flag + ".") or w == "--help" for w in spelt):
                value = records[0]()
        if dataclasses.is_dataclass(value):
            value, words = _optional(value, words, flag + ".")
        if value is not getattr(config, field.name):
            changes[field.name] = value
    return dataclasses.replace(config, **changes) if changes else config, words


def flags(config: Any, prefix: str = "--") -> Iterator[str]:
    """All flags of a record: "--seed", "--grpo.loss.kl-weight", ..."""
    if isinstance(config, Mapping):
        fields = config.items()
    else:
        fields = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
    for name, value in fields:
        flag = prefix + str(name).replace("_", "-")
        if dataclasses.is_dataclass(value) or (isinstance(value, Mapping) and value):
            yield from flags(value, flag + ".")
        else:
            yield flag


def _neighbour(path: pathlib.Path) -> str:
    """Names the file that may have been meant."""
    if not path.parent.is_dir():
        return ""
    there = sorted(file.name for file in path.parent.glob("*.py"))
    close = difflib.get_close_matches(path.name, there, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _where(error: Exception, path: pathlib.Path) -> str:
    """ "configs/x.py, line 12: TypeError: ..." for an error that arose in the file."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == str(path):
            line = number
    said = error.msg if isinstance(error, SyntaxError) else one_line(error)
    at = f"{path}, line {line}" if line else str(path)
    return f"{at}: {said}" if type(error) is ValueError else f"{at}: {type(error).__name__}: {said}"


def _unboxed(text: str) -> str:
    """The complaint in a box that tyro drew, in one line: what stands between title and rule.

    The box is of lines or of hyphens, and coloured on a terminal.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    said = []
    for line in [line.strip("│ ") for line in plain.splitlines()][1:]:
        if not set(line) <= set("─-"):
            said.append(line)
        elif said:
            break
    message = " ".join(" ".join(said or plain.split()).split()).removesuffix(".")
    return message[:1].lower() + message[1:]
