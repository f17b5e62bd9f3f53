"""From the direction in the subspace to the step of the matrix, one file each."""
