"""A trajectory as one JSON object: what `trajectories/STEP.jsonl` holds and the page shows."""

import base64
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from mmsr_jax.tools.decoders import web_formats
from mmsr_jax.types import Author, ToolResult, Trajectory, Turn

MAX_SIDE = 256  # pixels; a page needs no more, and a step can have hundreds of trajectories


def trajectory_record(trajectory: Trajectory, reward: Mapping[str, Any]) -> dict[str, Any]:
    """The trajectory for people to read; its tokens stay out.

    `reward` holds the parts of the score: `{"total": 0.91, "correct": True, "format": True,
    "searches": 1}`. Pictures are base64 of PNG, at most 256 pixels a side; one that cannot be
    decoded becomes "".
    """
    example = trajectory.example
    return {
        "example": example.id,
        "sample": trajectory.sample,
        "question": example.question,
        "answers": list(example.answers),
        "category": example.category,
        "entity": example.entity,
        "image": _png(example.image),
        "turns": [_turn(turn) for turn in trajectory.turns],
        "ending": str(trajectory.ending),
        "reward": dict(reward),
        "tokens": len(trajectory.tokens),
        "seconds": trajectory.seconds,
        "tool_seconds": trajectory.tool_seconds,
    }


def result_record(result: ToolResult) -> dict[str, Any]:
    """What a tool answered, with thumbnails as base64 of PNG."""
    items = [
        {
            "title": item.title,
            "link": item.link,
            "text": item.text,
            "thumbnail": _png(item.thumbnail) if item.thumbnail else None,
        }
        for item in result.items
    ]
    return {"tool": result.tool, "items": items, "error": result.error, "seconds": result.seconds}


def _turn(turn: Turn) -> dict[str, Any]:
    record: dict[str, Any] = {"author": Author(turn.author).name.lower(), "text": turn.text}
    if turn.call is not None:
        record["call"] = {"tool": turn.call.tool, "query": turn.call.query}
    if turn.result is not None:
        record["result"] = result_record(turn.result)
    return record


def _png(picture: bytes) -> str:
    file = io.BytesIO()
    try:
        # Some of Pillow's other decoders start programs, and an index may be a stranger's.
        image = Image.open(io.BytesIO(picture), formats=web_formats())
        small = max(image.size) <= MAX_SIDE
        if small and image.format == "PNG":
            return base64.b64encode(picture).decode()
        if not small:
            image.thumbnail((MAX_SIDE, MAX_SIDE))
        image.convert("RGB").save(file, "PNG")
    except Exception:  # decoders of hostile bytes raise anything
        return ""
    return base64.b64encode(file.getvalue()).decode()
