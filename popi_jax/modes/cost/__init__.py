"""The cost of a compiled program on a chip: FLOPs, HBM traffic, collectives, and lower bounds on its time."""
