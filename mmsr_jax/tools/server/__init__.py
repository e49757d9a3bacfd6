"""A local index over HTTP: Search-R1's retrieve API, pictures, health and metrics."""
