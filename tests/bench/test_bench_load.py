"""The measurement of loading, and the promise that it measures, at a size of 200 MB."""

import dataclasses

import pytest

from mmsr_jax.bench import load
from mmsr_jax.model.config import preset


def test_memory_stays_under_parameters_and_one_file(tmp_path):
    base = preset("3b")
    config = dataclasses.replace(
        base,
        text=dataclasses.replace(
            base.text, vocab_size=16384, hidden=1024, layers=8, heads=8, intermediate=2816
        ),
        vision=dataclasses.replace(
            base.vision, depth=2, hidden=256, heads=4, intermediate=512, out_hidden=1024,
            full_attention_layers=(1,),
        ),
    )  # fmt: skip
    # A smaller load than the buffers of jax itself would show nothing.
    figures = load.run("", 4, tensor=2, folder=str(tmp_path), file_bytes=24_000_000, config=config)
    assert figures["parameters"] > 100e6 and figures["files"] > 5
    assert figures["held_bytes"] < 1.3 * figures["parameter_bytes"]
    assert figures["same_numbers"]
    # Programs, threads and caches of the load itself take some room too.
    assert figures["peak_rss"] - figures["baseline_rss"] < figures["bound"] + 30e6
    assert figures["load"] > 0 and figures["read"] > 0
    assert not list(tmp_path.iterdir())
    shown = load.table(figures)
    assert f"{figures['parameters']:,} parameters" in shown and shown.endswith("in the files: yes")


def test_mistakes():
    with pytest.raises(ValueError, match="no preset '4b'"):
        load.run("4b")
    with pytest.raises(ValueError, match="4 devices do not divide into tensor 3"):
        load.run("tiny", 4, tensor=3)
