"""The roofline's lower bounds on a program's time. Overlap within a chip is taken for granted: the largest counts."""

import dataclasses
from typing import Any

from popi_jax.cost.chips import Chip


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that each resource of a device needs at its peak."""

    compute_s: float
    memory_s: float
    interconnect_s: float

    @classmethod
    def of(cls, device_flops: float, moved: dict[str, Any] | None, chip: Chip) -> "Bound":
        """The bounds of a program that does `device_flops` in products on each device.

        `moved` is a traffic.Traffic as a dict; None where it is not known: the bound is then that of compute alone.
        """
        if moved is None:
            return cls(device_flops / chip.flops, 0.0, 0.0)
        sent = sum(own["bytes"] for own in moved["collectives"].values())
        return cls(device_flops / chip.flops, moved["hbm_bytes"] / chip.hbm_bandwidth, sent / chip.link_bandwidth)

    @property
    def seconds(self) -> float:
        """The largest: no run is faster."""
        return max(self.compute_s, self.memory_s, self.interconnect_s)

    @property
    def binding(self) -> str:
        """The resource that takes longest."""
        named = {"compute": self.compute_s, "HBM": self.memory_s, "interconnect": self.interconnect_s}
        return max(named, key=lambda name: named[name])


_ADVICE = {
    "compute": "",
    "HBM": "More rows per device and micro-batch read the weights less often.",
    "interconnect": "More rows per device and micro-batch (fewer micro-batches, a smaller mesh) gather the weights less"
    " often; adapters (lora.rank) send no gradients of weights.",
}


def advice(bounds: Bound) -> str:
    """What would change a bound that is not compute."""
    return _ADVICE[bounds.binding]
