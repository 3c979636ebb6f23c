"""The roofline's lower bounds on a program's time, and what would move them.

A bound and no estimate: it takes every resource at its peak and all of them at work at the same time.
"""

import dataclasses

from popi_jax.cost.chips import Chip
from popi_jax.cost.traffic import Traffic


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds of one call of a program that each resource of a device needs at its peak.

    Attributes:
        compute_s: for the products.
        memory_s: for the traffic of HBM.
        interconnect_s: for what the device sends to others.
        peak_flops: FLOP/s of all devices together at their peak.
    """

    compute_s: float
    memory_s: float
    interconnect_s: float
    peak_flops: float

    @property
    def seconds(self) -> float:
        """The largest of the three: no call is faster, as far as the traffic is not overstated."""
        return max(self.compute_s, self.memory_s, self.interconnect_s)

    @property
    def binding(self) -> str:
        """The resource that needs longest: "compute", "HBM" or "interconnect"."""
        needed = {"compute": self.compute_s, "HBM": self.memory_s, "interconnect": self.interconnect_s}
        return max(needed, key=lambda resource: needed[resource])

    def mfu(self, model_flops: float) -> float:
        """Model FLOPs utilisation at the bound, a fraction: the highest that the program can reach.

        Args:
            model_flops: of one call on all devices, without what is computed a second time.
        """
        return model_flops / (self.seconds * self.peak_flops)


def bound(flops: float, traffic: Traffic, chip: Chip, devices: int) -> Bound:
    """The bounds of a program.

    Args:
        flops: that one call executes on all devices together, evenly split: flops.count of its jaxpr.
        traffic: of one call, on one device.
        chip: the peaks of one device.
        devices: how many there are.
    """
    sent = sum(collective.bytes for collective in traffic.collectives.values())
    return Bound(
        compute_s=flops / (chip.flops * devices),
        memory_s=traffic.hbm_bytes / chip.hbm_bandwidth,
        interconnect_s=sent / chip.link_bandwidth,
        peak_flops=chip.flops * devices,
    )


_ADVICE = {
    "compute": "The products bind: fewer of them (less rematerialisation, shorter rows, tighter packing) or more"
    " devices are what makes it faster.",
    "HBM": "HBM binds: more rows per device in each micro-batch, hence fewer micro-batches, read the weights less often"
    " for the same work; a larger fsdp or tensor split leaves each device less to read.",
    "interconnect": "The interconnect binds: more rows per device in each micro-batch, hence fewer micro-batches,"
    " gather the weights and reduce their gradients less often for the same work; a smaller fsdp or tensor split, where"
    " the memory allows it, sends less.",
}


def advice(bound: Bound) -> str:
    """One sentence on what would lower the bound."""
    return _ADVICE[bound.binding]
