"""`mmsr bench`: measurements, each beside what it is compared with."""

import dataclasses
import json

from mmsr_jax.cli.words import Parser

EXAMPLE = "mmsr bench model --size m100"


def run(words: list[str]) -> None:
    """Prints a table, or with --json one object, of one of the MEASUREMENTS."""
    given = parser().parse(words)
    measure, show = MEASUREMENTS[given.what][1:]
    record = measure(given)
    if given.json:
        print(json.dumps(record))
    else:
        show(record)


def parser() -> Parser:
    made = Parser("mmsr bench", "Measures speed, and says beside what.", EXAMPLE)
    names = "|".join(MEASUREMENTS)
    what = made.add_subparsers(dest="what", metavar=names, required=True)
    for add, *_ in MEASUREMENTS.values():
        add(what).add_argument("--json", action="store_true", help="one JSON object, no table")
    return made


def _model_parser(what) -> Parser:
    made = what.add_parser(
        "model",
        prog="mmsr bench model",
        description="Forward, forward + backward and cached decoding, by turns with transformers "
        "on torch on the same weights, after their numbers have been compared; and the share of "
        "what the device can do (a matrix product, reading memory).",
        example=EXAMPLE + " --inputs small --rows 1 4 --json",
    )
    made.add_argument(
        "--size", default="m100", help="m100, tiny, 3b, 7b (random weights) or a checkpoint folder"
    )
    made.add_argument("--dtype", default="", help="default: float32 on CPU, else bfloat16")
    made.add_argument(
        "--inputs", nargs="+", default=["small", "med"], help="some of small, med, large"
    )
    made.add_argument(
        "--parts",
        nargs="+",
        default=["forward", "backward", "decode"],
        help="some of forward, backward, decode",
    )
    made.add_argument(
        "--rows", nargs="+", type=int, default=[1, 4], help="rows decoded at once (default: 1 4)"
    )
    made.add_argument("--tokens", type=int, default=32, help="tokens of one decoding run")
    made.add_argument("--runs", type=int, default=10, help="runs of each side (default: 10)")
    made.add_argument("--peer", default="torch", help="torch, or none: ours against the floors")
    made.add_argument(
        "--layers",
        default="apart",
        help="apart: unrolled; stacked: one loop over stacked weights, as in training",
    )
    made.add_argument(
        "--attention", default="auto", help="auto (default), xla, cudnn, triton or splash"
    )
    made.add_argument("--remat", action="store_true", help="recompute layers going backward")
    return made


def _model(given) -> dict:
    from mmsr_jax.bench import model

    return model.run(
        model.Options(
            size=given.size,
            dtype=given.dtype,
            inputs=tuple(given.inputs),
            parts=tuple(given.parts),
            rows=tuple(given.rows),
            tokens=given.tokens,
            runs=given.runs,
            peer=given.peer,
            layers=given.layers,
            remat=given.remat,
            attention=given.attention,
        )
    )


def _show_model(record: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console, cases = Console(), record["cases"]
    attention = {name for case in cases for name in case["attention"].values()}
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    console.print(
        f"{record['size']}: {record['parameters'] / 1e6:.2f} M parameters, {record['dtype']}, on "
        f"{record['device']}, {record['threads']} threads, {record['date']}\n{versions}\n"
        f"layers {record['layers']}, attention {', '.join(sorted(attention))}, "
        f"{'recomputed' if record['remat'] else 'activations kept'} in the backward pass\n"
        f"a matrix product here: {record['matrix_flops_per_s'] / 1e9:.0f} GFLOP/s; "
        f"memory: {record['memory_bytes_per_s'] / 1e9:.1f} GB/s\n"
        f"peer: {record['peer'] or 'none'}",
        highlight=False,
    )
    inputs = {
        case["input"]: f"{case['tokens']} tokens, {case['patches']} patches" for case in cases
    }
    console.print("; ".join(f"{name}: {size}" for name, size in inputs.items()), highlight=False)
    title = "milliseconds: minimum (median); of decoding, one step of all rows"
    table = Table(title=title, title_justify="left", box=None)
    columns = ("", "input", "ours", "peer", "ratio", "floor", "of floor", "compile s")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=number < 2)
    for case in cases:
        peer = case.get("peer")
        table.add_row(
            case["what"],
            case["input"],
            _milliseconds(case["ours"]),
            _milliseconds(peer) if peer else "",
            f"{case['ratio']:.2f}" if peer else "",
            f"{case['floor_ms']:.1f}",
            f"{case['of_floor']:.0%}",
            f"{case['compile_s']:.1f}",
        )
    console.print(table)


def _milliseconds(times: dict) -> str:
    return f"{times['min_ms']:.1f} ({times['median_ms']:.1f})"


def _load_parser(what) -> Parser:
    made = what.add_parser(
        "load",
        prog="mmsr bench load",
        description="Random weights in bfloat16, from files onto a CPU mesh: seconds and peak "
        "memory, beside merely reading the same files.",
        example="mmsr bench load --preset 3b --devices 4 --tensor 2",
    )
    made.add_argument("--preset", default="3b", help="whose sizes (default: 3b)")
    made.add_argument("--devices", type=int, default=4, help="of the mesh (default: 4)")
    made.add_argument("--tensor", type=int, default=1, help="size of its tensor axis (default: 1)")
    made.add_argument("--folder", help="where the files may lie (default: the system's temporary)")
    return made


def _load(given) -> dict:
    from mmsr_jax.bench import load

    return load.run(given.preset, given.devices, tensor=given.tensor, folder=given.folder)


def _show_load(record: dict) -> None:
    from mmsr_jax.bench import load

    print(load.table(record))


def _tools_parser(what) -> Parser:
    made = what.add_parser(
        "tools",
        prog="mmsr bench tools",
        description="Local search over generated passages and pictures: building (seconds, disk, "
        "peak memory), latency in the process and over HTTP, and what approximations miss.",
        example="mmsr bench tools --passages 100000 --pictures 10000 --json",
    )
    made.add_argument("--passages", type=int, default=1_000_000, help="default: 1,000,000")
    made.add_argument("--pictures", type=int, default=100_000, help="default: 100,000")
    made.add_argument("--text", nargs="+", default=["fts", "tantivy"], help="back ends of text")
    made.add_argument(
        "--vectors", nargs="+", default=["exact", "usearch"], help="back ends of pictures"
    )
    made.add_argument(
        "--concurrency", nargs="+", type=int, default=[1, 32], help="questions at once (1 32)"
    )
    made.add_argument("--seconds", type=float, default=10.0, help="of each latency (10)")
    made.add_argument(
        "--compared", type=int, default=40, help="questions whose recall is measured (40)"
    )
    made.add_argument("--folder", help="where files may lie (default: the system's temporary)")
    return made


def _tools(given) -> dict:
    from mmsr_jax.bench import tools

    return tools.run(
        tools.Options(
            passages=given.passages,
            pictures=given.pictures,
            text=tuple(given.text),
            vectors=tuple(given.vectors),
            concurrency=tuple(given.concurrency),
            seconds=given.seconds,
            compared=given.compared,
            folder=given.folder,
        )
    )


def _show_tools(record: dict) -> None:
    from mmsr_jax.bench import tools

    print(tools.table(record))


def _engine_parser(what) -> Parser:
    made = what.add_parser(
        "engine",
        prog="mmsr bench engine",
        description="Decoding by turns with transformers' generate on the same weights, and the "
        "share of what memory allows; then a replay of multi-turn conversations with slow tools "
        "beside the same with instant ones, a scheduler of rounds behind a barrier, and a plain "
        "loop of transformers that encodes the whole conversation in every round.",
        example="mmsr bench engine --sizes tiny --rows 1 16 --time-scale 0.05 --json",
    )
    parts = "some of decode, replay, barrier, loop (default: all)"
    made.add_argument("--parts", nargs="+", help=parts)
    made.add_argument("--sizes", nargs="+", help="of decoding: tiny, m100, 3b, 7b")
    made.add_argument("--dtype", help="default: float32 on CPU, else bfloat16")
    made.add_argument("--rows", nargs="+", type=int, help="of decoding (default: 1 16)")
    made.add_argument("--contexts", nargs="+", type=int, help="tokens before (default: 64 256)")
    made.add_argument("--tokens", type=int, help="decoded in one run (default: 48)")
    made.add_argument("--runs", type=int, help="of decoding, of each side (default: 5)")
    made.add_argument("--peer", help="torch (default), or none")
    made.add_argument("--replay-size", help="model of the replay (default: tiny)")
    made.add_argument("--replay-rows", type=int, help="rows that decode at once (default: 16)")
    made.add_argument("--flight", type=int, help="trajectories in the engine (default: 64)")
    made.add_argument("--pages", type=int, help="of its pool (default: enough for all of them)")
    made.add_argument(
        "--traces", help="conversations to replay, from mmsr bench traces (default: drawn ones)"
    )
    made.add_argument(
        "--groups", type=int, help="prompts that are drawn, 8 samples each (default: 96)"
    )
    made.add_argument("--loop-groups", type=int, help="of them in the plain loop (default: 32)")
    made.add_argument("--seed", type=int, help="of drawn conversations (default: 0)")
    made.add_argument("--repeats", type=int, help="of a replay (default: 3)")
    made.add_argument(
        "--latency", default="drawn",
        help="drawn (default, by the next three) or recorded, what the traces say",
    )  # fmt: skip
    made.add_argument("--median", type=float, help="seconds of a tool call (default: 1)")
    made.add_argument("--p99", type=float, help="the slowest in a hundred (default: 20)")
    made.add_argument("--deadline", type=float, help="calls end there (default: 30)")
    made.add_argument(
        "--time-scale", dest="scale", type=float,
        help="of those; 1 is real time (default: 0.05, of recorded ones 1)",
    )  # fmt: skip
    return made


def _engine(given) -> dict:
    from mmsr_jax.bench import engine
    from mmsr_jax.bench.engine_replay import Latency

    chosen = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(given).items()
        if value is not None
    }
    known = [field.name for field in dataclasses.fields(Latency)]
    wanted = {name: chosen[name] for name in known if name in chosen}
    if (kind := chosen.pop("latency")) not in ("drawn", "recorded"):
        raise ValueError(f"latency {kind!r} is none of drawn, recorded")
    if kind == "recorded":
        if extra := [f"--{name}" for name in wanted if name != "scale"]:
            raise ValueError(f"{', '.join(extra)}: only of --latency drawn, not of recorded ones")
        latency = Latency(recorded=True, **wanted)
    else:
        latency = dataclasses.replace(engine.Options.latency, **wanted)
    names = {field.name for field in dataclasses.fields(engine.Options)}
    return engine.run(
        engine.Options(**{name: chosen[name] for name in names & chosen.keys()}, latency=latency)
    )


def _show_engine(record: dict) -> None:
    from mmsr_jax.bench import engine_table

    print(engine_table.table(record))


def _traces_parser(what) -> Parser:
    made = what.add_parser(
        "traces",
        prog="mmsr bench traces",
        description="Writes the conversations of a run as traces for `mmsr bench engine`: groups, "
        "lengths of turns and results, sizes of pictures, and the seconds of each tool call, "
        "without their words and pixels.",
        example="mmsr bench traces runs/flags flags.jsonl --step 80 90\n"
        "  mmsr bench engine --parts replay barrier --traces flags.jsonl --latency recorded",
    )
    made.add_argument("run", metavar="RUN", help="a run's folder")
    made.add_argument("out", metavar="OUT.jsonl", help="file to write")
    made.add_argument(
        "--step", nargs="+", default=[],
        help="steps of training, or names in RUN/traces such as eval-after-sampled (default: all "
        "steps of training)",
    )  # fmt: skip
    return made


def _traces(given) -> dict:
    from mmsr_jax.bench import trace_file

    return trace_file.collect(given.run, given.out, given.step)


def _show_traces(record: dict) -> None:
    from mmsr_jax.bench import trace_file

    print(trace_file.table(record))


# name: (adds its parser, measures, prints the table)
MEASUREMENTS = {
    "model": (_model_parser, _model, _show_model),
    "load": (_load_parser, _load, _show_load),
    "tools": (_tools_parser, _tools, _show_tools),
    "engine": (_engine_parser, _engine, _show_engine),
    "traces": (_traces_parser, _traces, _show_traces),
}
