"""When searching makes no sense any more: every process of a run stops, at the same place."""

import jax
from jax.experimental import multihost_utils

from mmsr_jax.build import Job
from mmsr_jax.tools.budget import SearchStopped


def check_search(job: Job) -> None:
    """Raises SearchStopped in every process when one of them has to stop.

    With several processes all of them have to call it: who raised alone would leave the others
    waiting for it in the next computation that they do together, or save half a checkpoint.
    """
    stopped = None
    try:
        job.search.check()
    except SearchStopped as error:
        stopped = error
    if jax.process_count() > 1:
        flags = multihost_utils.process_allgather(stopped is not None).tolist()
        if stopped is None and True in flags:
            stopped = SearchStopped(
                f"process {flags.index(True)} of this run cannot search any more, its output says "
                "why"
            )
    if stopped is not None:
        raise stopped


def check_search_between(job: Job) -> None:
    """As `check_search`, where processes do not meet: with several of them it does nothing."""
    if jax.process_count() == 1:
        job.search.check()
