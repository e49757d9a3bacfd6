import dataclasses
import io
import sys

import pytest

from mmsr_jax.cli import config
from mmsr_jax.cli.endings import UsageError


@dataclasses.dataclass(frozen=True)
class Loss:
    """How far the policy may move."""

    kl_weight: float = 0.05  # pull to the reference
    divide: bool = True

    def __post_init__(self):
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight is {self.kl_weight}, it cannot be below 0")


@dataclasses.dataclass(frozen=True)
class Training:
    steps: int = 10
    batch: tuple[tuple[str, int], ...] = (("direct", 4),)
    loss: Loss = Loss()


@dataclasses.dataclass(frozen=True)
class Plan:
    name: str = "plan"
    grpo: Training = Training()
    sft: Training | None = None


def changed(*words):
    return config.override(Plan(), words, "mmsr train x.py")


def test_flags_replace_fields():
    assert changed() == Plan()
    plan = changed("--grpo.steps", "3", "--grpo.loss.kl_weight", "0.5", "--grpo.loss.divide=False")
    assert plan == Plan(grpo=Training(steps=3, loss=Loss(kl_weight=0.5, divide=False)))
    assert changed("--grpo.batch", "a", "1", "b", "2").grpo.batch == (("a", 1), ("b", 2))


def test_a_record_that_is_none_is_made_by_its_flags_and_dropped_by_none():
    assert changed("--sft.steps", "3") == Plan(sft=Training(steps=3))
    assert changed("--sft.loss.kl_weight=0.5").sft.loss == Loss(kl_weight=0.5)
    given = Plan(sft=Training(steps=7))
    again = config.override(given, ["--sft.loss.kl-weight", "0.5"], "mmsr train x.py")
    assert again == Plan(sft=Training(steps=7, loss=Loss(kl_weight=0.5)))
    for words in (["--sft", "None"], ["--sft=None"]):
        assert config.override(given, [*words, "--name", "n"], "p") == Plan(name="n")
    with pytest.raises(UsageError, match=r"unknown flag --sft\.stepps, did you mean --sft\.steps"):
        changed("--sft.stepps", "3")
    with pytest.raises(UsageError, match="unknown flag --grpo"):
        changed("--grpo", "None")  # a record that cannot be None


def test_flags_of_a_record():
    assert list(config.flags(Plan())) == [
        "--name", "--grpo.steps", "--grpo.batch", "--grpo.loss.kl-weight", "--grpo.loss.divide",
        "--sft",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grpo.stepps", "3"], r"unknown flag --grpo\.stepps, did you mean --grpo\.steps\?"),
        (["--kl-weight=3"], r"unknown flag --kl-weight, did you mean --grpo\.loss\.kl-weight\?"),
        (["more"], "unknown word more"),
        (["--grpo.steps", "many"], r"error parsing --grpo\.steps: .*'many'"),
        (["--grpo.steps"], r"missing value for argument '--grpo\.steps'"),
        (["--grpo.loss.divide", "maybe"], "invalid choice 'maybe'"),
        (["--grpo.loss.kl-weight", "-1"], r"kl_weight is -1\.0, it cannot be below 0"),
    ],
)
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])  # tyro draws other boxes for each
def test_wrong_flags_end_in_one_line(words, message, encoding, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(UsageError, match=message) as caught:
        changed(*words)
    assert not set("\n│─\x1b") & set(str(caught.value)) and "--- " not in str(caught.value)
    assert "mmsr train x.py --help lists all" in str(caught.value)
    assert capsys.readouterr().err == ""


def test_help_lists_the_fields_with_their_comments(capsys):
    with pytest.raises(SystemExit) as stop:
        changed("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--sft.loss.kl-weight" in shown  # None so far, made by its flags
    assert "--grpo.loss.kl-weight" in shown and "pull to the reference" in shown


def test_load_runs_the_file_and_its_neighbours(tmp_path):
    (tmp_path / "base.py").write_text("import dataclasses\nname = 'small'\n")
    path = tmp_path / "small.py"
    path.write_text(
        "import dataclasses, base\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class C:\n    name: 'str' = base.name\n"
        "def get_config():\n    return C()\n"
    )
    loaded = config.load(path)
    assert loaded.name == "small" and config.override(loaded, ["--name", "x"], "p").name == "x"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n", "has no function get_config"),
        ("def get_config():\n    return 3\n", "returns a int, no Experiment"),
        ("def get_config(:\n", "line 1: SyntaxError: "),
        ("\nimport nowhere_at_all\n", "line 2: ModuleNotFoundError: "),
        ("def get_config():\n    return int('x')\n", "line 2: invalid literal"),
        (
            "from mmsr_jax.types import Picture\ndef get_config():\n    return Picture(hue=1)\n",
            "line 3: TypeError: .* unexpected keyword argument 'hue'",
        ),
    ],
)
def test_what_goes_wrong_in_a_config_is_named_with_its_line(tmp_path, source, message):
    path = tmp_path / "wrong.py"
    path.write_text(source)
    with pytest.raises(UsageError, match=message) as caught:
        config.load(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "flags.py").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no such config file; did you mean .*flags\.py\?"):
        config.load(tmp_path / "flag.py")
    with pytest.raises(FileNotFoundError, match="no such config file"):
        config.load(tmp_path / "nowhere" / "flag.py")
    with pytest.raises(UsageError, match="is no config"):
        config.load(tmp_path)
