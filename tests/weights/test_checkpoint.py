"""What is written is what was there; a run that goes on from it is the run that never stopped."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmsr_jax.cli.endings import is_mistake
from mmsr_jax.train import state as state_lib
from mmsr_jax.train import step
from mmsr_jax.train.assemble import Piece, assemble
from mmsr_jax.weights.checkpoint import CheckpointConfig, Checkpoints

CONFIG = CheckpointConfig(every=1, keep=2)


def assert_equal(left, right):
    left, right = jax.tree.leaves(left), jax.tree.leaves(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def batch(tiny):
    talk = tiny.conversation((tiny.picture(4, 6), "What capital?"), ("Lisbon",), seed=1)
    (batch,) = assemble([Piece(talk)], tiny.model, tiny.pack, aggregate="token")
    return batch


def fresh(tiny):
    return state_lib.create(tiny.params(), tiny.transform)


def train(tiny, state, batch, steps):
    for _ in range(steps):
        grads = step.zeros_like(state.params)
        grads, _ = step.accumulate_sft(tiny.graph, state.params, grads, batch)
        state, _ = step.apply(tiny.transform, state, grads)
    return state


def test_what_is_saved_comes_back(tiny, tmp_path):
    state = fresh(tiny)
    meta = {"step": 3, "data": {"next_index": 7}, "skipped": 1}
    with Checkpoints(tmp_path / "new" / "folder", CONFIG) as checkpoints:
        assert checkpoints.latest is None
        assert checkpoints.restore(state_lib.abstract(state)) is None
        checkpoints.save(3, state, meta)
    with Checkpoints(tmp_path / "new" / "folder", CONFIG) as checkpoints:
        assert checkpoints.latest == 3
        restored, found = checkpoints.restore(state_lib.abstract(state))
    assert found == meta
    assert isinstance(restored, state_lib.TrainState)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_equal(restored, state)
    for new, old in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert (new.dtype, new.sharding, new.committed) == (old.dtype, old.sharding, True)


def test_training_goes_on_bit_for_bit(tiny, batch, tmp_path):
    start = train(tiny, fresh(tiny), batch, 2)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(2, start, {})
    straight = train(tiny, start, batch, 2)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        restored, _ = checkpoints.restore(state_lib.abstract(fresh(tiny)))
    continued = train(tiny, restored, batch, 2)
    assert int(continued.step) == 4
    assert_equal(continued, straight)


def test_arrays_may_be_donated_as_soon_as_save_returns(tiny, tmp_path):
    """Large arrays, so that writing takes longer than the update that reuses their memory."""
    params = {f"p{n}": jnp.full((256, 1024), float(n)) for n in range(8)}
    state = state_lib.create(params, tiny.transform)
    grads = jax.tree.map(jnp.ones_like, state.params)
    state, _ = step.apply(tiny.transform, state, grads)  # compiled: the next ones are quick
    with Checkpoints(tmp_path, CheckpointConfig(keep=9)) as checkpoints:
        kept = {}
        for number in (1, 2, 3):
            kept[number] = jax.tree.map(lambda x: np.array(x, copy=True), state)
            checkpoints.save(number, state, {"step": number})
            for _ in range(3):
                donated = state
                state, _ = step.apply(tiny.transform, state, grads)
            assert jax.tree.leaves(donated.params)[0].is_deleted()
        for number, expected in kept.items():
            restored, meta = checkpoints.restore(state_lib.abstract(state), number)
            assert meta["step"] == number
            assert_equal(restored, expected)


def test_an_older_step_is_refused_and_only_the_newest_are_kept(tiny, tmp_path):
    state = {"x": jnp.arange(3.0)}
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        for number in (2, 4, 6):
            checkpoints.save(number, {"x": state["x"] * number}, {"step": number})
        with pytest.raises(ValueError, match="step 5 was not saved: step 6 is there already"):
            checkpoints.save(5, state, {})
        with pytest.raises(ValueError, match="6"):
            checkpoints.save(6, state, {})
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        restored, meta = checkpoints.restore(target)
        assert meta == {"step": 6} and restored["x"].tolist() == [0, 6, 12]
        assert checkpoints.restore(target, 4)[1] == {"step": 4}
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["4", "6"]


def test_a_full_disk_is_an_error_and_the_last_whole_checkpoint_stays(tmp_path, full_disk):
    state = {"x": jax.random.normal(jax.random.key(0), (1000, 500))}
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state, {"step": 1})
    checkpoints = Checkpoints(tmp_path, CONFIG)
    with full_disk(100_000):
        checkpoints.save(2, state, {"step": 2})  # in the background: the error comes later
        with pytest.raises(ValueError, match="File too large"):
            checkpoints.close()
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        restored, meta = checkpoints.restore(target)
        assert meta == {"step": 1}
        assert_equal(restored, state)
        checkpoints.save(2, state, {"step": 2})
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.latest == 2


def test_a_state_makes_room_for_what_is_restored(tiny, tmp_path):
    state = fresh(tiny)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(3, state, {})
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        shapes = state_lib.vacate(state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        assert_equal(checkpoints.restore(shapes)[0], fresh(tiny))


@pytest.mark.parametrize("name", ["every", "keep"])
def test_numbers_that_save_nothing_are_refused(name):
    with pytest.raises(ValueError, match=f"checkpoint.{name} is 0"):
        CheckpointConfig(**{name: 0})


def test_a_checkpoint_that_was_never_finished_does_not_count(tmp_path):
    state = {"x": jnp.arange(3.0)}
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state, {})
    whole = next(p for p in tmp_path.iterdir() if p.name == "1")
    broken = tmp_path / "2.orbax-checkpoint-tmp"  # what a killed writer leaves behind
    (broken / "state").mkdir(parents=True)
    (broken / "state" / "part").write_bytes(b"half")
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.latest == 1
        checkpoints.save(2, state, {})
    assert whole.exists()
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.latest == 2


def test_one_device_to_eight_and_back(tiny, tmp_path):
    """Saved here; restored, checked and saved again by a process of eight devices."""
    state = fresh(tiny)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state, {"step": 1})
    environment = dict(
        os.environ,
        JAX_NUM_CPU_DEVICES="8",
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_backend_optimization_level=0",  # compiles in two thirds of the time
        CHECKPOINTS=str(tmp_path),
    )
    file = pathlib.Path(__file__).with_name("eight_devices.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        found, meta = checkpoints.restore(state_lib.abstract(state))
    assert meta == {"step": 2}
    assert_equal(found, state)


def test_a_damaged_checkpoint_is_named_and_can_be_taken_away(tiny, tmp_path):
    state = fresh(tiny)
    with Checkpoints(tmp_path / "c", CONFIG) as checkpoints:
        checkpoints.save(1, state, {"step": 1})
        checkpoints.save(2, state, {"step": 2})
    described = tmp_path / "c" / "2" / "state" / "_METADATA"
    described.write_bytes(described.read_bytes()[:200])
    with Checkpoints(tmp_path / "c", CONFIG) as checkpoints:
        for read in (
            lambda: checkpoints.restore(state_lib.abstract(state)),
            lambda: checkpoints.restore_params(state_lib.abstract(state).params),
        ):
            with pytest.raises(ValueError, match=r"checkpoint \S+/c/2 cannot be read") as caught:
                read()
            assert is_mistake(caught.value)
    shutil.rmtree(tmp_path / "c" / "2")
    with Checkpoints(tmp_path / "c", CONFIG) as checkpoints:
        _, meta = checkpoints.restore(state_lib.abstract(state))
    assert meta == {"step": 1}
