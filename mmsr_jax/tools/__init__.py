"""Search tools and the toolbox that runs them. Nothing here imports jax."""
