"""`mmsr export`."""

import pathlib

from mmsr_jax.cli.words import Parser


def run(words: list[str]) -> None:
    """Writes the newest weights of a run as a Hugging Face folder and says where it is."""
    given = parser().parse(words)
    from mmsr_jax.loops import export  # jax takes a while

    export.command(given.workdir, given.out, given.dtype, given.adapter)
    print(given.out)


def parser() -> Parser:
    parser = Parser(
        "mmsr export",
        "Writes the newest checkpoint of a run as a Hugging Face folder: weights, tokenizer, chat\n"
        "template, picture and generation settings. transformers and vLLM load it, and a config's\n"
        "--weights and --tokenizer.source start from it. An earlier export is replaced.",
        "mmsr export runs/flags exports/flags --dtype float32",
    )
    parser.add_argument("workdir", metavar="WORKDIR", type=pathlib.Path, help="a run's folder")
    parser.add_argument("out", metavar="OUT", type=pathlib.Path, help="the folder to write")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="of the weights on the disk (default: bfloat16)",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a run with LoRA: the adapter alone, for PEFT (without it LoRA is merged in)",
    )
    return parser
