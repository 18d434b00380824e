"""What the card is, and why it cannot be used."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass

LEAST = (8, 0)
"""The least compute capability: the kernels need the matrix units of Ampere, for bf16."""
MEMORY = 2 << 30
"""Bytes that the smallest stage needs."""


@dataclass(frozen=True)
class Card:
    """What torch and Triton say of the card and of themselves."""

    triton: str | None
    """Its version; None: it is not installed."""
    torch: str
    name: str | None = None
    """None: torch sees no card."""
    capability: tuple[int, int] | None = None
    """None on AMD."""
    memory: int = 0
    """Bytes, and of them free ones."""
    free: int = 0
    l2: int = 0
    trouble: str | None = None
    """What Triton says where it has no driver for the card."""
    bf16: bool = True

    @property
    def refusal(self) -> str | None:
        """Why nothing can run here, in one line; None when something can."""
        if self.triton is None:
            return "Triton is not installed: pip install 'moe-tools[gpu]'"
        if self.name is None:
            return (
                "no card: torch sees no GPU; run it where one is, or with --dry-run, which "
                "interprets the kernels on the CPU"
            )
        if self.capability is not None and self.capability < LEAST:
            found, least = (".".join(map(str, one)) for one in (self.capability, LEAST))
            return (
                f"{self.name} has compute capability {found}: the kernels need {least} (Ampere) "
                "or later"
            )
        if self.trouble is not None:
            return f"Triton {self.triton} cannot drive {self.name}: {self.trouble}"
        if self.free < MEMORY:
            free, least = (f"{one / 2**30:.1f} GiB" for one in (self.free, MEMORY))
            return f"{self.name} has {free} of free memory: the smallest stage needs {least}"
        return None

    @property
    def lacks(self) -> list[str]:
        """Dtypes that the card does not compute."""
        return [] if self.bf16 else ["bf16"]

    @property
    def title(self) -> str:
        """One line for the page."""
        if self.name is None:
            where = f"no card, {platform.machine()}"
        else:
            known = f", compute capability {'.'.join(map(str, self.capability or ()))}"
            size = f"{self.memory / 2**30:.0f} GiB, L2 of {self.l2 / 2**20:.0f} MiB"
            where = f"{self.name}{known if self.capability else ''}, {size}"
        return f"{where}; torch {self.torch}, Triton {self.triton}"


def look() -> Card:
    """Asks torch and Triton; the first question takes a second where a card is."""
    import torch

    version = torch.__version__
    if importlib.util.find_spec("triton") is None:
        return Card(None, version)
    import triton

    if not torch.cuda.is_available():
        return Card(triton.__version__, version)
    seen = torch.cuda.get_device_properties(0)
    free, memory = torch.cuda.mem_get_info()
    return Card(
        triton=triton.__version__,
        torch=version,
        name=seen.name,
        capability=None if torch.version.hip else (seen.major, seen.minor),
        memory=memory,
        free=free,
        l2=seen.L2_cache_size,
        trouble=_trouble(),
        bf16=torch.cuda.is_bf16_supported(including_emulation=False),
    )


def _trouble() -> str | None:
    """Says why Triton cannot compile for the card, in its own words' first line; None: it can."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # whatever a driver throws, of any package
        return (str(error) or type(error).__name__).splitlines()[0]
    return None
