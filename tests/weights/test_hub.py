"""A name is a folder, or else a repository in the local cache, or else one clear error."""

import json
import pathlib

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants

from mmsr_jax.weights import hf, hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def snapshot(cache) -> pathlib.Path:
    """Where `org/model` lies in the cache: still empty."""
    repository = cache / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    return repository / "snapshots" / COMMIT


def test_a_folder_is_itself(tmp_path):
    assert hub.resolve(tmp_path) == hub.resolve(str(tmp_path)) == tmp_path


def test_a_repository_in_the_cache_is_loaded_without_a_network(plain, snapshot, monkeypatch):
    snapshot.rmdir()
    hf.save(plain.params(), plain.model, snapshot, dtype="float32", shard_bytes=60_000)
    asked = []
    download = huggingface_hub.snapshot_download

    def watched(*args, **kwargs):
        asked.append(kwargs)
        return download(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", watched)
    loaded = hf.load("org/model")
    assert loaded.folder == snapshot
    jax.tree.map(np.testing.assert_array_equal, loaded.params, plain.params())
    assert [one.get("local_files_only") for one in asked] == [True]
    assert "*.safetensors" in asked[0]["allow_patterns"] and "*" not in asked[0]["allow_patterns"]
    assert hub.resolve("org/model", revision=COMMIT) == snapshot


def test_a_download_that_was_interrupted_is_taken_up_again(plain, snapshot, monkeypatch):
    snapshot.rmdir()
    hf.save(plain.params(), plain.model, snapshot, shard_bytes=60_000)
    file = sorted(snapshot.glob("*.safetensors"))[1]
    data = file.read_bytes()
    file.unlink()

    def download(*args, local_files_only=False, **kwargs):
        if not local_files_only:
            file.write_bytes(data)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hf.load("org/model").folder == snapshot


def test_one_whole_file_beside_an_index_is_enough(plain, snapshot):
    snapshot.rmdir()
    hf.save(plain.params(), plain.model, snapshot, dtype="float32")
    (snapshot / hub.INDEX).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert hf.load("org/model").folder == snapshot


def test_tokenizer_files_alone(snapshot):
    (snapshot / "tokenizer.json").write_text(json.dumps({}))
    assert hub.resolve("org/model", patterns=hub.TOKENIZER) == snapshot


def test_what_is_nowhere_is_named_with_the_cure(cache, tmp_path):
    with pytest.raises(ValueError) as error:
        hf.load("org/model")
    message = str(error.value)
    assert message.startswith("org/model is no folder here") and str(cache) in message
    assert message.endswith("hf download org/model")
    for wrong in ("nowhere", "./a/b", "/a/b", "a/b/c"):
        with pytest.raises(ValueError, match=f"there is no folder {wrong}"):
            hub.resolve(wrong)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; a folder or a hub id"):
        hub.resolve(tmp_path / "file")
