"""What a device can do at most: its published dense matrix peaks, without sparsity, and its memory bandwidth.

A device is looked up by its whole name. A laptop's chip, a slice of a GPU (MIG) or a new sibling is not the one whose
name it shares, so what is not in the table is measured, and `Peak.source` says so.
"""

import re
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch

from smolforge.device import device_name, matmul_flops_per_second


class PublishedPeak(NamedTuple):
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

PUBLISHED_PEAKS = {
    # name                      bf16     fp16    tf32    fp32    GB/s
    "B200": PublishedPeak(2250.0, 2250.0, 1100.0, 75.0, 7700.0, B200),
    "GB200": PublishedPeak(2500.0, 2500.0, 1250.0, 80.0, 8000.0, B200),
    "GH200 144G HBM3e": PublishedPeak(989.5, 989.5, 494.5, 67.0, 4900.0, GH200),
    "GH200 480GB": PublishedPeak(989.5, 989.5, 494.5, 67.0, 4000.0, GH200),
    "H200": PublishedPeak(989.5, 989.5, 494.5, 67.0, 4800.0, H200),
    "H200 NVL": PublishedPeak(835.5, 835.5, 417.5, 60.0, 4800.0, H200),
    "H100 80GB HBM3": PublishedPeak(989.5, 989.5, 494.5, 67.0, 3350.0, H100),
    "H100 NVL": PublishedPeak(835.5, 835.5, 417.5, 60.0, 3900.0, H100),
    "H100 PCIe": PublishedPeak(756.5, 756.5, 378.0, 51.0, 2000.0, H100),
    "A100 80GB PCIe": PublishedPeak(312.0, 312.0, 156.0, 19.5, 1935.0, A100),
    "A100-SXM*-80GB": PublishedPeak(312.0, 312.0, 156.0, 19.5, 2039.0, A100),
    "A100-*-40GB": PublishedPeak(312.0, 312.0, 156.0, 19.5, 1555.0, A100),
    "A40": PublishedPeak(149.7, 149.7, 74.8, 37.4, 696.0, A40),
    "A10": PublishedPeak(125.0, 125.0, 62.5, 31.2, 600.0, A10),
    "A10G": PublishedPeak(70.0, 70.0, 35.0, 35.0, 600.0, A10G),
    "L40S": PublishedPeak(362.05, 362.05, 183.0, 91.6, 864.0, L40),
    "L40": PublishedPeak(181.05, 181.05, 90.5, 90.5, 864.0, L40),
    "L4": PublishedPeak(121.0, 121.0, 60.0, 30.3, 300.0, L4),
    "V100-SXM[23]-*GB": PublishedPeak(None, 125.0, None, 15.7, 900.0, V100),
    "V100-PCIE-*GB": PublishedPeak(None, 112.0, None, 14.0, 900.0, V100),
    "T4": PublishedPeak(None, 65.0, None, 8.1, 320.0, T4),
    "RTX 5090": PublishedPeak(209.5, 209.5, 104.8, 104.8, 1792.0, BLACKWELL),
    "RTX 4090": PublishedPeak(165.2, 165.2, 82.6, 82.6, 1008.0, ADA),
    "RTX 4080": PublishedPeak(97.5, 97.5, 48.7, 48.7, 716.8, ADA),
    "RTX 3090": PublishedPeak(71.0, 71.0, 35.6, 35.6, 936.0, AMPERE),
    "MI300X": PublishedPeak(1307.4, 1307.4, 653.7, 163.4, 5300.0, MI300X),
    "M1 8-core": PublishedPeak(None, 2.6, None, 2.6, 68.25, M1),
    "M1 Pro 16-core": PublishedPeak(None, 5.2, None, 5.2, 200.0, M1),
    "M1 Max 32-core": PublishedPeak(None, 10.4, None, 10.4, 400.0, M1),
    "M2 10-core": PublishedPeak(None, 3.6, None, 3.6, 100.0, M2),
}


class Peak(NamedTuple):
    """The most FLOP/s of one device, and whether that is `published` or `measured`."""

    flops_per_second: float
    source: str


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Return the peak that MFU is a fraction of: the published one, else the best of a few matrix products."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    rate = published_flops_per_second(device_name(device), "tf32" if tf32 else str(dtype).removeprefix("torch."))
    return Peak(rate, "published") if rate else Peak(matmul_flops_per_second(device, dtype), "measured")


def published_flops_per_second(name: str, kind: str) -> float | None:
    """Return the published peak of a device for bfloat16, float16, tf32 or float32 matrices;
    None where none is known.
    """
    device = find_published_peak(name)
    rate = device._asdict().get(kind) if device else None
    return rate * 1e12 if rate else None


def find_published_peak(name: str) -> PublishedPeak | None:
    """Return the row of a device by its full name in torch, without maker and line; None where there is none."""
    model_name = re.sub(r"\b(nvidia|amd|apple|tesla|geforce|instinct)\b\s*", "", name.casefold()).strip()
    return next((row for pattern, row in PUBLISHED_PEAKS.items() if fnmatchcase(model_name, pattern.casefold())), None)
