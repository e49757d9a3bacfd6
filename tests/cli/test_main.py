import dataclasses
import io
import json
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from mmsr_jax import __version__
from mmsr_jax.cli.main import COMMANDS, main

CONFIG = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Small:
    name: str = "small"
    steps: int = 3

def get_config():
    return Small()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a config in it."""
    (tmp_path / "small.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def loop(monkeypatch):
    """Puts a function in the place of the loops."""

    def put(function):
        loops = types.SimpleNamespace(
            run=types.SimpleNamespace(run=function),
            evaluate=types.SimpleNamespace(command=function),
        )
        monkeypatch.setitem(sys.modules, "mmsr_jax.loops", loops)

    return put


def complaint(capsys):
    """The one line on standard error."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_help_names_the_commands_that_exist(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"example:\n  mmsr {command}" in capsys.readouterr().out


def test_the_first_word_of_help_is_quick():
    """Help brings in neither jax nor anything else that takes long."""
    heavy = ("jax", "numpy", "rich", "tyro", "matplotlib", "transformers")
    code = (
        "import sys; from mmsr_jax.cli.main import main; main(['--help']); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "mmsr: there is no command 'trian', did you mean train?"),
        (["train"], "mmsr train: the following arguments are required: CONFIG"),
        (["train", "smal.py"], "smal.py: there is no such config file; did you mean small.py?"),
        (["train", "--steps", "3", "small.py"], "mmsr train: CONFIG comes first"),
        (["train", "small.py", "--stepz", "3"], "unknown flag --stepz, did you mean --steps?"),
        (["train", "small.py", "--steps", "x"], "mmsr train: error parsing --steps"),
        (["train", "small.py", "--workdir", "small.py"], "mmsr train: small.py: file exists"),
        (["eval", "small.py"], "mmsr eval: runs/small: there is no such run"),
        (["view", "nowhere"], "mmsr view: there is no folder nowhere"),
        (["search", "image", "no.png"], "mmsr search: no.png: no such file or directory"),
        (["search", "image", "small.py"], "mmsr search: image_search: failed: the picture"),
        (["search", "text", " "], "mmsr search: the query is empty"),
        (["search", "text", "a", "--count", "0"], "--count must be at least 1, not 0"),
        (["search", "txt", "a"], "invalid choice: 'txt'"),
    ],
)
def test_a_mistake_ends_in_one_line_and_2(words, message, folder, capsys):
    assert main(words) == 2
    assert message in complaint(capsys)


def test_debug_shows_the_traceback_of_a_mistake(folder, capsys):
    assert main(["view", "nowhere", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("mmsr view: there is no folder nowhere\n")


def test_train_hands_over_the_experiment_and_the_folder(folder, loop):
    seen = []
    loop(lambda experiment, workdir, log: seen.append((experiment.steps, workdir, log.workdir)))
    assert main(["train", "small.py"]) == 0
    assert main(["train", "small.py", "--steps", "7", "--workdir", "runs/other"]) == 0
    assert [(steps, str(a), str(b)) for steps, a, b in seen] == [
        (3, "runs/small", "runs/small"),
        (7, "runs/other", "runs/other"),
    ]


def test_a_mistake_found_before_work_begins_is_a_mistake(folder, loop, capsys):
    loop(lambda experiment, workdir, log: (_ for _ in ()).throw(FileNotFoundError(2, "No", "x")))
    assert main(["train", "small.py"]) == 2
    assert complaint(capsys) == "mmsr train: x: no"
    assert not (folder / "runs").exists()


def test_a_failure_in_work_begun_keeps_its_traceback(folder, loop, capsys):
    def run(experiment, workdir, log):
        log.scalars(1, "grpo", {"reward/mean": 0.5})
        raise FileNotFoundError(2, "No such file", "shard-3")

    loop(run)
    assert main(["train", "small.py"]) == 1
    line = complaint(capsys)
    assert "failed: FileNotFoundError: shard-3" in line and "runs/small/error.txt" in line
    assert "Traceback" in (folder / "runs/small/error.txt").read_text()
    assert "reward/mean" in (folder / "runs/small/metrics.jsonl").read_text()
    loop(lambda *_: None)
    assert main(["train", "small.py"]) == 0
    assert not (folder / "runs/small/error.txt").exists()


def test_an_output_that_knows_ascii_only_ends_no_run(folder, loop, monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", written)
    loop(lambda experiment, workdir, log: log.print("0.951 \u00b10.008"))
    assert main(["train", "small.py"]) == 0
    written.flush()
    assert written.buffer.getvalue() == b"0.951 ?0.008\n"


def test_a_strangers_run_cannot_command_the_terminal(folder, capsys):
    (folder / "config.json").write_text(json.dumps({"\x1b]0;title\x07\x1b[31m": 1}))
    assert main(["export", ".", "out"]) == 2
    assert complaint(capsys).isprintable()


def test_a_value_error_from_a_library_is_no_mistake_of_the_user(folder, loop, capsys):
    loop(lambda *_: np.zeros(3).reshape(2))
    assert main(["train", "small.py"]) == 1
    assert "error.txt" in complaint(capsys)


def test_ctrl_c_tells_how_to_go_on(folder, loop, capsys):
    def run(*_):
        raise KeyboardInterrupt

    loop(run)
    assert main(["train", "small.py", "--steps", "5"]) == 130
    shown = capsys.readouterr().err
    assert "the same command continues: mmsr train small.py --steps 5" in shown


def test_eval_hands_over_the_workflows(folder, loop):
    seen = []
    loop(lambda experiment, workdir, workflows: seen.append((str(workdir), workflows)))
    (folder / "runs/small").mkdir(parents=True)
    assert main(["eval", "small.py"]) == 0
    assert main(["eval", "small.py", "--workflow", "on_demand, never_search"]) == 0
    assert seen == [
        ("runs/small", ("on_demand", "always_search", "never_search")),
        ("runs/small", ("on_demand", "never_search")),
    ]


def test_view_writes_the_page(folder, capsys):
    (folder / "config.json").write_text(json.dumps({"name": "x"}))
    assert main(["view", "."]) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert (folder / "report.html").exists()


def test_search_finds_a_fact_by_text(capsys):
    assert main(["search", "text", "capital of Nepal", "--count", "1"]) == 0
    assert "Kathmandu" in capsys.readouterr().out
    assert main(["search", "text", "zzzqqq"]) == 0
    assert capsys.readouterr().out.startswith("no results\n")


def test_search_finds_a_flag_by_picture(folder, capsys):
    from mmsr_jax.data.flags.world import World

    picture = Image.open(io.BytesIO(World().flag("FR"))).convert("RGB").resize((90, 60))
    picture.save("photo.jpg")
    assert main(["search", "image", "photo.jpg", "--count", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["items"][0]["title"] == "France" and found["items"][0]["thumbnail"]
    assert len(found["items"]) == 2


def test_data_builds_and_shows_a_dataset(folder, capsys, monkeypatch):
    from mmsr_jax.data import pipeline
    from mmsr_jax.data.flags.world import FlagsConfig

    made = pipeline.BUILDERS["flags"]
    few = dataclasses.replace(FlagsConfig(), train_pictures=1, test_pictures=1)
    monkeypatch.setitem(pipeline.BUILDERS, "flags", lambda options, data: made(few, data))
    assert main(["data", "build", "flags", "--folder", "sets"]) == 0
    assert "train 90, test 114 examples" in capsys.readouterr().out
    assert main(["data", "show", "flags", "--folder", "sets", "--split", "test"]) == 0
    assert "known 36, never_shown 24" in capsys.readouterr().out
    assert main(["data", "show", "flags", "--folder", "sets", "--split", "dev"]) == 2
    assert "Unknown split 'dev'" in complaint(capsys)
    assert main(["data", "show", "cats"]) == 2
    assert "no dataset 'cats'" in complaint(capsys)


def test_a_datasets_brackets_are_no_markup(capsys):
    from mmsr_jax.cli import data
    from mmsr_jax.types import Example

    picture = io.BytesIO()
    Image.new("RGB", (2, 2)).save(picture, "PNG")
    shown = Example("[/a]", "[/b]?", picture.getvalue(), ("[/c]",), "flags", "[/d]", "e")
    data._show(types.SimpleNamespace(name="flags", split="train", count=1), [shown])
    out = capsys.readouterr().out
    assert all(text in out for text in ("[/a]", "[/b]?", "[/c]", "[/d]"))
