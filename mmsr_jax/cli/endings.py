"""How a command can end badly: by a user's mistake, or by a failure in work already begun."""

import contextlib
import pathlib
import traceback
from collections.abc import Callable, Iterator

PACKAGE = pathlib.Path(__file__).parents[1]
FILE_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


class UsageError(ValueError):
    """What the user wrote cannot be meant. The message is the whole of what is shown."""


class WorkFailed(Exception):
    """Work already begun has failed; the message says where the traceback is kept."""


def is_mistake(error: BaseException) -> bool:
    """Is the error's message meant for the user?

    It is when this package itself raised a ValueError, or a file was not there. A ValueError that
    comes from inside a library is a failure: its message explains nothing to a user.
    """
    if isinstance(error, (UsageError, *FILE_ERRORS)):
        return True
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return False
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return PACKAGE in pathlib.Path(innermost.f_code.co_filename).resolve().parents


def one_line(error: BaseException) -> str:
    """The message without line breaks; files by name, as the user wrote them."""
    if isinstance(error, FILE_ERRORS) and error.filename is not None:
        reason = error.strerror or type(error).__name__
        return f"{error.filename}: {reason[:1].lower()}{reason[1:]}"
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def work(workdir: pathlib.Path, begun: Callable[[], bool]) -> Iterator[None]:
    """Around the work of a run: a failure leaves its traceback in `error.txt`, success clears it.

    Errors that are the user's pass through as they are, as long as `begun()` is false.
    """
    path = workdir / "error.txt"
    try:
        yield
        path.unlink(missing_ok=True)
    except Exception as error:
        if is_mistake(error) and not begun():
            raise
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        said = f"{type(error).__name__}: {one_line(error)}"
        raise WorkFailed(f"failed: {said} (traceback: {path}; what was saved stays)") from error
