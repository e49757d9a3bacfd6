"""A run as a Hugging Face folder: transformers takes it and answers with our numbers."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from mmsr_jax.build import Job
from mmsr_jax.cli.main import main
from mmsr_jax.experiment import Experiment, TokenizerConfig, save
from mmsr_jax.inputs import chat, images, layout
from mmsr_jax.inputs.tokenizer import CHAT_TEMPLATE
from mmsr_jax.loops import evaluate
from mmsr_jax.model import lora as lora_lib
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model.config import preset
from mmsr_jax.model.lora import LoRAConfig
from mmsr_jax.train import state as state_lib
from mmsr_jax.train.optimizer import OptimizerConfig, optimizer
from mmsr_jax.types import Message
from mmsr_jax.weights import hf, peft
from mmsr_jax.weights.checkpoint import CheckpointConfig, Checkpoints

QUESTION = "What capital?"


def grown(params, seed):
    """Norms not one, biases not zero, as after training."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """(experiment, folder, weights) of a run whose only checkpoint is GRPO's fifth step."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    base = preset("tiny")
    model = dataclasses.replace(base, text=dataclasses.replace(base.text, vocab_size=400, layers=2))
    experiment = Experiment(
        "small",
        model=model,
        tokenizer=TokenizerConfig(vocab_size=384),
        images=images.ImageConfig(min_pixels=56 * 56, max_pixels=140 * 84),
    )
    save(experiment, workdir)
    tiny.tokenizer.save(workdir / "tokenizer")  # as a run that trained its own leaves it
    job = Job(experiment, workdir)
    params = grown(job.fresh_params(), 1)
    transform = optimizer(OptimizerConfig(), 9)
    with Checkpoints(workdir / "checkpoints" / "grpo", CheckpointConfig()) as checkpoints:
        checkpoints.save(5, state_lib.create(params, transform), {"step": 5})
    return experiment, workdir, job, params


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "small"
    assert main(["export", str(run[1]), str(out), "--dtype", "float32"]) == 0
    return out


def test_files(exported, run):
    job = run[2]
    assert sorted(path.name for path in exported.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    settings = json.loads((exported / "generation_config.json").read_text())
    assert settings["eos_token_id"] == list(job.tokenizer.eos_ids)
    assert images.ImageConfig.from_hf(exported) == run[0].images


def test_transformers_gives_our_logits_on_a_picture(exported, run, tiny):
    experiment, _, job, params = run
    picture = Image.open(io.BytesIO(tiny.png(170, 90)))
    # Ours.
    cut = images.picture(picture, experiment.images)
    tokens = chat.prompt([Message("user", (cut, QUESTION))], job.tokenizer)
    vision = layout.vision_inputs([cut], job.model.vision)
    inputs = qwen.Inputs(
        tokens.ids[None], tokens.positions[:, None], np.ones_like(tokens.ids)[None],
        tokens.image_index[None], vision,
    )  # fmt: skip
    ours = jax.jit(qwen.forward, static_argnums=0)(job.graph, params, inputs).logits[0]
    # Theirs, from the folder alone.
    tokenizer = AutoTokenizer.from_pretrained(exported)
    processor = AutoImageProcessor.from_pretrained(exported, backend="pil")
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        exported, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = processor(images=[picture], return_tensors="pt")
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    count = int(pixels["image_grid_thw"].prod()) // 4
    text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == tokens.ids.tolist()
    np.testing.assert_array_equal(pixels["pixel_values"].numpy(), cut.patches)
    is_image = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    with torch.no_grad():
        theirs = model(input_ids=ids, mm_token_type_ids=is_image, **pixels).logits[0].numpy()
    assert theirs.std() > 0.1
    assert np.abs(np.asarray(ours) - theirs).max() < 2e-5
    assert model.generation_config.eos_token_id == list(job.tokenizer.eos_ids)


def test_bfloat16_loads_to_the_bit(run, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(run[1]), str(out)]) == 0
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        out, output_loading_info=True, dtype="auto"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    table = model.model.language_model.embed_tokens.weight.detach().view(torch.uint16).numpy()
    ours = np.asarray(run[3]["text"]["embed"]["table"].astype("bfloat16")).view(np.uint16)
    np.testing.assert_array_equal(table, ours)
    up = model.model.visual.blocks[1].mlp.up_proj.weight.detach().view(torch.uint16).numpy()
    ours = run[3]["vision"]["layers"]["mlp"]["up"]["kernel"][1].astype("bfloat16")
    np.testing.assert_array_equal(up, np.asarray(ours).view(np.uint16).T)


def test_the_next_run_starts_from_it(exported, run, tmp_path):
    """The sizes and the weights are the folder's, whatever `model` says."""
    _, _, first, params = run
    later = Experiment(
        "later", weights=str(exported), tokenizer=TokenizerConfig(source=str(exported))
    )
    job = Job(later, tmp_path)
    assert job.model == first.model
    jax.tree.map(np.testing.assert_array_equal, job.fresh_params(), params)
    asked = {"dtype": "bfloat16", "remat": False, "attention": "xla", "cached_attention": "xla"}
    half = dataclasses.replace(later.model, **asked)
    job = Job(dataclasses.replace(later, model=half), tmp_path)
    assert job.model == dataclasses.replace(first.model, **asked)
    # What goes with the weights is carried over to the next export.
    (exported / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    from mmsr_jax.loops import export

    export.write_beside(job, tmp_path)
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (exported / name).read_bytes()


def test_the_processors_chat_template_goes_before_the_tokenizers(exported, tmp_path):
    """Qwen2.5-VL is published with two: pictures are in that of chat_template.json alone."""
    from mmsr_jax.loops import export

    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(exported, source)
    (source / "chat_template.jinja").unlink()
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ 'You are Qwen.' }}"
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    tokenizer = TokenizerConfig(source=str(source))
    later = Experiment("later", weights=str(source), tokenizer=tokenizer)
    out.mkdir()
    export.write_beside(Job(later, tmp_path / "run"), out)
    assert AutoTokenizer.from_pretrained(out).chat_template == CHAT_TEMPLATE


def test_weights_with_another_tokenizer_are_refused(exported, run, tmp_path):
    experiment = Experiment("later", weights=str(exported))
    with pytest.raises(ValueError, match="set tokenizer.source to the same folder or hub id"):
        _ = Job(experiment, tmp_path).model
    other = hf.load(exported)
    moved = dataclasses.replace(other.config, image_token_id=7)
    hf.save(other.params, moved, tmp_path / "moved")
    source = TokenizerConfig(source=str(exported))
    experiment = Experiment("later", weights=str(tmp_path / "moved"), tokenizer=source)
    with pytest.raises(ValueError, match=r"<\|image_pad\|> is 7 in weights"):
        _ = Job(experiment, tmp_path).model


def test_a_run_with_lora_is_exported_merged_or_as_an_adapter(run, exported, tmp_path):
    lora = LoRAConfig(rank=3, alpha=6.0, targets=("q_proj", "down_proj"))
    experiment = Experiment(
        "lora", stages=("grpo",), weights=str(exported), lora=lora,
        tokenizer=TokenizerConfig(source=str(exported)),
    )  # fmt: skip
    workdir = tmp_path / "run"
    save(experiment, workdir)
    job = Job(experiment, workdir)
    adapter = grown(job.start(), 2)
    with Checkpoints(workdir / "checkpoints" / "grpo", CheckpointConfig()) as checkpoints:
        state = state_lib.create(adapter, optimizer(OptimizerConfig(), 9))
        checkpoints.save(5, state, {"step": 5})
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    assert main(["export", str(workdir), str(whole), "--dtype", "float32"]) == 0
    merged = lora_lib.merge(lora_lib.join(run[3], adapter), lora)
    jax.tree.map(np.testing.assert_array_equal, hf.load(whole).params, merged)
    assert np.abs(merged["text"]["layers"]["mlp"]["down"]["kernel"]).max() > 0.1
    assert main(["export", str(workdir), str(alone), "--dtype", "float32", "--adapter"]) == 0
    found, read = peft.load(alone, job.model)
    assert (found.rank, found.alpha) == (3, 6.0)
    jax.tree.map(np.testing.assert_array_equal, read, adapter)
    settings = json.loads((alone / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(exported)
    # Again is fine; beside the merged model the adapter would be applied twice.
    assert main(["export", str(workdir), str(alone), "--adapter"]) == 0
    assert main(["export", str(workdir), str(whole), "--adapter"]) == 2
    assert main(["export", str(workdir), str(alone)]) == 2
    assert sorted(path.name for path in alone.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    # Numbers of another adapter than the run's would be wrong without a word.
    other = dataclasses.replace(experiment, lora=dataclasses.replace(lora, alpha=3.0))
    with pytest.raises(ValueError, match=r"other settings \(lora.alpha\)"):
        evaluate.command(other, workdir, ("on_demand",))


def test_mistakes_end_in_one_line(run, exported, tmp_path, capsys):
    for words, message in (
        ([tmp_path, tmp_path / "out"], f"{tmp_path} holds no run (no config.json)"),
        ([run[1], run[1]], f"{run[1]} is neither empty nor an earlier export"),
        ([run[1], tmp_path / "out", "--dtype", "int8"], "invalid choice: 'int8'"),
        ([run[1], tmp_path / "out", "--adapter"], "trained all weights, not an adapter"),
    ):
        assert main(["export", *map(str, words)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("mmsr export: ") and message in line
    save(run[0], tmp_path / "young")
    run[2].tokenizer.save(tmp_path / "young" / "tokenizer")
    assert main(["export", str(tmp_path / "young"), str(tmp_path / "out")]) == 2
    assert "young holds no checkpoint; mmsr train makes them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
