"""LoRA adapters in PEFT's format: a folder of adapter_config.json and adapter_model.safetensors.

`peft` puts the folder on top of transformers' Qwen2_5_VLForConditionalGeneration. Tensors are named
after the module in memory (transformers 5): `base_model.model.model.language_model.layers.0
.self_attn.q_proj.lora_A.weight`, shape (rank, in), and `.lora_B.weight`, shape (out, rank). Older
transformers had other prefixes; `load` knows both.
"""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmsr_jax.model import lora as lora_lib
from mmsr_jax.model import qwen2_5_vl
from mmsr_jax.model.config import ModelConfig
from mmsr_jax.model.lora import LoRAConfig, Module
from mmsr_jax.weights.hf_names import canonical

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MOST_RANK = 2**16  # more than any matrix has
KINDS = {lora_lib.A: "lora_A", lora_lib.B: "lora_B"}

# What an adapter may be beyond plain LoRA, with the value that means "it is not".
_PLAIN = {
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
# Younger ones, which older programs do not know: read, not written.
_YOUNGER = dict.fromkeys(
    (
        "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication",
        "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
        "velora_config", "monteclora_config",
    )
)  # fmt: skip

# First values that leave the weights beneath as they are. Others (PiSSA, OLoRA, CorDA, LoftQ) take
# something out of them, and `peft` does so anew whenever it loads such an adapter.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def save(
    params: dict,
    config: ModelConfig,
    lora: LoRAConfig,
    folder: pathlib.Path | str,
    *,
    base_name: str = "",
    dtype: str = "float32",
) -> None:
    """Writes an adapter folder.

    Args:
        params: an adapter, or base and adapter joined; arrays that this process can read whole.
        base_name: folder or hub id of the model beneath, for PEFT's `base_model_name_or_path`.
        dtype: of the tensors on disk.

    Raises:
        ValueError: the adapter is not the one of `config` and `lora`; a folder in the way.
    """
    adapter = lora_lib.split(params)[1]
    chosen = lora_lib.targeted(config, lora)
    shapes = _shapes(config, lora)
    found = jax.tree.map(lambda leaf: leaf.shape, adapter)
    wanted = jax.tree.map(lambda leaf: leaf.shape, shapes)
    if found != wanted:
        raise ValueError(f"the adapter is {found}, rank and targets of the config say {wanted}")
    tensors = {}
    for module in chosen:
        for kind, published in KINDS.items():
            array = np.asarray(_at(adapter, module.path)[kind])
            for layer, name in enumerate(module.names):
                own = array[layer] if module.stacked else array
                matrix = _to_torch(own, kind, lora.rank).astype(jnp.dtype(dtype))
                tensors[f"{PREFIX}{name}.{published}.weight"] = np.ascontiguousarray(matrix)
    folder = pathlib.Path(folder)
    check_target(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Each file is whole or not there; an adapter without its config is none.
    (folder / CONFIG).unlink(missing_ok=True)
    partial = folder / f"{TENSORS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps(_peft_config(chosen, lora, base_name), indent=2) + "\n")


def check_target(folder: pathlib.Path) -> None:
    """Whether an adapter may be written to `folder`.

    Beside a whole model transformers would put the adapter on top of it, a second time if it is
    merged in already.

    Raises:
        ValueError: a file, or a folder with anything in it but an adapter.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; an adapter is a folder")
    own = {CONFIG, TENSORS, f"{TENSORS}.partial"}
    if strangers := sorted(path.name for path in folder.iterdir() if path.name not in own):
        raise ValueError(
            f"{folder} is neither empty nor an earlier adapter: it holds "
            f"{', '.join(strangers[:5])}; choose another folder, or delete it"
        )


def _peft_config(chosen: tuple[Module, ...], lora: LoRAConfig, base_name: str) -> dict:
    """adapter_config.json. One expression names the modules: a list would match more of them.

    PEFT matches list entries by their ending, and `gate_proj` ends modules of both towers.
    """
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    names = "|".join(lora_lib.exact(chosen))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or None,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": rf"model\.({names})",
        "init_lora_weights": True,
        "inference_mode": True,
    } | _PLAIN


def load(folder: pathlib.Path | str, config: ModelConfig, *, dtype: str = "float32"):
    """Reads an adapter folder for a model of this config.

    Args:
        dtype: of the adapter's arrays.

    Returns: LoRAConfig and the adapter, a nested dict of host arrays: `lora.join` puts it on the
        base, `jax.device_put` on a mesh.

    Raises:
        ValueError: no adapter folder, something that plain LoRA has not, or tensors missing,
            unexpected or of another shape, all named in one message.
    """
    folder = pathlib.Path(folder)
    settings = _settings(folder)
    rank = settings["r"]
    try:
        with safe_open(folder / TENSORS, framework="numpy") as file:
            keys = file.keys()
            tensors = {_known(key): file.get_tensor(key) for key in keys}
    except (SafetensorError, AttributeError) as error:  # the second: numbers numpy does not know
        raise ValueError(f"{folder / TENSORS} is damaged or quantised: {error}") from None
    if len(tensors) < len(keys):
        raise ValueError(f"{folder / TENSORS} holds the same tensor under two names")
    every = lora_lib.modules(config, vision=True)
    chosen = tuple(m for m in every if any(_key(n, k) in tensors for n in m.names for k in KINDS))
    vision = any(m.path[0] == "vision" for m in chosen)
    if not chosen:
        raise ValueError(f"{folder} adapts no module of this model")
    lora = LoRAConfig(
        rank=rank,
        alpha=settings["lora_alpha"],
        targets=lora_lib.exact(chosen),
        vision=vision,
        param_dtype=dtype,
    )
    shapes, adapter, problems, used = _shapes(config, lora), {}, [], set()
    for module in chosen:
        node = adapter
        for name in module.path:
            node = node.setdefault(name, {})
        for kind in KINDS:
            target = _at(shapes, module.path)[kind]
            shape = target.shape[1:] if module.stacked else target.shape
            layers = []
            for key in (_key(name, kind) for name in module.names):
                used.add(key)
                matrix = tensors.get(key)
                size = _matrix(shape, kind, rank)
                if matrix is None:
                    problems.append(f"missing {key}")
                elif matrix.shape != size:
                    problems.append(f"misshaped {key}: {matrix.shape}, the model wants {size}")
                else:
                    layers.append(matrix.T.reshape(shape).astype(target.dtype))
            if len(layers) == len(module.names):
                node[kind] = np.stack(layers) if module.stacked else layers[0]
    problems += [f"unexpected {key}" for key in tensors.keys() - used]
    if problems:
        raise ValueError(f"{folder} does not fit the model:\n  " + "\n  ".join(sorted(problems)))
    return lora, adapter


def _settings(folder: pathlib.Path) -> dict:
    if not (folder / CONFIG).is_file() or not (folder / TENSORS).is_file():
        raise ValueError(f"{folder} is no PEFT adapter: it needs {CONFIG} and {TENSORS}")
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} is no JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / CONFIG} is no JSON object")
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is an adapter of type {settings.get('peft_type')}, not LORA")
    for name, plain in (_PLAIN | _YOUNGER).items():
        if (settings.get(name) or plain) != plain:
            raise ValueError(f"{folder}: {name} = {settings[name]!r} is not supported")
    start = settings.get("init_lora_weights", True)
    if start not in _STARTS:
        raise ValueError(
            f"{folder}: init_lora_weights = {start!r} changes the weights beneath, which is not "
            "supported: convert it to a plain adapter when saving (path_initial_model_for_weight_"
            "conversion), or merge it with peft"
        )
    if missing := [name for name in ("r", "lora_alpha") if name not in settings]:
        raise ValueError(f"{folder / CONFIG} lacks {', '.join(missing)}")
    rank, alpha = settings["r"], settings["lora_alpha"]
    if type(rank) is not int or not 0 < rank <= MOST_RANK:
        raise ValueError(f"{folder / CONFIG}: r is {rank!r}, from 1 to {MOST_RANK} is needed")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise ValueError(f"{folder / CONFIG}: lora_alpha is {alpha!r}, above 0 is needed")
    return settings


def _known(key: str) -> str:
    """A tensor's name without what the versions of transformers do not share."""
    return canonical(key.removeprefix(PREFIX))


def _key(name: str, kind: str) -> str:
    return canonical(f"{name}.{KINDS[kind]}.weight")


def _shapes(config: ModelConfig, lora: LoRAConfig) -> dict:
    return lora_lib.split(qwen2_5_vl.abstract(config, lora=lora)[1])[1]


def _matrix(shape: tuple[int, ...], kind: str, rank: int) -> tuple[int, int]:
    """Shape of torch's matrix, (out, in), for one of ours."""
    wide = math.prod(shape) // rank
    return (rank, wide) if kind == lora_lib.A else (wide, rank)


def _to_torch(array: np.ndarray, kind: str, rank: int) -> np.ndarray:
    return array.reshape(_matrix(array.shape, kind, rank)[::-1]).T


def _at(tree: dict, path: lora_lib.Path) -> dict:
    for name in path:
        tree = tree[name]
    return tree
