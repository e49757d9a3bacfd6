"""Episodes and rollouts: the one room that knows the engine and the tools."""
