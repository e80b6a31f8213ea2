"""What a device can do at most, and what it draws: tables and counters, all of them faked."""

import sys
from types import SimpleNamespace

import pytest
import torch

from smolforge import device as device_module
from smolforge.device import device_name, matmul_flops_per_second, measure_matmul_flops, peak_flops, pick_device, usage
from smolforge.device.peak_flops import PUBLISHED_PEAKS, device_peak, find_published_peak, published_flops_per_second
from smolforge.device.usage import EnergyPerToken, joule_counter

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "bfloat16", "bandwidth"),
    [
        ("NVIDIA H200", 989.5, 4800.0),
        ("NVIDIA H200 NVL", 835.5, 4800.0),
        ("NVIDIA H100 80GB HBM3", 989.5, 3350.0),
        ("NVIDIA H100 PCIe", 756.5, 2000.0),
        ("NVIDIA H100 NVL", 835.5, 3900.0),
        ("NVIDIA GH200 480GB", 989.5, 4000.0),
        ("NVIDIA B200", 2250.0, 7700.0),
        ("NVIDIA A100-SXM4-40GB", 312.0, 1555.0),
        ("A100-PCIE-40GB", 312.0, 1555.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 2039.0),
        ("NVIDIA A100 80GB PCIe", 312.0, 1935.0),
        ("NVIDIA A10", 125.0, 600.0),
        ("NVIDIA A10G", 70.0, 600.0),
        ("NVIDIA L4", 121.0, 300.0),
        ("NVIDIA L40S", 362.05, 864.0),
        ("NVIDIA GeForce RTX 4090", 165.2, 1008.0),
        ("GeForce RTX 3090", 71.0, 936.0),
        ("Tesla V100-SXM2-32GB", None, 900.0),
        ("Tesla T4", None, 320.0),
        ("AMD Instinct MI300X", 1307.4, 5300.0),
        ("Apple M1 Max 32-core", None, 400.0),
    ],
)
def test_peak_flops_knows_devices_by_their_full_name(name, bfloat16, bandwidth):
    row = find_published_peak(name)
    assert row is not None
    assert (row.bfloat16, row.bandwidth) == (bfloat16, bandwidth)
    assert published_flops_per_second(name, "bfloat16") == (bfloat16 and bfloat16 * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H20",
        "NVIDIA H100 64GB HBM2",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-80GB MIG 7g.80gb",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A1000",
        "NVIDIA L400",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A10-24Q",
        "Apple M1 7-core",
        "Apple M4 10-core",
        "AMD EPYC",
    ],
)
def test_peak_flops_refuses_similar_device_names(name):
    assert find_published_peak(name) is None


def test_peak_flops_table_is_dense_and_ordered():
    for name, row in PUBLISHED_PEAKS.items():
        rates = [rate for rate in row[:4] if rate is not None]
        assert rates == sorted(rates, reverse=True), name
        assert row.source, name
    assert max(row.bfloat16 or 0 for row in PUBLISHED_PEAKS.values()) == 2500.0  # 5,000 is with sparsity


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        (torch.bfloat16, "ieee", 989.5e12),
        (torch.float16, "tf32", 989.5e12),
        (torch.float32, "ieee", 67e12),
        (torch.float32, "tf32", 494.5e12),
    ],
)
def test_peak_depends_on_dtype_and_tf32(monkeypatch, dtype, precision, expected):
    matmul = SimpleNamespace(fp32_precision=precision)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(peak_flops, "device_name", lambda device: "NVIDIA H200")
    assert device_peak(CPU, dtype) == (expected, "published")


def test_torch_reports_tf32_matmuls():
    before = torch.get_float32_matmul_precision()
    try:
        for precision, said in (("high", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(precision)
            assert torch.backends.cuda.matmul.fp32_precision == said
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("name", "dtype"), [("some new chip", torch.float32), ("Tesla T4", torch.bfloat16), ("NVIDIA H200", torch.float64)]
)
def test_peak_is_measured_where_none_is_published(monkeypatch, name, dtype):
    monkeypatch.setattr(peak_flops, "device_name", lambda device: name)
    monkeypatch.setattr(peak_flops, "matmul_flops_per_second", lambda device, dtype: 123.0)
    assert device_peak(CPU, dtype) == (123.0, "measured")


def test_best_product_keeps_the_random_state():
    before = torch.get_rng_state()
    assert measure_matmul_flops(CPU, torch.float32, runs=1) > 1e9
    assert torch.equal(torch.get_rng_state(), before)


def test_matrix_flops_are_measured_once_per_thread_count(monkeypatch):
    asked, threads = [], torch.get_num_threads()
    monkeypatch.setattr(device_module, "measure_matmul_flops", lambda device, dtype, runs: asked.append(dtype) or 5e9)
    device_module._cached_flops_per_second.cache_clear()
    try:
        for count in (1, 1, 2, 1):
            torch.set_num_threads(count)
            assert [matmul_flops_per_second(CPU, dtype) for dtype in (torch.float32, torch.float64)] == [5e9, 5e9]
        assert len(asked) == 4
    finally:
        torch.set_num_threads(threads)
        device_module._cached_flops_per_second.cache_clear()


def test_cpu_has_a_name():
    assert device_name(pick_device("cpu"))


def test_energy_is_not_counted_without_a_gpu():
    assert joule_counter(CPU) is None


class NVML(Exception):
    pass


@pytest.mark.parametrize("known", [True, False])
def test_nvml_finds_a_gpu_by_its_uuid(monkeypatch, known):
    readings = iter([1_000_000, 1_000_000, 1_250_000])

    def handle(uuid):
        if not known:
            raise NVML
        return uuid

    def total(handle):
        assert handle == "GPU-1234"
        return next(readings)

    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=total,
        NVMLError=NVML,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(usage, "uuid_of", lambda device: "1234")
    counter = joule_counter(torch.device("cuda"))
    assert (counter and [counter(), counter()]) == ([1000.0, 1250.0] if known else None)


def test_nvml_missing_gives_no_counters(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(usage, "uuid_of", lambda device: "1234")
    assert joule_counter(torch.device("cuda")) is None


def test_joules_per_token_cover_all_steps_so_far():
    drawn, now = iter([100.0, 130.0, 190.0]), iter([0.0, 5.0, 10.0, 10.0, 12.0, 25.0, 25.0])
    counted = EnergyPerToken(lambda: next(drawn), 5, lambda: next(now))
    assert [counted.sample() for _ in range(4)] == [
        {},
        {"joules_per_token": 30 / (2 * 5)},
        {},
        {"joules_per_token": 90 / (4 * 5)},
    ]
    assert EnergyPerToken(None, 5, iter([0.0, 20.0, 20.0]).__next__).sample() == {}


@pytest.mark.parametrize(("times", "name"), [(2.0, "bfloat16"), (1.2, "float32"), (0.14, "float32")])
def test_fastest_dtype_is_robust_to_a_slow_measurement(monkeypatch, times, name):
    """Twice in five, another program takes the processor away."""
    seen = {torch.bfloat16: 0, torch.float32: 0}

    def measured(device, dtype, runs):
        seen[dtype] += 1
        alone = times if dtype == torch.bfloat16 else 1.0
        return alone / 10 if (seen[dtype], dtype) in ((2, torch.bfloat16), (4, torch.float32)) else alone

    monkeypatch.setattr(device_module, "measure_matmul_flops", measured)
    device_module.explain_fastest_dtype.cache_clear()
    assert device_module.fastest_dtype(CPU) == name
    device_module.explain_fastest_dtype.cache_clear()


@pytest.mark.parametrize(
    ("capability", "units", "dtype"),
    [((7, 5), False, "float32"), ((8, 0), True, "bfloat16"), ((9, 0), True, "bfloat16")],
)
def test_gpus_take_bfloat16_only_where_they_have_units_for_it(monkeypatch, capability, units, dtype):
    """A T4 (7.5) emulates bfloat16, which torch calls supported unless asked not to."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: units or including_emulation)
    device_module.explain_fastest_dtype.cache_clear()
    chosen, reason = device_module.explain_fastest_dtype(torch.device("cuda"))
    assert chosen == dtype
    assert "{}.{}".format(*capability) in reason
    device_module.explain_fastest_dtype.cache_clear()
