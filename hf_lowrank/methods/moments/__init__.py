"""Running statistics of the projected gradient, one file each."""
