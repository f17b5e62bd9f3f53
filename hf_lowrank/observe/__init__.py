"""During and after a run: what is seen of it."""
