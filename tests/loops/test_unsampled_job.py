"""Where model and tokenizer meet: what the model may never say comes from the tokenizer."""

import dataclasses
import json

from mmsr_jax import experiment as experiment_lib
from mmsr_jax.build import Job
from mmsr_jax.experiment import Experiment, TokenizerConfig
from mmsr_jax.weights import hf_config


def test_a_job_forbids_structure_and_padding(tiny, tmp_path):
    tiny.tokenizer.save(tmp_path)
    job = Job(Experiment("e", tokenizer=TokenizerConfig(source=str(tmp_path))), tmp_path)
    t = job.tokenizer
    assert job.model.unsampled_ids == t.structural_ids
    assert job.model.sampled_vocab == t.vocab_size < job.model.text.vocab_size
    for name in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_start|>"):
        assert job.model.unsampled[t.special(name)]
    assert not job.model.unsampled[list(t.eos_ids)].any()
    assert job.model.unsampled[t.vocab_size :].all()
    # It is the tokenizer's, not the weights': no word of it in config.json, none when read again.
    described = hf_config.flat(job.model, "float32")
    assert not [name for name in json.loads(json.dumps(described)) if "sampled" in name]
    # Of the run's own record it stays out as well.
    assert job.experiment.model.unsampled_ids == ()


def test_weights_do_not_depend_on_what_may_be_said(tmp_path):
    run = Experiment("e")
    experiment_lib.save(run, tmp_path)
    model = dataclasses.replace(run.model, unsampled_ids=(7, 8), sampled_vocab=400)
    again = Experiment.from_json(dataclasses.replace(run, model=model).to_json())
    assert again.model == model
    experiment_lib.check_weights(again, tmp_path)
