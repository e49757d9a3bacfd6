"""`mmsr export`: the newest weights of a run as a folder that transformers and vLLM load."""

import dataclasses
import json
import pathlib
import shutil
import tempfile

from mmsr_jax import experiment as experiment_lib
from mmsr_jax.build import Job
from mmsr_jax.inputs.tokenizer import CHAT_TEMPLATE, Tokenizer
from mmsr_jax.parallel.mesh import MeshConfig
from mmsr_jax.weights import hf, hub, peft
from mmsr_jax.weights.hf_write import check_target

GENERATION = "generation_config.json"


def command(workdir: pathlib.Path, out: pathlib.Path, dtype: str, adapter: bool = False) -> None:
    """Writes the folder `out`: weights, and all that goes with them. LoRA is merged in.

    Args:
      workdir: a run's folder; its newest checkpoint is taken, GRPO's or else the warm-up's.
      out: new, empty, or an earlier export.
      dtype: "bfloat16" or "float32", of the weights on the disk.
      adapter: instead, the adapter alone, as a folder that PEFT loads on top of the base.

    Raises:
      ValueError: no run, no checkpoint, an adapter of a run without LoRA, or another folder in
        the way.
    """
    experiment = experiment_lib.read(workdir)
    if adapter and experiment.lora is None:
        raise ValueError(f"{workdir} trained all weights, not an adapter: leave --adapter out")
    if adapter and not experiment.weights:
        raise ValueError(
            f"the adapter of {workdir} stands on random weights that nobody else has: "
            "leave --adapter out, and it is merged in"
        )
    (peft.check_target if adapter else check_target)(out)  # before the weights are read
    # The run's mesh may be of another machine: any layout over what is here will do.
    job = Job(dataclasses.replace(experiment, mesh=MeshConfig()), workdir)
    try:
        params = job.newest_params()
        if adapter:
            beneath = experiment.weights
            peft.save(params, job.model, experiment.lora, out, base_name=beneath, dtype=dtype)
            return
        with tempfile.TemporaryDirectory() as beside:
            write_beside(job, pathlib.Path(beside))
            hf.save(job.merged(params, dtype), job.model, out, source=beside, dtype=dtype)
    finally:
        job.close()


def write_beside(job: Job, folder: pathlib.Path) -> None:
    """What goes with a run's weights: tokenizer, chat template, picture and generation settings.

    Files of a published tokenizer are carried over as they are; pictures are always cut as the run
    cut them.
    """
    job.tokenizer.save(folder)
    given = job.tokenizer_folder
    for name in hub.TOKENIZER if given is not None and given.is_dir() else ():
        if (given / name).is_file():
            shutil.copyfile(given / name, folder / name)
    template = folder / "chat_template.jinja"
    if not template.exists() and isinstance(known := _template(folder), str):
        template.write_text(known, encoding="utf-8")  # where newer programs look for it
    job.experiment.images.to_hf(folder)
    if job.weights is not None and (job.weights / GENERATION).is_file():
        shutil.copyfile(job.weights / GENERATION, folder / GENERATION)
    else:
        (folder / GENERATION).write_text(json.dumps(generation(job.tokenizer), indent=2) + "\n")


def _template(folder: pathlib.Path):
    """The chat template among older files: the processor's before the tokenizer's.

    Those of Qwen2.5-VL differ. The tokenizer's is the language model's, with another system turn
    and no pictures.
    """
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            if known := values.get("chat_template"):
                return known
    return CHAT_TEMPLATE


def generation(tokenizer: Tokenizer) -> dict:
    """generation_config.json: where a turn ends; greedy unless asked otherwise."""
    return {
        "bos_token_id": tokenizer.pad_id,
        "pad_token_id": tokenizer.pad_id,
        "eos_token_id": list(tokenizer.eos_ids),
        "do_sample": False,
    }
