"""Roofline bounds on a program's time, and advice on how to lower them.

These are lower bounds, not estimates: they assume that every resource runs at its peak, all at the same time.
"""

import dataclasses

from popi_jax.modes.cost.chips import Chip
from popi_jax.modes.cost.traffic import Traffic


@dataclasses.dataclass(frozen=True)
class Bound:
    """The time that each resource of a device, at its peak, needs for one call of a program.

    Attributes:
        compute_s: seconds for matrix products.
        memory_s: seconds for HBM traffic.
        interconnect_s: seconds for the bytes that the device sends to others.
        peak_flops: peak FLOP/s of all devices together.
    """

    compute_s: float
    memory_s: float
    interconnect_s: float
    peak_flops: float

    @property
    def seconds(self) -> float:
        """The largest of the three. No call is faster, unless the traffic is overstated."""
        return max(self.compute_s, self.memory_s, self.interconnect_s)

    @property
    def binding(self) -> str:
        """The resource that takes longest: "compute", "HBM" or "interconnect"."""
        needed = {"compute": self.compute_s, "HBM": self.memory_s, "interconnect": self.interconnect_s}
        return max(needed, key=lambda resource: needed[resource])

    def mfu(self, model_flops: float) -> float:
        """Returns the model FLOPs utilisation at the bound, a fraction: the highest that the program can reach.

        Args:
            model_flops: FLOPs of one call on all devices, without recomputation.
        """
        return model_flops / (self.seconds * self.peak_flops)


def bound(flops: float, traffic: Traffic, chip: Chip, devices: int) -> Bound:
    """Returns the bounds of a program.

    Args:
        flops: FLOPs of one call on all devices together, evenly split: flops.count of its jaxpr.
        traffic: traffic of one call on one device.
        chip: the peaks of one device.
        devices: the number of devices.
    """
    sent = sum(collective.bytes for collective in traffic.collectives.values())
    return Bound(
        compute_s=flops / (chip.flops * devices),
        memory_s=traffic.hbm_bytes / chip.hbm_bandwidth,
        interconnect_s=sent / chip.link_bandwidth,
        peak_flops=chip.flops * devices,
    )


_ADVICE = {
    "compute": "Compute is the bottleneck: do fewer products (less rematerialisation, shorter rows, tighter packing) or"
    " use more devices.",
    "HBM": "HBM is the bottleneck: put more rows per device into fewer micro-batches, which read the weights less"
    " often, or use a larger fsdp or tensor axis, so that each device reads less.",
    "interconnect": "Interconnect is the bottleneck: put more rows per device into fewer micro-batches, which gather"
    " the weights and reduce their gradients less often, or use a smaller fsdp or tensor axis if memory allows.",
}


def advice(bound: Bound) -> str:
    """Returns one sentence on how to lower the bound."""
    return _ADVICE[bound.binding]
