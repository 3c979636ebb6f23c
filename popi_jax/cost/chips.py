"""Public peaks of TPU chips, per device as JAX counts them.

Source: the vendor's system architecture pages (cloud.google.com/tpu/docs, one page per version): bf16 TFLOP/s, HBM
capacity and bandwidth, and inter-chip interconnect bandwidth per chip.
"""

import dataclasses

from popi_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one device.

    Attributes:
        flops: bf16 FLOP/s.
        hbm_bytes: capacity.
        hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s over all of its links together.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float


def _chip(tflops: float, gib: float, gb_s: float, gbit_s: float, devices: int = 1) -> Chip:
    return Chip(tflops * 1e12 / devices, gib * 2**30 / devices, gb_s * 1e9 / devices, gbit_s * 1e9 / 8 / devices)


# By jax.Device.device_kind. A v4 chip is two devices in a topology that is described and not there.
CHIPS = {
    "TPU v4": _chip(275, 32, 1228, 2400, devices=2),
    "TPU v5 lite": _chip(197, 16, 819, 1600),
    "TPU v5": _chip(459, 95, 2765, 4800),
    "TPU v6 lite": _chip(918, 32, 1640, 3584),
}


def chip(device_kind: str) -> Chip:
    """The peaks of a kind of device; UserError for one that is not in the table."""
    if device_kind not in CHIPS:
        raise UserError(f"--topology: no peaks are known for {device_kind!r}, only for {', '.join(CHIPS)}")
    return CHIPS[device_kind]
