"""The sizes that the kernels' layouts are made of, as in lanes.h."""

LANES = 16  # floats of a vector: heads and the widths of gradients are of a multiple of so many channels
PANEL = 2 * LANES  # columns of a weight, or tokens of the vocabulary, that lie together
BLOCK = LANES  # tokens of one head's keys and values that lie together
