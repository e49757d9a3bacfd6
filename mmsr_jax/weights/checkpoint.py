"""Checkpoints by orbax: written in the background, complete or not there at all.

A step's folder holds `state` (arrays, with their shardings) and `meta` (JSON: everything else
that a run needs to go on as if it had not stopped). It restores onto any mesh.
"""

import dataclasses
import pathlib

import orbax.checkpoint as ocp


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 10  # steps between two checkpoints
    keep: int = 2  # newest ones to keep

    def __post_init__(self):
        if min(self.every, self.keep) < 1:
            raise ValueError(
                f"checkpoint.every and checkpoint.keep must be at least 1, not {self.every} and "
                f"{self.keep}"
            )


class Checkpoints:
    """The checkpoints of one stage of a run.

    Example:
      with Checkpoints(workdir / "checkpoints" / "grpo", config) as checkpoints:
          state, meta = checkpoints.restore(abstract) or (fresh, {})
          checkpoints.save(step, state, {"next_index": 40})
    """

    def __init__(self, folder: pathlib.Path, config: CheckpointConfig):
        self.config = config
        self._manager = ocp.CheckpointManager(
            pathlib.Path(folder).absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep, save_interval_steps=1, create=True
            ),
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state, meta: dict) -> None:
        """Starts to write; the arrays may be donated as soon as this returns.

        Raises:
          ValueError: a newer checkpoint is there (orbax would silently not save).
        """
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            ),
        )
        if not saved:
            raise ValueError(f"step {step} was not saved: step {self.latest} is there already")

    def restore(self, abstract, step: int | None = None):
        """(state, meta) of a step (default: the newest), or None when there is no checkpoint.

        Args:
          abstract: tree of jax.ShapeDtypeStruct with the shardings wanted.

        Raises:
          ValueError: the checkpoint is damaged, or holds other arrays.
        """
        step = self.latest if step is None else step
        if step is None:
            return None
        restored = self._read(
            step,
            ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], restored["meta"]

    def restore_params(self, abstract):
        """The weights alone of the newest step, or None when there is no checkpoint.

        Moments, twice as large, are left on the disk.

        Args:
          abstract: tree of jax.ShapeDtypeStruct of the parameters with the shardings wanted.

        Raises:
          ValueError: as `restore`.
        """
        if self.latest is None:
            return None
        item = {"params": abstract}
        restored = self._read(
            self.latest,
            ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    item,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                    partial_restore=True,
                )
            ),
        )
        return restored["state"]["params"]

    def _read(self, step: int, args):
        """What orbax restores of a step; its pages of complaint become one line."""
        try:
            return self._manager.restore(step, args=args)
        except (KeyError, OSError, ValueError) as error:
            raise ValueError(
                f"checkpoint {self._manager.directory / str(step)} cannot be read: damaged, or of "
                f"another model ({type(error).__name__}: {' '.join(str(error).split())[:120]}); "
                "with that folder removed, the checkpoint before it is taken"
            ) from error

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()
