"""How many programs XLA has compiled: a count that must stop rising once a run is warm."""

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"
_seen = {"count": 0, "seconds": 0.0}


def _listen(event: str, duration: float, **_) -> None:
    if event == _EVENT:
        _seen["count"] += 1
        _seen["seconds"] += duration


jax.monitoring.register_event_duration_secs_listener(_listen)


def count() -> int:
    """Programs compiled since this file was imported."""
    return _seen["count"]


def seconds() -> float:
    """Seconds spent on it."""
    return _seen["seconds"]
