"""From an Experiment to live objects: the one place where rooms are wired together."""

import dataclasses
import functools
import logging
import math
import pathlib

import jax
import numpy as np

from mmsr_jax.agent.demonstrate import demonstrate
from mmsr_jax.agent.episode import Setting
from mmsr_jax.data import pipeline
from mmsr_jax.data.flags.lessons import lessons
from mmsr_jax.data.flags.search import flags_tools
from mmsr_jax.data.flags.world import World
from mmsr_jax.embed.folder import open_folder
from mmsr_jax.engine.engine import Engine
from mmsr_jax.experiment import Experiment
from mmsr_jax.inputs import tokenizer as tokenizer_lib
from mmsr_jax.model import lora as lora_lib
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model.config import ModelConfig
from mmsr_jax.parallel.mesh import MeshConfig, make_mesh
from mmsr_jax.parallel.relayout import relayout
from mmsr_jax.parallel.rules import ROLLOUT_RULES, TRAIN_RULES
from mmsr_jax.tools.assembly import Search, assemble
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.train import state as state_lib
from mmsr_jax.train.update import Fixed
from mmsr_jax.types import Example, Tokens
from mmsr_jax.weights import hf, hf_config, hub
from mmsr_jax.weights.checkpoint import Checkpoints

log = logging.getLogger(__name__)


class Job:
    """The live objects of one run, each made when it is first asked for."""

    def __init__(self, experiment: Experiment, workdir: pathlib.Path):
        self.experiment = experiment
        self.workdir = pathlib.Path(workdir)
        self.skipped = 0  # bad examples met so far

    @functools.cached_property
    def world(self) -> World:
        return World(self.experiment.flags)

    @functools.cached_property
    def tokenizer(self) -> tokenizer_lib.Tokenizer:
        """Loaded, or trained on the world's texts and kept in the run's folder.

        Raises:
          ValueError: none to be had, or weights without the tokenizer that they were trained with.
        """
        config, kept = self.experiment.tokenizer, self.workdir / "tokenizer"
        if (folder := self.tokenizer_folder) is not None:
            return tokenizer_lib.load(folder)
        if self.experiment.weights:
            raise ValueError(
                f"weights {self.experiment.weights} know their own tokenizer only, but "
                "tokenizer.source is 'train': set tokenizer.source to the same folder or hub id"
            )
        if not (kept / "tokenizer.json").exists():
            trained = tokenizer_lib.train(self._texts(), config.vocab_size)
            trained.save(kept)
        return tokenizer_lib.load(kept)

    @functools.cached_property
    def tokenizer_folder(self) -> pathlib.Path | None:
        """Where `tokenizer.source` lies, a hub id resolved; None when the run trains its own."""
        source = self.experiment.tokenizer.source
        if source == "train":
            return None
        if pathlib.Path(source).is_file():  # a tokenizer.json itself
            return pathlib.Path(source)
        return hub.resolve(source, patterns=hub.TOKENIZER)

    def _texts(self) -> list[str]:
        """What the tokenizer of the embedded world learns its merges from."""
        texts = [s for a in self.world.articles() for s in (a.title, *a.sentences)]
        first = {e.entity: e for e in self.examples("train", self.experiment.data.sft_categories)}
        few = dataclasses.replace(self.experiment.lessons, drills=1000, echoes=0)
        protocol = self.experiment.protocol
        for lesson in lessons(self.world, list(first.values()), few):
            texts += [f"user\n{lesson.example.question}"]
            texts += [f"assistant\n{response}" for response in lesson.responses]
            for result in lesson.results:
                message = protocol.result_message(result, lesson.example.question)
                texts += [f"user\n{part}" for part in message.parts if isinstance(part, str)]
        return texts

    @functools.cached_property
    def model(self) -> ModelConfig:
        """The sizes of `weights`, or else the config's, with the tokenizer's ids.

        How it computes (dtype, param_dtype, remat, attention) is the experiment's in either case.

        Raises:
          ValueError: a tokenizer that does not belong to the model.
        """
        t, model = self.tokenizer, self.experiment.model
        if self.weights is not None:
            model = self._published(model)
        if t.vocab_size > model.text.vocab_size:
            raise ValueError(
                f"the tokenizer has {t.vocab_size} ids, model.text.vocab_size is only "
                f"{model.text.vocab_size}"
            )
        return dataclasses.replace(
            model,
            image_token_id=t.image_pad,
            video_token_id=t.special("<|video_pad|>"),
            vision_start_token_id=t.vision_start,
            vision_end_token_id=t.vision_end,
            eos_token_id=t.im_end,
            bos_token_id=t.pad_id,
            unsampled_ids=t.structural_ids,
            sampled_vocab=t.vocab_size,
        )

    @functools.cached_property
    def weights(self) -> pathlib.Path | None:
        """The checkpoint that training starts from, a hub id resolved; None for random weights."""
        return hub.resolve(self.experiment.weights) if self.experiment.weights else None

    def _published(self, asked: ModelConfig) -> ModelConfig:
        found, t = hf_config.read(self.weights), self.tokenizer
        for name, theirs, ours in (
            ("<|image_pad|>", found.image_token_id, t.image_pad),
            ("<|vision_start|>", found.vision_start_token_id, t.vision_start),
            ("<|im_end|>", found.eos_token_id, t.im_end),
        ):
            if theirs != ours:
                raise ValueError(
                    f"{name} is {theirs} in weights {self.experiment.weights}, but {ours} in the "
                    f"tokenizer of {self.experiment.tokenizer.source}: set tokenizer.source to "
                    "the one that belongs to the weights"
                )
        return dataclasses.replace(
            found, dtype=asked.dtype, param_dtype=asked.param_dtype, remat=asked.remat,
            attention=asked.attention, cached_attention=asked.cached_attention,
        )  # fmt: skip

    @functools.cached_property
    def mesh(self):
        """The training mesh; None on a single device, where a mesh has nothing to say."""
        mesh = make_mesh(self.experiment.mesh)
        return None if mesh.size == 1 else mesh

    @functools.cached_property
    def rollout_mesh(self):
        """Where this host samples: the training mesh, or its own devices of one over many hosts."""
        if self.mesh is None or jax.process_count() == 1:
            return self.mesh
        own = [d for d in self.mesh.devices.flat if d.process_index == jax.process_index()]
        # Heads that training splits over more devices than a host has, are split over all it has.
        return make_mesh(MeshConfig(tensor=math.gcd(self.mesh.shape["tensor"], len(own))), own)

    @functools.cached_property
    def _training(self):
        """Graph and shapes of all weights, with LoRA the adapter's among them."""
        return qwen.abstract(self.model, self.mesh, TRAIN_RULES, self.experiment.lora)

    @property
    def graph(self):
        return self._training[0]

    @functools.cached_property
    def _rollout(self):
        return qwen.abstract(self.model, self.rollout_mesh, ROLLOUT_RULES, self.experiment.lora)

    def fresh_params(self):
        """Where training starts: `weights`, or random ones; laid out over the training mesh."""
        if self.weights is not None:
            return hf.load(self.weights, mesh=self.mesh, config=self.model).params
        return qwen.init(self.model, jax.random.key(self.experiment.seed), self.mesh, TRAIN_RULES)

    @functools.cached_property
    def base(self):
        """The frozen weights that LoRA's adapter stands on; None when all weights are trained."""
        return None if self.experiment.lora is None else self.fresh_params()

    def start(self):
        """What training starts from: all weights, or with LoRA a fresh adapter.

        This, and nothing else, is what the stages hand on, update and checkpoint.
        """
        if self.experiment.lora is None:
            return self.fresh_params()
        key = jax.random.fold_in(jax.random.key(self.experiment.seed), 1)  # not the base's own
        return lora_lib.init(lora_lib.split(self._training[1])[1], key)

    def whole(self, params):
        """All weights, given what is trained. Nothing is copied."""
        return state_lib.whole(params, self.base)

    def merged(self, params, dtype: str | None = None):
        """All weights as a model without adapters, merged kernels in `dtype`: a full export."""
        lora = self.experiment.lora
        return params if lora is None else lora_lib.merge(self.whole(params), lora, dtype)

    def fixed(self, transform) -> Fixed:
        """What the updates of a stage share."""
        plain = None
        if self._reference_is_base:
            plain = qwen.abstract(self.model, self.mesh, TRAIN_RULES)[0]
        return Fixed(self.graph, self.model, self.experiment.pack, transform, self.base, plain)

    def reference(self, params):
        """The policy at `params`, to be kept as the KL reference while `params` are trained."""
        if self._reference_is_base:
            return self.base
        return self.whole(jax.tree.map(lambda p: p.copy(), params))

    @property
    def _reference_is_base(self) -> bool:
        """GRPO starts from a fresh adapter: its reference is the base with adapters off."""
        return self.experiment.lora is not None and "sft" not in self.experiment.stages

    def newest_params(self):
        """What was trained, of the newest checkpoint in the folder: GRPO's, or the warm-up's.

        Raises:
          ValueError: there is none.
        """
        folders = [self.workdir / "checkpoints" / stage for stage in ("grpo", "sft")]
        if not any(folder.is_dir() for folder in folders):
            raise ValueError(f"{self.workdir} holds no checkpoint; mmsr train makes them")
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = self._training[1]
        target = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding or here),
            shapes if self.experiment.lora is None else lora_lib.split(shapes)[1],
        )
        for folder in folders:
            if not folder.is_dir():
                continue
            with Checkpoints(folder, self.experiment.checkpoint) as checkpoints:
                if (params := checkpoints.restore_params(target)) is not None:
                    return params
        raise ValueError(f"{self.workdir} holds no checkpoint; mmsr train makes them")

    @functools.cached_property
    def engine(self) -> Engine:
        return Engine(
            self._rollout[0], self.model, self.experiment.engine, self.tokenizer.eos_ids,
            self.rollout_mesh,
        )  # fmt: skip

    @functools.cached_property
    def _rollout_base(self):
        """LoRA's frozen weights as the engine has them, laid out once."""
        if self.base is None:
            return None
        return self.engine.lay_out(relayout(self.base, lora_lib.split(self._rollout[1])[0]))

    def sync(self, params, keep_cache: bool = False) -> None:
        """Gives the engine what was trained, laid out for rollouts, on the base it knows.

        Args:
          keep_cache: see `Engine.set_params`.
        """
        shapes = self._rollout[1] if self.base is None else lora_lib.split(self._rollout[1])[1]
        self.engine.params = None  # the old ones go before the new ones come: never two copies
        # An adapter as the base is, so that the two can be joined.
        params = self.engine.lay_out(relayout(params, shapes))
        self.engine.set_params(state_lib.whole(params, self._rollout_base), keep_cache)

    @functools.cached_property
    def search(self) -> Search:
        """The search tools, with their store and budget; payments are kept in the run's folder."""
        tools, flags = self.experiment.tools, self.experiment.flags
        counts = {"image_results": tools.image_results, "text_results": tools.text_results}
        return assemble(
            tools.backend, tools.web, tools.store, tools.budget, deadline=tools.deadline, **counts,
            local=lambda: flags_tools(self.world, tools.image_results, tools.text_results),
            local_identity={"world": "flags", **counts, **dataclasses.asdict(flags)},
            index=lambda: open_folder(tools.index),
            ledger=self.workdir / "payments.jsonl",
        )  # fmt: skip

    @functools.cached_property
    def toolbox(self) -> Toolbox:
        tools = self.experiment.tools
        return Toolbox(
            self.search.tools,
            deadline=tools.deadline,
            max_concurrent=tools.max_concurrent,
            closing=self.search.close,
        )

    @functools.cached_property
    def setting(self) -> Setting:
        e = self.experiment
        return Setting(
            protocol=e.protocol,
            tokenizer=self.tokenizer,
            images=e.images,
            max_tokens=min(e.engine.slots, e.pack.length),
            turn_tokens=e.engine.turn_tokens,
        )

    def _data(self, split: str, categories: tuple[str, ...], **more) -> pipeline.DataConfig:
        e = self.experiment
        return pipeline.DataConfig(
            name=e.data.name, data_dir=e.data.folder, split=split, categories=categories, **more
        )

    def examples(self, split: str, categories: tuple[str, ...]) -> list[Example]:
        """All good examples of a split, in a fixed order."""
        return pipeline.read_all(self._data(split, categories), self.experiment.flags)

    def stream(self, split: str, categories: tuple[str, ...], shares: tuple[float, ...] = ()):
        """An endless, shuffled, resumable iterator of examples."""
        config = self._data(split, categories, shares=shares, seed=self.experiment.seed)
        return pipeline.stream(config, self.experiment.flags)

    def check_questions(self) -> None:
        """Opens the data of every stage: a category that there is not ends a run before it begins.

        Raises:
          ValueError: no such category, or shares that do not fit.
        """
        e = self.experiment
        if "grpo" in e.stages:
            self.stream("train", e.data.grpo_categories, e.data.grpo_shares)
        if "eval" in e.stages:
            self.stream("test", e.evaluation.categories + e.evaluation.unseen)

    def demonstrations(self) -> dict[str, list[Tokens]]:
        """SFT's conversations by kind of lesson, played through the real tools."""
        e = self.experiment
        toolbox = self.toolbox  # what keeps the tools from being made is no fault of a lesson
        out: dict[str, list[Tokens]] = {}
        examples = self.examples("train", e.data.sft_categories)
        wanted = {kind: count for kind, count, _ in e.sft.batch}
        for lesson in lessons(self.world, examples, e.lessons):
            if not wanted.get(lesson.kind):
                continue
            try:
                played = demonstrate(lesson, self.setting, toolbox)
            except ValueError as error:
                self.skipped += 1
                log.warning("lesson skipped: %s", error)
                continue
            self.search.check()
            out.setdefault(lesson.kind, []).append(played)
        missing = sorted(kind for kind, count in wanted.items() if count and kind not in out)
        if missing:
            raise ValueError(f"sft.batch asks for lessons of kind {missing}, there are none")
        return out

    def random(self, *parts) -> np.random.Generator:
        """A host random stream named by the run seed and `parts` (integers)."""
        return np.random.default_rng([self.experiment.seed, *parts])

    def close(self) -> None:
        if "toolbox" in self.__dict__:
            self.toolbox.close()
