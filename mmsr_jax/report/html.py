"""`report.html`: one self-contained page of a run, from the files in its folder.

What models and web pages wrote is hostile until shown otherwise: the template escapes every
value, links are shown only if they are http(s), pictures only as inline PNG, and the page forbids
itself scripts and anything from outside.
"""

import base64
import binascii
import collections
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jinja2
from markupsafe import Markup

from mmsr_jax import logs
from mmsr_jax.report import curves, table

SHOWN = 12  # trajectories
TAG = re.compile(r"</?(?:reason|search|img|text_search|answer|information)\s*/?>")


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `report.html` into a run's folder and returns its path.

    Whatever the run has not written yet (summary, trajectories) is left out of the page. Raises
    FileNotFoundError if there is no such folder, ValueError if it holds no run at all.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"there is no folder {workdir}")
    known = [workdir / name for name in ("metrics.jsonl", "summary.json", "config.json")]
    if not any(path.exists() for path in known):
        raise ValueError(f"{workdir} holds no run: none of {', '.join(p.name for p in known)}")
    records = logs.read_metrics(workdir / "metrics.jsonl")
    summary = _read_json(workdir / "summary.json")
    charts = {
        stage: [Markup(curves.draw(panel)) for panel in panels]  # matplotlib escapes texts
        for stage, panels in curves.stages(records).items()
    }
    page = _template().render(
        name=workdir.resolve().name,
        tiles=_tiles(summary),
        layout=table.layout(summary),
        charts=charts,
        steps=_steps(records),
        trajectories=_choose(workdir / "trajectories"),
        config=list(_flat(_read_json(workdir / "config.json"))),
    )
    path = workdir / "report.html"
    draft = workdir / "report.html.draft"
    draft.write_text(page, encoding="utf-8", errors="replace")
    os.replace(draft, path)
    return path


def segments(text: str) -> list[tuple[str, str]]:
    """Cuts a text at the tags of the protocol: `[("text", "so"), ("tag", "<answer>"), ...]`."""
    found, end = [], 0
    for match in TAG.finditer(text):
        found += [("text", text[end : match.start()]), ("tag", match.group())]
        end = match.end()
    found.append(("text", text[end:]))
    return [(kind, piece) for kind, piece in found if piece]


def web_link(link: Any) -> str | None:
    """The link if it leads to the web, else None (`javascript:`, `data:` and the like)."""
    is_web = isinstance(link, str) and re.match(r"https?://[^\s/]", link, re.IGNORECASE)
    return link if is_web else None


def picture_source(data: Any) -> str | None:
    """Base64 of a picture -> a `src` for an `<img>`; None for anything that is not base64.

    The type is always given as PNG: browsers look at the bytes of raster pictures themselves, and
    nothing that is declared as PNG is ever read as SVG.
    """
    if not isinstance(data, str) or not data:
        return None
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        return None
    return "data:image/png;base64," + base64.b64encode(raw).decode()


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, figure, remark) of the figures that say whether the run learned anything."""
    tiles = []
    for label, key in (
        ("accuracy", "accuracy"),
        ("reward", "reward"),
        ("search, known", "known/search_ratio"),
        ("search, unknown", "unknown/search_ratio"),
        ("search, never shown", "never_shown/search_ratio"),
    ):
        after, before = summary.get(f"eval/after/{key}"), summary.get(f"eval/before/{key}")
        if isinstance(after, int | float):
            remark = f"{before:.2f} before" if isinstance(before, int | float) else ""
            tiles.append((label, f"{after:.2f}", remark))
    return tiles


def _steps(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Stage -> last step."""
    last: dict[str, int] = {}
    for record in records:
        last[record["stage"]] = max(record["step"], last.get(record["stage"], 0))
    return last


def _choose(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Cards of a dozen trajectories, the newest steps first, mixed by category and by searching.

    Otherwise a page of a well-trained run could show twelve times the same kind of episode.
    """
    cards: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.jsonl"), key=_age, reverse=True):
        records = _read_lines(path)
        try:
            mixed = _mixed(records)[: SHOWN - len(cards)]
            cards += [_card(path.stem, record) for record in mixed]
        except (AttributeError, TypeError, ValueError) as error:  # JSON, but not what we write
            raise ValueError(f"{path} holds something else than trajectories: {error}") from None
        if len(cards) >= SHOWN:
            break
    return cards


def _age(path: pathlib.Path) -> tuple[bool, int, str]:
    """Numbered steps in their order; named ones (an evaluation) count as newer."""
    number = int(path.stem) if path.stem.isdecimal() else 0
    return not path.stem.isdecimal(), number, path.stem


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    records = []
    # Not splitlines: that also breaks at U+2028 and the like, which texts may hold.
    whole = path.read_bytes().removesuffix(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise ValueError(f"{path}, line {number} is no trajectory") from None
    return records


def _mixed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Round robin over the kinds of episode, and within a kind one of each example first."""
    kinds: dict[tuple, list[dict[str, Any]]] = {}
    seen: collections.Counter = collections.Counter()
    for record in records:
        seen[record.get("example")] += 1
        record_kind = (seen[record.get("example")], record.get("category"), _searched(record))
        kinds.setdefault(record_kind, []).append(record)
    mixed = []
    for round_ in sorted({kind[0] for kind in kinds}):
        queues = [list(group) for kind, group in kinds.items() if kind[0] == round_]
        while any(queues):
            mixed += [queue.pop(0) for queue in queues if queue]
    return mixed


def _searched(record: Mapping[str, Any]) -> bool:
    return any(turn.get("call") for turn in record.get("turns", ()))


def _card(step: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """One trajectory as the template shows it; whatever is missing stays empty."""
    reward = record.get("reward") or {}
    return {
        "step": step,
        "example": record.get("example", ""),
        "question": record.get("question", ""),
        "answers": list(record.get("answers", ())),
        "category": str(record.get("category", "")).replace("_", " "),
        "image": picture_source(record.get("image")),
        "ending": str(record.get("ending", "")).replace("_", " "),
        "right": bool(reward.get("correct")),
        "reward": [(k, _figure(v)) for k, v in reward.items() if k != "correct"],
        "seconds": f"{float(record.get('seconds') or 0.0):.1f} s",
        "turns": [_turn(turn) for turn in record.get("turns", ())],
    }


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    result = turn.get("result") or {}
    return {
        "author": turn.get("author", ""),
        "segments": segments(turn.get("text") or ""),
        "tool": (result or turn.get("call") or {}).get("tool", ""),
        "error": result.get("error"),
        "items": [
            {
                "title": item.get("title", ""),
                "text": item.get("text", ""),
                "link": web_link(item.get("link")),
                "thumbnail": picture_source(item.get("thumbnail")),
            }
            for item in result.get("items", ())
        ],
    }


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """{"a": {"b": 1}} -> ("a.b", "1")."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
