"""The safetensors files of a folder: found, checked, read piece by piece, written one by one.

A tensor is mapped only while something is copied out of it, so that no page of a file stays in
memory, and it is written as soon as it is made: neither way is a whole file ever held.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from mmsr_jax.weights.hub import INDEX, SINGLE

DTYPES = {"F32": np.float32, "BF16": jnp.bfloat16, "F16": np.float16, "F64": np.float64}
_SLAB = 1 << 18  # bytes of a file that a transposing copy takes at a time: they fit the cache


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor lies."""

    file: pathlib.Path
    name: str  # in the file
    code: str  # of its dtype, as the file says
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    def map(self) -> np.ndarray:
        """The tensor in the file, read as it is used; let go of it to let go of its memory."""
        dtype = np.dtype(DTYPES[self.code])
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        return np.memmap(self.file, dtype, "r", self.offset, self.shape)


def find(folder: pathlib.Path) -> list[pathlib.Path]:
    """The weight files of a folder: a single one where there is one, as transformers takes them.

    Raises:
        ValueError: none, or an index that is broken or names a file that is not there.
    """
    # First: an index beside it is of an older save, whose shards may still be there.
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {others[0]} and its like are not read: save as safetensors" if others else ""
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(name != pathlib.PurePath(name).name for name in names):
            raise ValueError("a file outside the folder is named")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is broken ({type(error).__name__}: {error})") from None
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"{index} names {', '.join(absent)}, which {folder} does not hold: "
            "copy or download what is missing"
        )
    return [folder / name for name in names]


def tensors(file: pathlib.Path) -> list[Stored]:
    """What a safetensors file holds.

    Raises:
        ValueError: a truncated file, or none of this kind.
    """
    header, data = _header(file)
    return [
        Stored(file, name, entry["dtype"], tuple(entry["shape"]), data + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    ]


def metadata(file: pathlib.Path) -> dict[str, str]:
    """The words that a safetensors file carries beside its tensors."""
    return _header(file)[0].get("__metadata__") or {}


def _header(file: pathlib.Path) -> tuple[dict, int]:
    """A file's header, and where the data behind it begin."""
    try:
        with safe_open(file, framework="numpy"):  # checks header, offsets, and the file's length
            pass
    except Exception as error:
        raise ValueError(
            f"{file} is truncated or no safetensors file ({file.stat().st_size} bytes; {error}): "
            "copy or download it again"
        ) from None
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(size)), 8 + size


def copy(target: np.ndarray, source: np.ndarray, strides: tuple[int, ...]) -> None:
    """`target[...] = source`, in slabs along the slowest axis of the one in the file.

    A kernel is stored transposed: copied whole, it would be read (or written) one cache line a
    number. Numbers of one dtype are moved as integers, which numpy does fastest.

    Args:
        strides: of `target` or `source`, whichever is laid out as the file is.
    """
    if target.dtype == source.dtype and target.dtype.itemsize == 2:
        target, source = target.view(np.uint16), source.view(np.uint16)
    axis = int(np.argmax(strides))
    step = max(1, _SLAB // strides[axis])
    for at in range(0, target.shape[axis], step):
        here = (slice(None),) * axis + (slice(at, at + step),)
        target[here] = source[here]


def write(
    file: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    code: str,
    made: Iterable[np.ndarray],
    words: Mapping[str, str],
) -> None:
    """A safetensors file, tensor by tensor.

    Args:
        shapes: of all tensors, in the order in which they come.
        code: their dtype, a key of DTYPES.
        made: the tensors (contiguous), each taken when the one before it is written.
        words: the file's metadata.
    """
    dtype = np.dtype(DTYPES[code])
    header: dict = {"__metadata__": dict(words)}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + dtype.itemsize * int(np.prod(shape))
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for shape, tensor in zip(shapes.values(), made, strict=True):
            if tensor.shape != tuple(shape) or tensor.dtype != dtype:
                raise ValueError(f"a tensor of {tensor.dtype} {tensor.shape} for {code} {shape}")
            out.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
        out.flush()
        os.fsync(out.fileno())
