"""The sampler: pages of keys and values, rows that change hands, four jitted programs."""
