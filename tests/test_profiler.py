"""Where the time goes: three tiny steps, and events made by hand for what this machine has not."""

import gzip
import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from smolforge.models.decoder import build
from smolforge.runs.profiler import IDLE, REST, OperatorTime, Profiler, format_summary, kind, time_by_operator
from smolforge.testing import tiny_config
from smolforge.training.loss import loss_sum
from smolforge.training.step_timer import HostClock, StepCost, StepTimer

CUTLASS = "void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("aten::mm", "aten::linear", "forward"), "matrix products"),
        (("aten::addmm_",), "matrix products"),
        (("aten::_grouped_mm",), "matrix products"),
        (("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTN",), "matrix products"),
        (("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64",), "matrix products"),
        (("void cublasLt::splitKreduce_kernel<32, 16>",), "matrix products"),
        (("triton_tem_fused_mm_3",), "matrix products"),
        (("aten::mm", "torch_nn::_linear_cross_entropy_batch_chunked", "forward"), "matrix products"),
        (("aten::amax", "torch_nn::_linear_cross_entropy_batch_chunked", "forward"), "loss"),
        (("void (anonymous namespace)::cunn_SoftMaxForward<LogSoftMaxForwardEpilogue>",), "loss"),
        (("triton_red_fused__log_softmax_4",), "loss"),
        (("aten::_softmax", "forward"), REST),
        (("aten::_scaled_dot_product_flash_attention_for_cpu", "forward"), "attention"),
        (("aten::bmm", "aten::_scaled_dot_product_attention_math"), "attention"),
        ((CUTLASS,), "attention"),
        (("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16",), "attention"),
        (("triton_tem_fused_flex_attention_0",), "attention"),
        (("triton_poi_fused__to_copy_mul_silu_7",), REST),
        (("triton_poi_fused_addmm_view_2",), REST),
        (("aten::rsqrt", "forward"), REST),
        (("CompiledFxGraph", "forward"), REST),
        (("aten::_fused_adamw_", "Optimizer.step#AdamW.step"), "optimizer"),
        (("aten::mm", "Optimizer.step#Muon.step", "optimizer"), "optimizer"),
        (("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>",), "optimizer"),
        (("aten::copy_", "data", "ProfilerStep*"), "data"),
        (("data", "ProfilerStep*"), "data"),
        (("enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__",), "data"),
        (("Memcpy HtoD (Pinned -> Device)",), "copies, communication"),
        (("ncclDevKernel_AllReduce_Sum_f32_RING_LL",), "copies, communication"),
        (("gloo:all_reduce", "backward"), "copies, communication"),
        (("void at::native::direct_copy_kernel_cuda",), "copies, communication"),
        (("ProfilerStep*",), IDLE),
        (("backward", "ProfilerStep*"), IDLE),
        (("autograd::engine::evaluate_function: MmBackward0", "backward"), IDLE),
        (("MmBackward0", "backward"), IDLE),
    ],
)
def test_kind_classifies_operators_and_kernels(names, expected):
    assert kind(names) == expected


def event(name, seconds, parent=None, kernels=(), device=DeviceType.CPU, annotation=False, asynchronous=False):
    return SimpleNamespace(
        name=name,
        self_cpu_time_total=1e6 * seconds,
        cpu_parent=parent,
        kernels=[SimpleNamespace(name=kernel, duration=1e6 * taken) for kernel, taken in kernels],
        device_type=device,
        is_user_annotation=annotation,
        is_async=asynchronous,
        time_range=SimpleNamespace(elapsed_us=lambda: 1e6 * seconds),
    )


def test_spent_on_cpu_is_the_time_of_each_operator():
    step = event("ProfilerStep*", 1.0)
    graph = event("## Call CompiledFxGraph fadamwsdpamm ##", 2.0, step, annotation=True)
    found = time_by_operator([step, graph, event("aten::mm", 3.0, graph), event("late", 9.0, asynchronous=True)])
    assert found == [
        (("ProfilerStep*",), 1.0),
        (("CompiledFxGraph", "ProfilerStep*"), 2.0),
        (("aten::mm", "CompiledFxGraph", "ProfilerStep*"), 3.0),
    ]


def test_spent_on_gpu_is_the_time_of_each_kernel():
    """A range has a shadow on the device, which is no work; a kernel of a CUDA graph was launched by no operator."""
    chunked = event("aten::linear_cross_entropy", 5.0, kernels=[("vectorized_elementwise", 0.25)])
    ranged = event("optimizer", 4.0, kernels=[("optimizer", 3.0), ("gemm", 0.5)])
    device = [("vectorized_elementwise", 0.25), ("vectorized_elementwise", 0.75), ("gemm", 0.5), ("gemm", 1.5)]
    events = [
        chunked,
        ranged,
        *(event(name, seconds, device=DeviceType.CUDA) for name, seconds in device),
        event("optimizer", 3.0, device=DeviceType.CUDA, annotation=True),
    ]
    kinds = {}
    for names, seconds in time_by_operator(events):
        kinds[kind(names)] = kinds.get(kind(names), 0) + seconds
    expected = {"loss": 0.25, "optimizer": 0.5, REST: 0.75, "matrix products": 1.5}
    assert kinds == pytest.approx(expected)


def test_summary_adds_up_to_the_wall_time():
    taken = [("aten::mm", 0.5), ("aten::mm", 0.3), ("aten::add", 0.2), ("data", 0.1), ("backward", 0.4)]
    text = format_summary([OperatorTime((name,), seconds) for name, seconds in taken], 2.0, 2)
    assert text.startswith("2 steps of 1000.00 ms")
    assert re.findall(r"([\d.]+)% +([\d.]+) ms  (.*)", text) == [
        ("45.0", "450.00", IDLE),
        ("40.0", "400.00", "matrix products"),
        ("10.0", "100.00", REST),
        ("5.0", "50.00", "data"),
        ("40.0", "400.00", "aten::mm, 1 x"),
        ("10.0", "100.00", "aten::add, 0 x"),
        ("5.0", "50.00", "data, 0 x"),
    ]


def steps(profile, count):
    """So many steps of a tiny model, their parts shown."""
    model, ids = build(tiny_config()), torch.randint(320, (2, 32))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    meter = StepTimer(StepCost(64, 1, 1, 1.0), count, HostClock(), annotate=torch.profiler.record_function)
    for _ in range(count):
        with meter.step():
            with meter.phase("forward"):
                loss, _ = loss_sum(model.hidden_states(ids), model.lm_head_weight, ids)
            with meter.phase("backward"):
                loss.backward()
            with meter.phase("optimizer"):
                optimizer.step()
        profile.step(None, {})


@pytest.mark.parametrize(("count", "timed"), [(3, 2), (6, 3)])
def test_profile_covers_three_steps_after_the_first(tmp_path, count, timed):
    with Profiler(tmp_path, 3) as profile:
        steps(profile, count)
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert {"aten::mm", "forward", "backward", "optimizer"} <= set(names)
    text = (tmp_path / "profile" / "summary.txt").read_text()
    assert text.startswith(f"{timed} steps of ")
    kinds, longest = text.split("longest operators")
    shares = {name: float(share) for share, name in re.findall(r"([\d.]+)% .* ms  (.*)", kinds)}
    assert set(shares) == {"matrix products", "attention", "loss", "optimizer", "copies, communication", REST, IDLE}
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    assert longest.count(" x\n") == 10


def test_profile_of_a_one_step_run_warns_and_writes_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "smolforge"), Profiler(tmp_path, 3) as profile:
        steps(profile, 1)
    assert "nothing was profiled" in caplog.text
    assert not (tmp_path / "profile").exists()
