"""The file in which a checkpoint says how its model wants pictures.

transformers 5 writes the settings of all processors into processor_config.json, older versions
those of pictures into preprocessor_config.json. Where both are there, transformers 5 reads the
first; so does this.
"""

import json
import pathlib
from typing import Any


def read(folder: pathlib.Path) -> tuple[dict[str, Any], pathlib.Path]:
    """The settings, and the file that they are in.

    Raises:
        ValueError: no such file, or one that holds no settings.
    """
    for name, part in (
        ("processor_config.json", "image_processor"),
        ("preprocessor_config.json", ""),
    ):
        path = folder / name
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None
        values = values.get(part) if part and isinstance(values, dict) else values
        if isinstance(values, dict):
            return values, path
        if not part:
            raise ValueError(f"{path} holds no object")
    raise ValueError(
        f"{folder} holds no preprocessor_config.json: how its model wants pictures is not known"
    )
