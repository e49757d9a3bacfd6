"""A config can name an index folder, and the job's tools search it."""

import dataclasses

import pytest

from mmsr_jax.build import Job
from mmsr_jax.data.flags.corpus import write_corpus
from mmsr_jax.experiment import Experiment
from mmsr_jax.tools.index.build import IndexConfig, build
from mmsr_jax.tools.index.embed_hash import HashEmbedder
from mmsr_jax.tools.index.open import FolderConfig
from mmsr_jax.types import ToolCall


def over(small, folder) -> Experiment:
    tools = dataclasses.replace(
        small.tools, backend="index", index=FolderConfig(str(folder)), text_results=2
    )
    return dataclasses.replace(small, tools=tools)


def test_a_job_searches_the_folder_that_its_config_names(small, tmp_path):
    embedded = Job(small, tmp_path / "embedded")
    write_corpus(embedded.world, tmp_path / "corpus")
    build(tmp_path / "corpus", tmp_path / "index", IndexConfig(thumbnail=56), HashEmbedder())
    given = over(small, tmp_path / "index")
    assert Experiment.from_json(given.to_json()) == given
    job = Job(given, tmp_path / "run")
    example, *_ = job.examples("train", ("known",))
    calls = (
        ToolCall("image_search", "", example.image, example.question),
        ToolCall("text_search", "capital of Nepal", example.image, example.question),
    )
    try:
        images, texts = (job.toolbox.submit(call).result(30) for call in calls)
        known = embedded.toolbox.submit(calls[0]).result(30)
    finally:
        job.close()
        embedded.close()
    assert [i.title for i in images.items] == [i.title for i in known.items] and images.items
    # JPEG, where the embedded world shows PNG: it is the index that has answered.
    assert all(i.thumbnail.startswith(b"\xff\xd8") for i in images.items)
    assert texts.items[0].text == "The capital of Nepal is Kathmandu."
    assert len(texts.items) == 2


def test_a_job_without_its_folder_says_so(small, tmp_path):
    with pytest.raises(ValueError, match="gone is no index"):
        _ = Job(over(small, tmp_path / "gone"), tmp_path / "run").toolbox


def test_a_warm_up_without_tools_ends_at_once_and_skips_no_lesson(small, tmp_path):
    job = Job(over(small, ""), tmp_path / "run")
    with pytest.raises(ValueError, match=r"tools\.index\.folder, which names none"):
        job.demonstrations()
    assert job.skipped == 0
