"""Before a run: what it would do to a model, and cost."""
