"""`mmsr`: finds the command, runs it, and turns every way it can end into an exit code.

0    done
1    failed in work already begun: what was saved stays, the traceback is kept
2    a user's mistake: one line that names the thing and the cure
130  stopped by Ctrl-C
"""

import importlib
import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

from mmsr_jax import __version__
from mmsr_jax.cli.endings import WorkFailed, is_mistake, one_line
from mmsr_jax.cli.words import nearest, printable

COMMANDS = {
    "train": "run the stages of an experiment; the same command continues a stopped run",
    "eval": "accuracy and search ratio of a trained policy, as a table",
    "export": "write a run's newest weights as a Hugging Face folder",
    "view": "write report.html: curves, tables, trajectories with pictures",
    "data": "prepare a dataset, look at one, or write its search engine's pages",
    "search": "use the search tools from the shell",
    "bench": "measure speed beside what it is compared with",
}

HELP = f"""usage: mmsr COMMAND ...

Teach a vision-language model when to search, what to search for, and how to use it.

commands:
{"".join(f"  {name:8}{text}{chr(10)}" for name, text in COMMANDS.items())}
  mmsr COMMAND --help   a command's arguments, and an example
  mmsr COMMAND --debug  the traceback too when something goes wrong
  mmsr --version

example:
  mmsr train configs/flags.py
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. Without `arguments`, those of the shell."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    name = words[0] if words else ""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show ends no run
            stream.reconfigure(errors="replace")
    try:
        if name in ("", "-h", "--help", "help"):
            print(HELP, end="")
            return 0 if name else 2
        if name == "--version":
            print(f"mmsr {__version__}")
            return 0
        if name not in COMMANDS:
            raise ValueError(f"there is no command {name!r}{nearest(name, COMMANDS)}; see mmsr -h")
        from mmsr_jax import logs  # rich takes a while: not for --help

        logs.show_log(debug)
        importlib.import_module(f"mmsr_jax.cli.{name}").run(words[1:])
        return 0
    except SystemExit as stop:  # --help of a command
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        again = f"; the same command continues: mmsr {shlex.join(words)}" if name == "train" else ""
        print(f"\nmmsr {name}: stopped{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has gone: nothing to say, and no way to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        prefix = f"mmsr {name}".strip() if name in COMMANDS else "mmsr"
        # Printable: a stranger's file may be what the error is about.
        print(printable(f"{prefix}: {_explain(error, debug)}"), file=sys.stderr)
        return 2 if is_mistake(error) else 1


def _explain(error: Exception, debug: bool) -> str:
    if isinstance(error, WorkFailed):
        return str(error)
    if is_mistake(error):
        return one_line(error)
    where = "" if debug else " (--debug shows where)"
    return f"failed: {type(error).__name__}: {one_line(error)}{where}"


if __name__ == "__main__":
    sys.exit(main())
