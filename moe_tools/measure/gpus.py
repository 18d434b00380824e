"""Cards and what their makers say of them: the one table for plans, utilisation and memory.

FLOP/s are of dense bf16 matrices with fp32 sums. Makers print twice that, "with sparsity", and, for
gaming cards, twice again with fp16 sums; neither is what training does.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_tools.registry import unknown


@dataclass(frozen=True)
class Gpu:
    """One card, by its data sheet."""

    flops: float
    """A second, bf16, dense."""
    memory: float
    """Bytes; a GB is 1e9."""
    bandwidth: float
    """Bytes a second between the card and its memory."""
    link: float
    """Bytes a second to the other cards of a node, in one direction: NVLink, else PCIe."""


GPUS = {
    "A100-40GB": Gpu(312e12, 40e9, 1555e9, 300e9),
    "A100-80GB": Gpu(312e12, 80e9, 2039e9, 300e9),
    "A800-80GB": Gpu(312e12, 80e9, 2039e9, 200e9),
    "H100-80GB": Gpu(989e12, 80e9, 3350e9, 450e9),
    "H800-80GB": Gpu(989e12, 80e9, 3350e9, 200e9),
    "H200-141GB": Gpu(989e12, 141e9, 4800e9, 450e9),
    "B200-180GB": Gpu(2250e12, 180e9, 8000e9, 900e9),
    "L40S-48GB": Gpu(362e12, 48e9, 864e9, 32e9),
    "RTX4090-24GB": Gpu(165e12, 24e9, 1008e9, 32e9),
    "RTX3090-24GB": Gpu(71e12, 24e9, 936e9, 32e9),
}
"""Name -> card. A100, A800 and H100 to B200 are those of a node (SXM, HGX)."""


def gpu(name: str) -> tuple[str, Gpu]:
    """A card and its whole name, by that name or its beginning, in any case: h100, A100-80.

    Raises:
        ValueError: there is none, or the name fits several.
    """
    plain = name.replace(" ", "").lower()
    found = [known for known in GPUS if known.lower().startswith(plain) and plain]
    if len(found) > 1:
        raise ValueError(f"the card {name!r} may be {' or '.join(found)}: say which")
    if not found:
        raise unknown("card", name, GPUS)
    return found[0], GPUS[found[0]]


PEAKS: dict[str, float] = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "V100": 125e12,  # fp16: it has no bf16 products
    "MI325X": 1307.4e12,
    "MI300X": 1307.4e12,
    "MI250X": 191.5e12,  # a card is two devices
    "MI210": 181e12,
}
"""What a device calls itself -> its FLOP/s; the first name found in the device's own counts. There
are more than in `GPUS`, since to know how well a device is used takes no other figure of it."""
