"""Log-probs and entropy by chunks of tokens, with a model that is one table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.train.logprobs import token_logprobs

ROWS, LENGTH, WIDTH, VOCABULARY = 3, 17, 8, 30


@pytest.fixture
def table(monkeypatch):
    """Weights; `forward` looks them up and `token_logits` multiplies by them."""
    monkeypatch.setattr(
        qwen,
        "forward",
        lambda graph, params, inputs, logits: qwen.Output(params[inputs], None, None),
    )
    monkeypatch.setattr(qwen, "token_logits", lambda graph, params, hidden: hidden @ params.T)
    return jax.random.normal(jax.random.key(0), (VOCABULARY, WIDTH))


def tokens(seed):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (ROWS, LENGTH))


@pytest.mark.parametrize("chunk", [1, 7, 13, 50, 51, 2048])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_chunks_do_not_change_values_or_gradients(table, chunk, temperature):
    ids, targets = tokens(1), tokens(2)
    weights = np.random.default_rng(3).normal(size=(ROWS, LENGTH))

    def chunked(table):
        found = token_logprobs(None, table, ids, targets, temperature, chunk)
        return (weights * found[0]).sum(), found

    def whole(table):
        log_all = jax.nn.log_softmax(table[ids] @ table.T / temperature)
        chosen = jnp.take_along_axis(log_all, targets[..., None], -1)[..., 0]
        return (weights * chosen).sum(), (chosen, -(jnp.exp(log_all) * log_all).sum(-1))

    slope, (logprobs, entropy) = jax.jit(jax.grad(chunked, has_aux=True))(table)
    expected, (chosen, spread) = jax.jit(jax.grad(whole, has_aux=True))(table)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, chosen, atol=1e-5)
    np.testing.assert_allclose(entropy, spread, atol=1e-5)
    np.testing.assert_allclose(slope, expected, atol=1e-4)


def test_no_gradient_flows_through_the_entropy(table):
    slope = jax.grad(lambda t: token_logprobs(None, t, tokens(1), tokens(2))[1].sum())(table)
    assert not slope.any()
