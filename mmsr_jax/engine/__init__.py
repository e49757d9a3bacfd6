"""The sampler: a KV cache, rows that pause for tools, and three jitted programs."""
