"""One module per data set: `load(data, counts)` returns its examples by split."""
