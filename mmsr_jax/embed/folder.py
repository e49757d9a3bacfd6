"""An index folder, opened with the embedder that its manifest names."""

import pathlib

from mmsr_jax.embed import choose
from mmsr_jax.tools.index import manifest as manifests
from mmsr_jax.tools.index.open import FolderConfig, LocalIndex, open_index


def open_folder(config: FolderConfig, setting: str = "tools.index.weights") -> LocalIndex:
    """Opens the index that `config` names.

    Args:
      setting: what the user says `config.weights` with; messages name it.

    Raises:
      ValueError: no folder, no index there, a damaged one, or weights of its pictures' model
        that cannot be had without the user's word.
    """
    folder, weights = config.folder, config.weights
    if not folder:
        raise ValueError(
            "tools.backend 'index' searches the index in tools.index.folder, which names none: "
            "make one with `mmsr search index SOURCE OUT`, and give its folder"
        )
    part = manifests.read(pathlib.Path(folder)).pictures
    named = "" if part is None else part.weights
    # An index may come from anywhere; what is fetched from a hub is for the user to say.
    if named and not weights and not pathlib.Path(named).is_dir():
        raise ValueError(
            f"there is no folder {named!r}, from which the pictures of {folder} were embedded by "
            f"{part.embedder!r}: {setting} says where they are now (a folder, or a hub id)"
        )
    try:
        made = None if part is None else choose.embedder(part.embedder, weights or part.weights)
    except ValueError as error:
        raise ValueError(
            f"{error}; the pictures of {folder} were embedded by {part.embedder!r} from "
            f"{part.weights or 'no weights'!r}: {setting} says where they are now"
        ) from error
    return open_index(folder, made)
