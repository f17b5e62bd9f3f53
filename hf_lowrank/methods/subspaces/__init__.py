"""Rules that choose a subspace, one file each."""
