"""The roofline constants: what one rank's chip can do at most, from vendors' data sheets.

    chip = find_chip("h100")

A chip is what one rank drives: a GPU, or one of the two dies of an MI250X. Peaks are those of dense products; the
doubled numbers that data sheets give for 2:4 sparsity are not used. Bandwidths of links count one direction. The share
of all this that a run reaches is an assumption (``assumptions.py``). The processor of this machine is measured instead
(``probe.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megasparse.config.loader import ConfigError

AS_OF = "2026-11-21"
"""Date of the table below."""
HERE = "here"
"""Name of this machine's processor, which is in no table."""

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Chip:
    """Constants of one rank's chip. Bytes, bytes a second, FLOPs a second, watts."""

    name: str
    title: str
    peak: Mapping[str, float]
    """FLOPs a second of dense products, by `train.precision`; a precision that is missing is not supported."""
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    """To the other ranks of the node, one direction."""
    network_bandwidth: float
    """A rank's share of the node's network adapters in the vendor's own system, one direction."""
    ranks_per_node: int
    watts: float
    source: str
    device: str = "cuda"


def _tensor_cores(fp32: float, half: float, *, bf16: bool = True) -> Mapping[str, float]:
    peaks = {"fp32": fp32 * TERA, "fp16": half * TERA}
    return MappingProxyType({**peaks, "bf16": half * TERA} if bf16 else peaks)


# fp32 is the peak without TF32, which torch does not use for float32 products unless it is told to.
_TABLE = (
    Chip(
        name="v100",
        title="NVIDIA V100 SXM2 32 GB",
        peak=_tensor_cores(15.7, 125, bf16=False),
        memory=32 * GIGA,
        memory_bandwidth=900 * GIGA,
        link_bandwidth=150 * GIGA,
        network_bandwidth=6.25 * GIGA,
        ranks_per_node=8,
        watts=300,
        source="NVIDIA V100 data sheet (NVLink 300 GB/s both ways); DGX-1: 4 x 100 Gb/s InfiniBand for 8 GPUs",
    ),
    Chip(
        name="a100-40gb",
        title="NVIDIA A100 SXM4 40 GB",
        peak=_tensor_cores(19.5, 312),
        memory=40 * GIGA,
        memory_bandwidth=1555 * GIGA,
        link_bandwidth=300 * GIGA,
        network_bandwidth=25 * GIGA,
        ranks_per_node=8,
        watts=400,
        source="NVIDIA A100 data sheet (NVLink 600 GB/s both ways); DGX A100: 8 x 200 Gb/s InfiniBand HDR for 8 GPUs",
    ),
    Chip(
        name="a100-80gb",
        title="NVIDIA A100 SXM4 80 GB",
        peak=_tensor_cores(19.5, 312),
        memory=80 * GIGA,
        memory_bandwidth=2039 * GIGA,
        link_bandwidth=300 * GIGA,
        network_bandwidth=25 * GIGA,
        ranks_per_node=8,
        watts=400,
        source="NVIDIA A100 80GB data sheet (NVLink 600 GB/s both ways); DGX A100: 8 x 200 Gb/s InfiniBand HDR",
    ),
    Chip(
        name="h100",
        title="NVIDIA H100 SXM5 80 GB",
        peak=_tensor_cores(67, 989.4),
        memory=80 * GIGA,
        memory_bandwidth=3350 * GIGA,
        link_bandwidth=450 * GIGA,
        network_bandwidth=50 * GIGA,
        ranks_per_node=8,
        watts=700,
        source="NVIDIA H100 data sheet (NVLink 900 GB/s both ways); DGX H100: 8 x 400 Gb/s InfiniBand NDR for 8 GPUs",
    ),
    Chip(
        name="h200",
        title="NVIDIA H200 SXM 141 GB",
        peak=_tensor_cores(67, 989.4),
        memory=141 * GIGA,
        memory_bandwidth=4800 * GIGA,
        link_bandwidth=450 * GIGA,
        network_bandwidth=50 * GIGA,
        ranks_per_node=8,
        watts=700,
        source="NVIDIA H200 data sheet (NVLink 900 GB/s both ways); DGX H200: 8 x 400 Gb/s InfiniBand NDR for 8 GPUs",
    ),
    Chip(
        name="b200",
        title="NVIDIA B200 SXM 180 GB, 1,000 W",
        peak=_tensor_cores(80, 2250),
        memory=180 * GIGA,
        memory_bandwidth=8000 * GIGA,
        link_bandwidth=900 * GIGA,
        network_bandwidth=50 * GIGA,
        ranks_per_node=8,
        watts=1000,
        source="NVIDIA Blackwell and DGX B200 data sheets (1,440 GB and 14.4 TB/s NVLink for 8 GPUs; 8 x 400 Gb/s)",
    ),
    Chip(
        name="mi250x",
        title="AMD Instinct MI250X, one of its two dies (a rank each)",
        peak=_tensor_cores(47.9, 191.5),
        memory=64 * GIGA,
        memory_bandwidth=1638 * GIGA,
        link_bandwidth=50 * GIGA,
        network_bandwidth=12.5 * GIGA,
        ranks_per_node=8,
        watts=280,
        source="AMD MI250X data sheet, halved (383 TFLOP/s, 95.7 matrix fp32, 128 GB, 3.2 TB/s, 560 W); slowest pair "
        "of dies in a Frontier node 50 GB/s; 4 x 200 Gb/s Slingshot for 8 dies",
    ),
    Chip(
        name="mi300x",
        title="AMD Instinct MI300X 192 GB",
        peak=_tensor_cores(163.4, 1307.4),
        memory=192 * GIGA,
        memory_bandwidth=5300 * GIGA,
        link_bandwidth=448 * GIGA,
        network_bandwidth=50 * GIGA,
        ranks_per_node=8,
        watts=750,
        source="AMD MI300X data sheet (7 Infinity Fabric links of 128 GB/s both ways); 8 x 400 Gb/s for 8 GPUs",
    ),
)
CHIPS: Mapping[str, Chip] = MappingProxyType({chip.name: chip for chip in _TABLE})


def find_chip(name: str) -> Chip:
    """Raises ConfigError for a name that is not in the table."""
    if name not in CHIPS:
        raise ConfigError(f"--chip: {name!r} is unknown; must be one of {', '.join([HERE, *CHIPS])}")
    return CHIPS[name]
