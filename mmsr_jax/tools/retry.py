"""How long to wait before another try."""

import datetime
import email.utils
import math
import random
import re
import time

_SECONDS = re.compile(r"\d+(\.\d*)?")


class Pauses:
    """Exponential backoff with full jitter: callers that failed together do not return together."""

    def __init__(self, first: float, longest: float, rng: random.Random):
        self._first, self._longest, self._rng = first, longest, rng

    def draw(self, tries: int) -> float:
        """Seconds to wait after `tries` + 1 failures."""
        most = min(self._longest, self._first * 2.0 ** min(tries, 60))
        return self._rng.uniform(0.0, most)


def retry_after(header: str | None, date: str | None = None) -> float | None:
    """Seconds that a Retry-After header asks for; None without one that can be read.

    Args:
        header: seconds, or an HTTP date.
        date: the response's Date header, so that two clocks that disagree do no harm; without it
            a date is compared with our own clock.
    """
    if header is None:
        return None
    header = header.strip()
    if header.isascii() and _SECONDS.fullmatch(header):
        return float(header) if len(header) < 20 else math.inf
    until = _moment(header)
    if until is None:
        return None
    now = _moment(date) if date else None
    return max(0.0, until - (time.time() if now is None else now))


def _moment(text: str) -> float | None:
    try:
        when = email.utils.parsedate_to_datetime(text)
        if when.tzinfo is None:  # "-0000"
            when = when.replace(tzinfo=datetime.UTC)
        return when.timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
