"""What a device can do at most: its published dense matrix peaks, without sparsity, and its memory bandwidth.

A device is looked up by its whole name. A laptop's chip, a slice of a GPU (MIG) or a new sibling is not the one whose
name it shares, so what is not in the table is measured, and `Peak.source` says so.
"""

import re
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch

from smolforge.device import matrix_flops_per_second, name_of


class Published(NamedTuple):
    """Rates in TFLOP/s, accumulated in fp32; None where the device has no such units. Bandwidth in GB/s."""

    bfloat16: float | None
    float16: float
    tf32: float | None
    float32: float
    bandwidth: float
    source: str


H100 = "nvidia.com/en-us/data-center/h100 (halved: given with sparsity)"
H200 = "nvidia.com/en-us/data-center/h200 (halved: given with sparsity)"
GH200 = "NVIDIA GH200 Grace Hopper Superchip datasheet (halved: given with sparsity)"
B200 = "nvidia.com/en-us/data-center/hgx and gb200-nvl72, for one GPU (halved: given with sparsity)"
A100 = "NVIDIA A100 datasheet 1758950-r4"
A10 = "NVIDIA A10 datasheet"
A10G = "NVIDIA AWS A10G datasheet, February 2022"
A40 = "NVIDIA A40 datasheet"
L4 = "NVIDIA L4 datasheet (halved: given with sparsity)"
L40 = "NVIDIA L40 and L40S datasheets"
V100 = "NVIDIA V100 datasheet 1165301-r5"
T4 = "NVIDIA T4 datasheet 951643"
AMPERE = "NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A"
ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A"
BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A"
MI300X = "AMD Instinct MI300X data sheet"
M1 = "apple.com/newsroom, 2020-11 and 2021-10; fp16 runs as fp32 does: github.com/philipturner/metal-benchmarks"
M2 = "apple.com/newsroom, 2022-06; fp16 runs as fp32 does: github.com/philipturner/metal-benchmarks"

DEVICES = {
    # name                      bf16     fp16    tf32    fp32    GB/s
    "B200": Published(2250.0, 2250.0, 1100.0, 75.0, 7700.0, B200),
    "GB200": Published(2500.0, 2500.0, 1250.0, 80.0, 8000.0, B200),
    "GH200 144G HBM3e": Published(989.5, 989.5, 494.5, 67.0, 4900.0, GH200),
    "GH200 480GB": Published(989.5, 989.5, 494.5, 67.0, 4000.0, GH200),
    "H200": Published(989.5, 989.5, 494.5, 67.0, 4800.0, H200),
    "H200 NVL": Published(835.5, 835.5, 417.5, 60.0, 4800.0, H200),
    "H100 80GB HBM3": Published(989.5, 989.5, 494.5, 67.0, 3350.0, H100),
    "H100 NVL": Published(835.5, 835.5, 417.5, 60.0, 3900.0, H100),
    "H100 PCIe": Published(756.5, 756.5, 378.0, 51.0, 2000.0, H100),
    "A100 80GB PCIe": Published(312.0, 312.0, 156.0, 19.5, 1935.0, A100),
    "A100-SXM*-80GB": Published(312.0, 312.0, 156.0, 19.5, 2039.0, A100),
    "A100-*-40GB": Published(312.0, 312.0, 156.0, 19.5, 1555.0, A100),
    "A40": Published(149.7, 149.7, 74.8, 37.4, 696.0, A40),
    "A10": Published(125.0, 125.0, 62.5, 31.2, 600.0, A10),
    "A10G": Published(70.0, 70.0, 35.0, 35.0, 600.0, A10G),
    "L40S": Published(362.05, 362.05, 183.0, 91.6, 864.0, L40),
    "L40": Published(181.05, 181.05, 90.5, 90.5, 864.0, L40),
    "L4": Published(121.0, 121.0, 60.0, 30.3, 300.0, L4),
    "V100-SXM[23]-*GB": Published(None, 125.0, None, 15.7, 900.0, V100),
    "V100-PCIE-*GB": Published(None, 112.0, None, 14.0, 900.0, V100),
    "T4": Published(None, 65.0, None, 8.1, 320.0, T4),
    "RTX 5090": Published(209.5, 209.5, 104.8, 104.8, 1792.0, BLACKWELL),
    "RTX 4090": Published(165.2, 165.2, 82.6, 82.6, 1008.0, ADA),
    "RTX 4080": Published(97.5, 97.5, 48.7, 48.7, 716.8, ADA),
    "RTX 3090": Published(71.0, 71.0, 35.6, 35.6, 936.0, AMPERE),
    "MI300X": Published(1307.4, 1307.4, 653.7, 163.4, 5300.0, MI300X),
    "M1 8-core": Published(None, 2.6, None, 2.6, 68.25, M1),
    "M1 Pro 16-core": Published(None, 5.2, None, 5.2, 200.0, M1),
    "M1 Max 32-core": Published(None, 10.4, None, 10.4, 400.0, M1),
    "M2 10-core": Published(None, 3.6, None, 3.6, 100.0, M2),
}


class Peak(NamedTuple):
    """The most FLOP/s of one device, and whether that is `published` or `measured`."""

    flops_per_second: float
    source: str


def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """What an MFU on this device is a share of: the published peak, else the best of a few matrix products."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    known = flops_per_second(name_of(device), "tf32" if tf32 else str(dtype).removeprefix("torch."))
    return Peak(known, "published") if known else Peak(matrix_flops_per_second(device, dtype), "measured")


def flops_per_second(name: str, kind: str) -> float | None:
    """The published peak of a device for bfloat16, float16, tf32 or float32 matrices; None where none is known."""
    found = published(name)
    rate = found._asdict().get(kind) if found else None
    return rate * 1e12 if rate else None


def published(name: str) -> Published | None:
    """The row of a device by its whole name as torch tells it, maker and line aside; None where there is none."""
    plain = re.sub(r"\b(nvidia|amd|apple|tesla|geforce|instinct)\b\s*", "", name.casefold()).strip()
    return next((row for pattern, row in DEVICES.items() if fnmatchcase(plain, pattern.casefold())), None)
