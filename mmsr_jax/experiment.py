"""Every room's configuration in one frozen record: what a file in configs/ returns."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Literal

import pydantic

from mmsr_jax.agent.supply import CarryConfig
from mmsr_jax.data.flags.lessons import LessonConfig
from mmsr_jax.data.flags.world import FlagsConfig
from mmsr_jax.engine.engine import EngineConfig
from mmsr_jax.evaluation.policies import EvaluationConfig
from mmsr_jax.inputs.images import ImageConfig
from mmsr_jax.model.config import ModelConfig, preset
from mmsr_jax.model.lora import LoRAConfig
from mmsr_jax.parallel.mesh import MeshConfig
from mmsr_jax.protocol import Protocol
from mmsr_jax.rewards.score import RewardConfig
from mmsr_jax.tools.assembly import Backend, WebConfig
from mmsr_jax.tools.budget import BudgetConfig
from mmsr_jax.tools.index.open import FolderConfig
from mmsr_jax.tools.store import StoreConfig
from mmsr_jax.train.assemble import PackConfig
from mmsr_jax.train.grpo import GRPOConfig
from mmsr_jax.train.sft import SFTConfig
from mmsr_jax.weights.checkpoint import CheckpointConfig

Stage = Literal["sft", "grpo", "eval"]

# What may change while a run is continued: it bears on no result.
FREE = frozenset({"tools.budget.money"})


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer comes from: trained on the world's texts, or a folder or hub id."""

    source: str = "train"
    vocab_size: int = 512  # when trained


@dataclasses.dataclass(frozen=True)
class ToolsConfig:
    """The search tools; docs/search.md explains them.

    `local` is the engine of the embedded world, `index` searches an index folder of your own in the
    process, `web` asks services, `fvqa` takes the picture searches that come with FVQA from the
    store and asks services for texts.
    """

    backend: Backend = "local"
    image_results: int = 5  # results a call (paper: 5 and 5)
    text_results: int = 5
    deadline: float = 30.0  # seconds from a call to its result, waiting for the others included
    max_concurrent: int = 64  # calls that run at the same time
    index: FolderConfig = FolderConfig()
    web: WebConfig = WebConfig()
    store: StoreConfig = StoreConfig()
    budget: BudgetConfig = BudgetConfig()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which questions are trained on."""

    name: Literal["flags"] = "flags"
    folder: str = ""  # of the prepared dataset; empty: in the user's cache
    sft_categories: tuple[str, ...] = ("known", "unfamiliar")
    grpo_categories: tuple[str, ...] = ("known", "unknown")
    grpo_shares: tuple[float, ...] = ()  # of each of them in every step; empty: as they come


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run, whole. Fields are explained in the records themselves."""

    name: str
    seed: int = 0
    stages: tuple[Stage, ...] = ("sft", "grpo", "eval")
    # Folder or hub id of the checkpoint that training starts from; empty: random weights. The
    # sizes are then those of its config.json; of `model` only dtype, param_dtype,
    # remat, attention and cached_attention count.
    weights: str = ""
    model: ModelConfig = preset("tiny")
    lora: LoRAConfig | None = None  # None: all weights are trained
    tokenizer: TokenizerConfig = TokenizerConfig()
    images: ImageConfig = ImageConfig()
    flags: FlagsConfig = FlagsConfig()
    lessons: LessonConfig = LessonConfig()
    data: DataConfig = DataConfig()
    tools: ToolsConfig = ToolsConfig()
    protocol: Protocol = Protocol()
    engine: EngineConfig = EngineConfig()
    carry: CarryConfig = CarryConfig()
    reward: RewardConfig = RewardConfig()
    pack: PackConfig = PackConfig()
    sft: SFTConfig = SFTConfig()
    grpo: GRPOConfig = GRPOConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self):
        self.carry.check(self.grpo.prompts, self.grpo.loss.sampler_correction)

    def to_json(self) -> str:
        """All fields as one JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Experiment":
        """The record of a `config.json`.

        Raises:
          ValueError: not JSON, an unknown field, or a value of the wrong type.
        """
        try:
            return pydantic.TypeAdapter(cls).validate_json(text, extra="forbid")
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"config.json: {where}: {first['msg']}") from None


def read(workdir: pathlib.Path) -> Experiment:
    """The experiment of a run's folder.

    Raises:
      ValueError: no run there, or a `config.json` that is none of ours.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise ValueError(f"{workdir} holds no run (no config.json); mmsr train makes one")
    return Experiment.from_json(path.read_text(encoding="utf-8"))


def save(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Writes `config.json`; a folder that holds another experiment's is refused.

    Settings that bear on no result (`FREE`) may be others than before.

    Raises:
      ValueError: it does, the message names the fields that differ; or its file is damaged.
    """
    path = pathlib.Path(workdir) / "config.json"
    if path.exists():
        try:
            old = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}): choose another --workdir, or delete that folder "
                "to start over"
            ) from None
        with contextlib.suppress(ValueError):  # fields newer than the run have their defaults
            old = json.loads(Experiment.from_json(json.dumps(old)).to_json())
        new = json.loads(experiment.to_json())
        differing = sorted(set(_differences(old, new)) - FREE)
        if differing:
            raise ValueError(
                f"{workdir} holds a run with other settings ({', '.join(differing[:5])}): "
                "choose another --workdir, or delete that folder to start over"
            )
        if old == new:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    draft.write_text(experiment.to_json(), encoding="utf-8")
    draft.replace(path)  # a kill leaves the old one or the new one


@contextlib.contextmanager
def settled(
    experiment: Experiment, workdir: pathlib.Path, begun: Callable[[], bool]
) -> Iterator[None]:
    """Around a run: its settings are saved, and taken back when it fails before work has `begun`.

    Otherwise a mistyped flag would keep the folder from the same command put right. The tokenizer
    goes with them: it was trained for these settings.

    Raises:
      ValueError: as `save`.
    """
    paths = [pathlib.Path(workdir) / name for name in ("config.json", "tokenizer")]
    made = [path for path in paths if not path.exists()]
    save(experiment, workdir)
    try:
        yield
    except BaseException:
        if paths[0] in made and not begun():
            paths[0].unlink()
            if paths[1] in made:
                shutil.rmtree(paths[1], ignore_errors=True)
        raise


def check_weights(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Whether the weights in a run's folder are those of this experiment.

    How they are computed with (dtype, remat, attention), sampled, asked and judged may differ.

    Raises:
      ValueError: the run's sizes, tokenizer, starting weights or adapter are others; the message
        names the fields.
    """
    run = read(workdir)
    free = {"model.dtype", "model.param_dtype", "model.remat", "model.attention"}
    free |= {"model.unsampled_ids", "model.sampled_vocab"}  # the tokenizer's
    # The base of an adapter on random weights is made again from the seed.
    seed = ("seed",) if run.lora is not None and not run.weights else ()
    free |= {"model.cached_attention"}
    old, new = json.loads(run.to_json()), json.loads(experiment.to_json())
    differing = {
        where
        for name in ("weights", "model", "tokenizer", "lora", *seed)
        for where in _differences(old[name], new[name], name)
    } - free
    if differing:
        raise ValueError(
            f"the weights in {workdir} are of a run with other settings "
            f"({', '.join(sorted(differing)[:5])}): give the same flags as in training"
        )


def _differences(old, new, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for key in old.keys() | new.keys():
            name = f"{where}.{key}" if where else key
            out += _differences(old.get(key), new.get(key), name)
        return out
    return [] if old == new else [where]
