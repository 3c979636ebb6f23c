"""Published peaks of TPU chips, per JAX device.

Source: the vendor's system architecture pages, one per version (cloud.google.com/tpu/docs): dense bf16 TFLOP/s, HBM
capacity and bandwidth, and the inter-chip interconnect bandwidth of a chip, for all links together in one direction. If
a page gives the sum of both directions (TPU7x: 1200 GB/s), half of it is used here.
"""

import dataclasses

from popi_jax.errors import UserError

# Names that topologies.get_topology_desc accepts, examples for messages. Devices: 4, 4, 16, 64, 256, 4, 8, 64, 16, 8.
TOPOLOGIES = (
    "v4:2x2x1",
    "v5e:2x2",
    "v5e:4x4",
    "v5e:8x8",
    "v5e:16x16",
    "v5p:2x2x1",
    "v5p:2x2x2",
    "v5p:4x4x4",
    "v6e:4x4",
    "tpu7x:2x2x1",
)
LARGEST = 9216  # Chips of the largest slice, of TPU7x.


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one JAX device.

    Attributes:
        name: jax.Device.device_kind.
        flops: dense bf16 FLOP/s.
        hbm_bytes: HBM capacity, bytes. A program can use a little less, since the runtime reserves some.
        hbm_bandwidth: HBM bandwidth, bytes/s.
        link_bandwidth: bytes/s that the device can send over all its inter-chip links together.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float


def _chip(name: str, tflops: float, gib: int, gb_s: float, gbit_s: float, devices: int = 1) -> Chip:
    """Converts a chip's published figures to those of one of its devices."""
    return Chip(
        name,
        flops=tflops * 1e12 / devices,
        hbm_bytes=gib * 2**30 // devices,
        hbm_bandwidth=gb_s * 1e9 / devices,
        link_bandwidth=gbit_s * 1e9 / 8 / devices,
    )


# In topology descriptions, a TPU7x chip is two devices.
_CHIPS = {
    chip.name: chip
    for chip in (
        _chip("TPU v4", 275, 32, 1228, 2400),
        _chip("TPU v5 lite", 197, 16, 819, 1600),
        _chip("TPU v5", 459, 95, 2765, 4800),
        _chip("TPU v6 lite", 918, 32, 1640, 3584),
        _chip("TPU7x", 2307, 192, 7380, 4800, devices=2),
    )
}


def chip(device_kind: str) -> Chip:
    """Returns the peaks of a kind of device.

    Args:
        device_kind: jax.Device.device_kind, such as "TPU v5 lite".

    Raises:
        UserError: its peaks are unknown; the message lists the known kinds.
    """
    if device_kind not in _CHIPS:
        raise UserError(f"device kind {device_kind!r} has no known peaks; known kinds are {', '.join(_CHIPS)}")
    return _CHIPS[device_kind]
