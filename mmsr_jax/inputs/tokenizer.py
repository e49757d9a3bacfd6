"""Text to ids and back, in Qwen's byte-level BPE.

What is typed stays text: `encode` never yields one of the added tokens ("<|im_end|>",
"<|image_pad|>", ...), so no web page can close a turn or place a picture. Structure is written
with `special` only.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

# The 22 added tokens of Qwen2.5, in the order of their ids, which follow the BPE vocabulary.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ADDED = (  # one id each, but plain text to a decoder that skips special tokens
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)

# Qwen2's words: contractions, letters with one mark before them, single digits, marks, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The conversation format that `mmsr_jax.inputs.chat` writes, for programs that load our exports.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` whose added tokens can be named, but not typed."""

    whole: tokenizers.Tokenizer  # with the added tokens: decodes, and is what gets saved
    config: dict = dataclasses.field(default_factory=dict)  # tokenizer_config.json it came with

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        # `encode_special_tokens` is not enough: it leaves <tool_call> and its like active.
        blueprint = json.loads(self.whole.to_str())
        blueprint["added_tokens"] = []
        blueprint["post_processor"] = None  # nothing is put in front or behind
        return tokenizers.Tokenizer.from_str(json.dumps(blueprint))

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text. Lone surrogates, which are no text, become question marks."""
        clean = text.encode("utf-8", "replace").decode("utf-8")
        return self._plain.encode(clean, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ids; ids beyond the vocabulary (padded logits) are nothing."""
        return self.whole.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def special(self, name: str) -> int:
        """Id of an added token, e.g. "<|im_end|>".

        Raises:
            ValueError: this tokeniser has no such token.
        """
        number = self.whole.token_to_id(name)
        if number is None:
            raise ValueError(f"the tokeniser has no token {name!r}")
        return number

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; ids are smaller than this."""
        return self.whole.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def im_start(self) -> int:
        return self.special("<|im_start|>")

    @functools.cached_property
    def im_end(self) -> int:
        return self.special("<|im_end|>")

    @functools.cached_property
    def pad_id(self) -> int:
        return self.special("<|endoftext|>")

    @functools.cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Both ids that end a turn; "<|im_end|>" is the one to write."""
        return (self.im_end, self.pad_id)

    @functools.cached_property
    def structural_ids(self) -> tuple[int, ...]:
        """Special tokens that only the chat template may write: all but `eos_ids`, sorted.

        A model that could say "<|image_pad|>" would speak of a picture that is not there.
        "<tool_call>" and its like are text to Qwen, not special, and are not among them.
        """
        added = self.whole.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special or token.content in SPECIAL}
        return tuple(sorted(special - set(self.eos_ids)))

    @functools.cached_property
    def image_pad(self) -> int:
        return self.special("<|image_pad|>")

    @functools.cached_property
    def vision_start(self) -> int:
        return self.special("<|vision_start|>")

    @functools.cached_property
    def vision_end(self) -> int:
        return self.special("<|vision_end|>")

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `AutoTokenizer` loads.

        tokenizer.json comes last and in one move: where it is, all is there.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config or _config(self)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        draft = folder / "tokenizer.json.draft"
        self.whole.save(str(draft))
        draft.replace(folder / "tokenizer.json")


def load(source: str | pathlib.Path) -> Tokenizer:
    """Reads a folder with tokenizer.json (or such a file itself), or else a name on the hub.

    Raises:
        ValueError: nothing readable there, or one of the tokens that a conversation needs is
            missing.
    """
    path = pathlib.Path(source)
    file = path / "tokenizer.json" if path.is_dir() else path
    config = {}
    try:
        if file.is_file():
            whole = tokenizers.Tokenizer.from_file(str(file))
            beside = file.with_name("tokenizer_config.json")
            if beside.is_file():
                config = json.loads(beside.read_text(encoding="utf-8"))
                if not isinstance(config, dict):
                    raise ValueError(f"{beside} holds no object")
        elif path.is_dir() or path.is_absolute():
            raise FileNotFoundError(f"{file} does not exist")
        else:
            whole = tokenizers.Tokenizer.from_pretrained(str(source))
    except Exception as error:  # the Rust library raises bare Exception for all of it
        raise ValueError(f"cannot load a tokeniser from {source}: {error}") from error
    whole.no_padding()
    whole.no_truncation()
    tokenizer = Tokenizer(whole, config)
    for name in SPECIAL[:3] + ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>"):
        tokenizer.special(name)
    return tokenizer


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns a small vocabulary of Qwen's kind; equal texts give equal ids.

    Args:
        vocab_size: number of ids wanted, the 22 added tokens and 256 bytes included; fewer come
            out when the texts hold too few words.

    Raises:
        ValueError: a size without room for bytes and added tokens.
    """
    added = [*SPECIAL, *ADDED]
    least = 256 + len(added)
    if vocab_size < least:
        raise ValueError(f"a vocabulary of {vocab_size} has no room, at least {least} needed")
    whole = tokenizers.Tokenizer(models.BPE())
    whole.normalizer = normalizers.NFC()
    whole.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    whole.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    whole.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    whole.train_from_iterator(texts, trainer)
    whole.add_special_tokens([_added(name, special=True) for name in SPECIAL])
    whole.add_tokens([_added(name, special=False) for name in ADDED])
    return Tokenizer(whole)


def _added(name: str, special: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(name, normalized=False, special=special)


def _config(tokenizer: Tokenizer) -> dict:
    """tokenizer_config.json as Qwen2.5 has it."""
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "split_special_tokens": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "additional_special_tokens": list(SPECIAL[1:]),
        "added_tokens_decoder": {
            str(tokenizer.special(name)): {
                "content": name,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": name in SPECIAL,
            }
            for name in (*SPECIAL, *ADDED)
            if tokenizer.whole.token_to_id(name) is not None
        },
        "chat_template": CHAT_TEMPLATE,
    }
