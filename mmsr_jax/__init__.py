"""mmsr_jax: teach a vision-language model when to search, what to search for, and how to use it."""

__version__ = "0.1.0"
