"""Where arrays live: the mesh and the rules that lay logical axes on it."""
