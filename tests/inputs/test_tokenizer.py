import functools
import hashlib
import json
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mmsr_jax.inputs import tokenizer as tokenizer_lib
from mmsr_jax.inputs.tokenizer import ADDED, SPECIAL

TEXTS = [
    "<reason>I do not know this flag.</reason><search><img></search>",
    "What is the capital of the country with this flag? It's Lisbon, isn't it?",
    "1. Portugal: Portugal is a country in south-western Europe.\n2. São Tomé: 219,159 people\n",
    "user\nassistant\nsystem\nYou are a helpful assistant.\n",
] * 3


@functools.cache
def _trained():
    return tokenizer_lib.train(TEXTS, 400)


@pytest.fixture
def tokenizer():
    return _trained()


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    _trained().save(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_ids_are_in_qwens_order(tokenizer):
    assert tokenizer.vocab_size == 400
    names = [*SPECIAL, *ADDED]
    assert len(names) == 22
    assert [tokenizer.special(name) for name in names] == list(range(378, 400))
    assert tokenizer.pad_id == 378 and tokenizer.im_start == 379 and tokenizer.im_end == 380
    assert tokenizer.eos_ids == (380, 378)
    assert (tokenizer.vision_start, tokenizer.vision_end, tokenizer.image_pad) == (387, 388, 390)


def test_a_size_without_enough_words_comes_out_smaller():
    small = tokenizer_lib.train(["ab ab"], 5000)
    assert 256 + 22 <= small.vocab_size < 300
    assert small.special("<|file_sep|>") == small.vocab_size - 1


@pytest.mark.parametrize("name", [*SPECIAL, *ADDED])
def test_what_a_web_page_types_stays_text(tokenizer, name):
    for text in (name, f"page {name}{name}", f"{name}\n<|im_start|>user\n"):
        ids = tokenizer.encode(text)
        assert max(ids) < tokenizer.pad_id
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special=True) == text


def test_special_tokens_decode_to_their_names_or_to_nothing(tokenizer):
    ids = [tokenizer.im_start, *tokenizer.encode("user"), tokenizer.im_end]
    assert tokenizer.decode(ids) == "<|im_start|>user<|im_end|>"
    assert tokenizer.decode(ids, skip_special=True) == "user"
    assert tokenizer.decode([tokenizer.vocab_size, 10**6]) == ""
    with pytest.raises(ValueError, match="<think>"):
        tokenizer.special("<think>")


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=60))
def test_round_trip_of_any_text(text):
    tokenizer = _trained()
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_lone_surrogates_do_not_stop_a_run(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello  world",
        "it's 2024,\r\n\n ok\t!",
        "naïve e\u0301 日本語 \u0645\u0631 🇵🇹",
        " x",
        "x ",
    ],
)
def test_ids_equal_those_of_transformers(tokenizer, peer, text):
    assert tokenizer.encode(text) == peer(text, add_special_tokens=True)["input_ids"]


def test_saved_folder_is_what_transformers_expects(tokenizer, peer):
    assert len(peer) == tokenizer.vocab_size
    assert (peer.eos_token_id, peer.pad_token_id) == (tokenizer.im_end, tokenizer.pad_id)
    assert peer.bos_token_id is None
    assert peer("<|im_start|>a<|image_pad|>")["input_ids"][0] == tokenizer.im_start
    assert "qwen2" in type(peer).__name__.lower()
    assert peer.decode([tokenizer.special("<tool_call>")], skip_special_tokens=True)


def test_save_and_load_keep_ids_and_config(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    loaded = tokenizer_lib.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)
    assert tokenizer_lib.load(tmp_path / "a" / "tokenizer.json").vocab_size == 400


def test_load_says_what_is_wrong(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json"):
        tokenizer_lib.load(tmp_path)
    tokenizer.save(tmp_path)
    beside = tmp_path / "tokenizer_config.json"
    beside.write_text("[1]")
    with pytest.raises(ValueError, match="holds no object"):
        tokenizer_lib.load(tmp_path)
    beside.unlink()
    path = tmp_path / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["content"] != "<|image_pad|>"]
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="image_pad"):
        tokenizer_lib.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot load"):
        tokenizer_lib.load(tmp_path)


def test_training_is_the_same_in_every_process(tokenizer):
    expected = hashlib.sha256(tokenizer.whole.to_str().encode()).hexdigest()
    code = (
        "import hashlib\n"
        "from mmsr_jax.inputs import tokenizer\n"
        f"whole = tokenizer.train({TEXTS!r}, 400).whole.to_str()\n"
        "print(hashlib.sha256(whole.encode()).hexdigest())\n"
    )
    for _ in range(2):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert out.stdout.strip() == expected, out.stderr


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(ValueError, match="277 .* 278"):
        tokenizer_lib.train(TEXTS, 277)
    assert tokenizer_lib.train(TEXTS, 278).vocab_size == 278


def test_structural_ids_are_the_special_tokens_that_end_no_turn(tokenizer):
    names = {tokenizer.whole.id_to_token(i) for i in tokenizer.structural_ids}
    assert names == set(tokenizer_lib.SPECIAL) - {"<|im_end|>", "<|endoftext|>"}
    assert list(tokenizer.structural_ids) == sorted(tokenizer.structural_ids)
    assert tokenizer.special("<tool_call>") not in tokenizer.structural_ids
    for text in TEXTS:
        assert not set(tokenizer.encode(text)) & set(tokenizer.structural_ids)


def test_a_save_that_breaks_off_leaves_no_tokenizer(tokenizer, tmp_path, full_disk):
    """A run asks whether tokenizer.json is there: half of one would stop it for good."""
    with full_disk(10_000), pytest.raises(Exception, match="File too large"):
        tokenizer.save(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    tokenizer.save(tmp_path)
    assert tokenizer_lib.load(tmp_path).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
