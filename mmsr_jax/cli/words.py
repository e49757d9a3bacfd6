"""The words of a command line: a parser that complains in one line, and suggestions."""

import argparse
import difflib
from collections.abc import Iterable
from typing import NoReturn

from mmsr_jax.cli.endings import UsageError


class Parser(argparse.ArgumentParser):
    """argparse with an example in `--help` and complaints of one line, as exceptions."""

    def __init__(self, prog: str, description: str, example: str, **kwargs):
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help shows the arguments)")

    def parse(self, words: list[str]) -> argparse.Namespace:
        """Parses all words; an unknown flag comes with the nearest known one."""
        known, rest = self.parse_known_args(words)
        if rest:
            self.error(f"unknown argument {rest[0]}{nearest(rest[0], self._flags())}")
        return known

    def _flags(self) -> list[str]:
        """All flags, those of sub-commands included."""
        flags = []
        for action in self._actions:
            flags += action.option_strings
            if isinstance(action.choices, dict):
                flags += [flag for inner in action.choices.values() for flag in inner._flags()]
        return flags


def nearest(word: str, known: Iterable[str]) -> str:
    """ ", did you mean X?" if a known word looks like it, else "".

    Flags are also found by their last part: --lr finds --train.lr.
    """
    known = list(known)
    last = word.lstrip("-").rpartition(".")[2].replace("_", "-")
    close = [name for name in known if name.lstrip("-").rpartition(".")[2] == last][:3]
    close = close or difflib.get_close_matches(word, known, n=1)
    return f", did you mean {' or '.join(close)}?" if close else ""


def printable(text: str) -> str:
    """Text from pages, models and data for a terminal: one line, no control characters.

    Escape sequences could otherwise move the cursor, set the title or colour what follows.
    """
    return "".join(c if c.isprintable() else " " for c in text)
