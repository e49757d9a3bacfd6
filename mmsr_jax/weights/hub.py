"""Checkpoints by name: a folder here, or a repository of the Hugging Face hub."""

import contextlib
import json
import pathlib
import re

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
# Files that go with the weights and do not change with them.
CARRIED = (
    *TOKENIZER,
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
WEIGHTS = (CONFIG, INDEX, "*.safetensors")

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(
    source: pathlib.Path | str,
    *,
    patterns: tuple[str, ...] = WEIGHTS + CARRIED,
    revision: str | None = None,
) -> pathlib.Path:
    """The folder that `source` stands for.

    A repository that lies whole in the local cache is taken from there without asking anybody;
    else what `patterns` name is downloaded (unless HF_HUB_OFFLINE is set).

    Args:
        source: a folder, or a hub id such as "Qwen/Qwen2.5-VL-3B-Instruct".
        patterns: files needed, as shell patterns.
        revision: branch, tag or commit of the repository; None is its main branch.

    Raises:
        ValueError: neither a folder nor to be had from the hub; the message says what to do.
    """
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{source} is a file; a folder or a hub id is needed")
    if not _ID.fullmatch(str(source)):
        raise ValueError(f"there is no folder {source}")
    import huggingface_hub  # only here: it takes as long to import as the rest
    from huggingface_hub import constants

    fetch = {"repo_id": str(source), "revision": revision, "allow_patterns": list(patterns)}
    with contextlib.suppress(Exception):  # not there, or only in part
        cached = pathlib.Path(huggingface_hub.snapshot_download(**fetch, local_files_only=True))
        if _whole(cached, patterns):
            return cached
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(**fetch))
    except Exception as error:  # of the network, the hub, the disk: its classes are many
        reason = str(error).strip().splitlines()
        at = f" --revision {revision}" if revision else ""
        raise ValueError(
            f"{source} is no folder here, is not (whole) in the Hugging Face cache "
            f"{constants.HF_HUB_CACHE}, and cannot be downloaded "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Give a "
            f"folder, or fetch it where there is a network: hf download {source}{at}"
        ) from error


def _whole(folder: pathlib.Path, patterns: tuple[str, ...]) -> bool:
    """Whether a cached snapshot holds what `patterns` ask for; an interrupted download does not."""
    if CONFIG not in patterns:
        return (folder / TOKENIZER[0]).is_file()
    if not (folder / CONFIG).is_file():
        return False
    if (folder / SINGLE).is_file():
        return True
    if not (folder / INDEX).is_file():
        return False
    named = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    return all((folder / name).is_file() for name in named)
