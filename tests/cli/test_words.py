import pytest

from mmsr_jax.cli.endings import UsageError
from mmsr_jax.cli.words import Parser, nearest, printable


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--grpo.stepps", ", did you mean --grpo.steps?"),
        ("--learning_rate", ", did you mean --grpo.learning-rate?"),
        ("--steps", ", did you mean --grpo.steps or --sft.steps?"),
        ("--zzz", ""),
    ],
)
def test_nearest(word, hint):
    assert nearest(word, ["--grpo.steps", "--sft.steps", "--grpo.learning-rate"]) == hint


def test_a_parser_complains_in_one_line():
    parser = Parser("mmsr x", "Does x.", "mmsr x a --count 3")
    parser.add_argument("name")
    inner = parser.add_subparsers()
    inner.add_parser("b", prog="mmsr x b", description="b", example="b").add_argument("--count")
    with pytest.raises(UsageError, match="arguments are required: name"):
        parser.parse([])
    with pytest.raises(UsageError, match="unknown argument --cuont, did you mean --count?"):
        parser.parse(["a", "b", "--cuont", "3"])
    with pytest.raises(UsageError, match="--coun"):
        parser.parse(["a", "b", "--coun", "3"])  # no abbreviations: they break when flags are added


def test_nothing_reaches_the_terminal_that_controls_it():
    assert printable("a\x1b[31mb\nc\u202ed é") == "a [31mb c d é"
