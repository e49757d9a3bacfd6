"""The original: transformers on torch, on the same weights and the same inputs.

torch comes with the `test` extra only, so it is imported when a peer is made.
"""

import os
import pathlib

import numpy as np

from mmsr_jax.bench.workload import Workload


class Peer:
    """Qwen2.5-VL of transformers with its default attention (sdpa), eager otherwise.

    As in ours, every function takes a row of a `Workload` and ends when the numbers are there.
    """

    def __init__(self, folder: pathlib.Path | str, dtype: str, device: str):
        """Args:
        folder: checkpoint to load.
        device: JAX's name of the platform that ours runs on.

        Raises:
            ValueError: torch is not installed, or has no CUDA and ours does not run on CPU.
        """
        try:
            import torch
            from transformers import Qwen2_5_VLForConditionalGeneration
        except ImportError as error:
            raise ValueError(
                f"the peer needs {error.name}: install the extra 'test' (pip install "
                "'mmsr-jax[test]'), or measure ours alone with --peer none"
            ) from None
        if device != "cpu" and not torch.cuda.is_available():
            raise ValueError(
                f"ours runs on {device}, and torch has no CUDA here: install one that has, or "
                "measure ours against the floors with --peer none"
            )
        self.torch, self.device = torch, "cpu" if device == "cpu" else "cuda"
        if device == "cpu":
            torch.set_num_threads(threads())
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self.model.to(self.device).eval()

    def logits(self, work: Workload) -> np.ndarray:
        """[T, V] float32."""
        with self.torch.inference_mode():
            return self.model(**self._batch(work)).logits[0].float().cpu().numpy()

    def forward(self, work: Workload):
        """A function of one forward pass, all logits."""
        batch = self._batch(work)

        def run():
            with self.torch.inference_mode():
                self.model(**batch)
            self._wait()

        return run

    def backward(self, work: Workload):
        """A function of one forward and backward pass of the next-token loss.

        It returns the loss.
        """
        batch, torch = self._batch(work), self.torch
        targets = batch["input_ids"][0, 1:]

        def run() -> float:
            self.model.zero_grad(set_to_none=True)
            logits = self.model(**batch).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, targets)
            loss.backward()
            self._wait()
            return float(loss.detach())

        return run

    def gradient_norm(self) -> float:
        """Of the last backward pass; the gradients are dropped."""
        squares = [p.grad.float().square().sum() for p in self.model.parameters()]
        self.model.zero_grad(set_to_none=True)
        return float(sum(squares)) ** 0.5

    def decode(self, work: Workload, rows: int, tokens: int):
        """A function that decodes `tokens` greedy tokens for `rows` equal rows, [rows, tokens].

        The prompt is computed once; its first token comes from it.
        """
        torch, batch = self.torch, self._batch(work)
        length = work.ids.shape[1]
        with torch.inference_mode():
            out = self.model(**batch, use_cache=True)
        cache, first = out.past_key_values, out.logits[:, -1:].argmax(-1).expand(rows, 1)
        cache.batch_repeat_interleave(rows)
        start = length + work.delta

        def run() -> np.ndarray:
            token, chosen = first, []
            with torch.inference_mode():
                for step in range(tokens):
                    where = torch.full((3, rows, 1), start + step, device=self.device)
                    out = self.model(
                        input_ids=token, past_key_values=cache, position_ids=where, use_cache=True
                    )
                    token = out.logits[:, -1:].argmax(-1)
                    chosen.append(token)
                cache.crop(-tokens)
                return torch.cat(chosen, 1).cpu().numpy()

        return run

    def _batch(self, work: Workload) -> dict:
        torch = self.torch
        ids = torch.from_numpy(work.ids).long()
        self.model.model.rope_deltas = None  # the original keeps state between calls
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
            "pixel_values": torch.from_numpy(work.patches),
            "image_grid_thw": torch.tensor(work.grids),
        }
        return {name: value.to(self.device) for name, value in batch.items()}

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()


def threads() -> int:
    """CPUs that this process may use; XLA takes as many threads by itself."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
