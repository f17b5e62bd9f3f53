"""When and where it is computed."""
