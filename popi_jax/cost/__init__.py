"""What a compiled program costs on a chip: FLOPs, HBM traffic, collectives, and the bounds they set on its time."""
