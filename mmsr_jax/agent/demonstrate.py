"""Demonstrations for SFT: scripted responses played through the real episode and the real tools.

The conversation that comes out has the same tokens, results and pictures as one that the policy
would have produced itself; only the model's words are given.
"""

import numpy as np

from mmsr_jax.agent import episode as episode_lib
from mmsr_jax.agent.episode import Setting
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.types import Lesson, Tokens


def demonstrate(lesson: Lesson, setting: Setting, toolbox: Toolbox | None) -> Tokens:
    """Plays a lesson and returns its conversation, up to the teacher's last response.

    Raises:
      ValueError: the episode ends before the script does, the lesson needs a tool that is not
        there, or it says more than a policy could.
    """
    episode = episode_lib.start(lesson.example, 0, setting, lesson.forced)
    tokenizer = setting.tokenizer
    for round_, response in enumerate(lesson.responses):
        said = response if round_ else response.removeprefix(lesson.forced)
        if not round_ and len(said) + len(lesson.forced) != len(response):
            raise ValueError(f"lesson {lesson.example.id} does not start with {lesson.forced!r}")
        ids = np.asarray([*tokenizer.encode(said), tokenizer.im_end], np.int32)
        if ids.size > (room := episode_lib.budget(episode, setting)):
            raise ValueError(
                f"lesson {lesson.example.id}: a response of {ids.size} tokens, room for {room}"
            )
        episode, call = episode_lib.said(
            episode, ids, np.zeros(ids.size, np.float32), True, setting
        )
        if round_ + 1 == len(lesson.responses):
            break  # nobody reads what the last call would bring
        if call is None:
            raise ValueError(f"lesson {lesson.example.id} ends early: {episode.ending}")
        if round_ < len(lesson.results):
            result = lesson.results[round_]
        elif toolbox is not None:
            result = toolbox.submit(call).result()
        else:
            raise ValueError(f"lesson {lesson.example.id} calls {call.tool}, no tools are given")
        episode, piece = episode_lib.answered(episode, result, setting)
        if piece is None:
            raise ValueError(
                f"lesson {lesson.example.id} does not fit in {setting.max_tokens} tokens"
            )
    return episode.tokens
