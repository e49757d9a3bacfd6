import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmsr_jax.engine.choose import choose as untraced

choose = jax.jit(untraced)

LOGITS = jnp.asarray([[0.0, 1.0, 2.0, -1.0], [3.0, 0.5, 3.0, 0.0]], jnp.float32)


def keys(*seeds):
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def zeros(rows):
    return jnp.zeros(rows, jnp.int32)


def test_temperature_zero_takes_the_likeliest():
    token, logprob = choose(LOGITS, keys(1, 2), zeros(2), jnp.float32(0))
    assert token.tolist() == [2, 0]  # the first of equals
    expected = jax.nn.log_softmax(LOGITS)[jnp.arange(2), token]
    np.testing.assert_allclose(logprob, expected, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution(temperature):
    draws = 4000
    logits = jnp.tile(LOGITS[:1], (draws, 1))
    token, logprob = choose(
        logits, jax.random.split(jax.random.key(3), draws), zeros(draws), jnp.float32(temperature)
    )
    expected = np.asarray(jax.nn.softmax(LOGITS[0] / temperature))
    found = np.bincount(token, minlength=4) / draws
    error = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(found - expected) < 4 * error + 1e-9).all(), (found, expected)
    np.testing.assert_allclose(logprob, np.log(expected)[token], rtol=1e-5)


def test_a_draw_is_named_by_its_key_and_number_only():
    wide = jax.random.normal(jax.random.key(0), (3, 500))
    counts = jnp.asarray([0, 4, 9], jnp.int32)
    together, _ = choose(wide, keys(1, 2, 3), counts, jnp.float32(1))
    for row in range(3):
        alone, _ = choose(wide[row : row + 1], keys(row + 1), counts[row : row + 1], jnp.float32(1))
        assert alone[0] == together[row]
    draws = [choose(wide[:1], keys(1), zeros(1) + n, jnp.float32(1))[0][0] for n in range(20)]
    assert len(set(map(int, draws))) > 10


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_large_logits_cost_no_digits(temperature):
    """The trainer subtracts the largest before it adds up: 2000 - 2000.5 has lost them."""
    logits = 2000 + 3 * jax.random.normal(jax.random.key(4), (64, 50))
    token, logprob = choose(logits, keys(*range(64)), zeros(64), jnp.float32(temperature))
    exact = np.asarray(logits, np.float64) - 2000
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprob, exact[np.arange(64), token], atol=2e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_no_numbers_choose_as_numpy_does(temperature):
    """Not an id that is never sampled: those stay finite (`NEVER`) whatever the weights are."""
    never, nan, inf = -1e30, np.nan, np.inf
    logits = jnp.asarray(
        [
            [never, nan, nan, never],
            [never, 1.0, nan, never],
            [never, inf, 1.0, never],
            [never, -inf, 1.0, -inf],
            [never, -50.0, never, never],
        ],
        jnp.float32,
    )
    token, logprob = choose(logits, keys(*range(5)), zeros(5), jnp.float32(temperature))
    assert token.tolist() == [1, 2, 1, 2, 1]
    assert np.isnan(logprob[:3]).all() and logprob[3:].tolist() == [0.0, 0.0]
