"""All that imports transformers."""
