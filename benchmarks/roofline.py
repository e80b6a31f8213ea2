"""How fast one GPU could train a model at best, from what it was just measured to do.

    seconds of a step >= matrix FLOPs at the measured peak
                       + attention FLOPs at half of it
                       + bytes that must pass through memory between the products, at the measured bandwidth
                       + bytes of casting weights, clipping and AdamW, at that bandwidth

FLOPs are `smolforge.models.stats.flops_per_token`'s, causal attention counted as half. Half of the peak is the rate at
which such a kernel is fast at heads of 64; `strict` has it at the whole peak, which none reaches. Bytes are counted for
bf16 autocast over fp32 weights: products write bf16, the residual stream stays fp32. Whatever happens between two
products is taken to be one kernel, which reads what it needs and writes what others need once; what products and
attention read and write themselves hides behind their arithmetic. No product is taken to fuse what follows it.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BF16, FP32 = 2, 4
ATTENTION_SHARE = 0.5


class Machine(NamedTuple):
    """What was measured."""

    flops_per_second: float
    bytes_per_second: float


def layer_bytes(config: Any) -> dict[str, int]:
    """Bytes a token of one Llama layer, by kernel; the residual stream in fp32, all else in bf16."""
    width, inside = config.hidden_size, config.intermediate_size
    turned = (config.num_attention_heads + config.num_key_value_heads) * config.resolved_head_dim
    stream, states = FP32 * width, BF16 * width
    return {
        # stream, what a block adds to it -> stream, its norm; twice in a layer
        "add and norm": 2 * (2 * stream + 2 * states),
        # queries and keys -> the same rotated
        "rotation": 2 * BF16 * turned,
        # gate, up -> their product
        "swiglu": 3 * BF16 * inside,
        # gradient of the product, gate, up -> gradients of gate and up
        "swiglu backward": 5 * BF16 * inside,
        # gradients from gate and up, stream, its gradient -> its gradient, and that in bf16 for o_proj's products
        "norm backward, of mlp": 3 * stream + 3 * states,
        "rotation backward": 2 * BF16 * turned,
        # gradients from q, k and v, stream, its gradient -> its gradient, and that in bf16 for the layer below
        "norm backward, of attention": 3 * stream + 4 * states,
    }


def loss_bytes(config: Any) -> int:
    """Bytes a token between the head's products: logits read for their sum, read again, and their gradient written."""
    return 3 * BF16 * config.vocab_size


def weight_bytes(parameters: int) -> int:
    """Bytes of a micro-batch, whatever its size: each weight cast to bf16, each gradient cast to fp32."""
    return parameters * ((FP32 + BF16) + (BF16 + FP32))


def optimizer_bytes(parameters: int) -> int:
    """Bytes of a step: the norm reads gradients; AdamW reads weight, gradient and moments and writes all but one."""
    return parameters * (FP32 + 4 * FP32 + 3 * FP32)


def fastest_step(config: Any, length: int, tokens: int, machine: Machine, strict: bool = False) -> dict[str, float]:
    """Seconds of each part of a step of one micro-batch of so many tokens, in rows of this length."""
    from smolforge.models.stats import flops_per_token, parameter_counts

    assert config.model_type in ("llama", "qwen3"), "the bytes of other families are not counted"
    counts = parameter_counts(config)
    parameters = sum(counts.values())
    head = 6 * config.vocab_size * config.hidden_size
    matrices = flops_per_token(config, 0)
    attention = flops_per_token(config, length) - matrices
    per_flop, per_byte = 1 / machine.flops_per_second, 1 / machine.bytes_per_second
    between = config.num_hidden_layers * sum(layer_bytes(config).values())
    return {
        "products of the layers": tokens * (matrices - head) * per_flop,
        "products of the head": tokens * head * per_flop,
        "attention": tokens * attention * per_flop / (1 if strict else ATTENTION_SHARE),
        "between the products": tokens * between * per_byte,
        "loss": tokens * loss_bytes(config) * per_byte,
        "casting weights and gradients": weight_bytes(parameters) * per_byte,
        "clipping and AdamW": optimizer_bytes(parameters) * per_byte,
    }


def seconds_of(work: Callable[[], object], device: str, least: float) -> float:
    """Median seconds of a piece of work, repeated for at least so long; on a GPU by events around each."""
    for _ in range(3):
        work()
    taken: list[float] = []
    while sum(taken) < least or len(taken) < 5:
        taken += timed(work, device)
    return statistics.median(taken)


def timed(work: Callable[[], object], device: str) -> list[float]:
    """Seconds of each of a few calls."""
    if device != "cuda":
        start = time.perf_counter()
        work()
        return [time.perf_counter() - start]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    for event in events:
        event.record()
        if event is not events[-1]:
            work()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) / 1e3 for first, last in pairwise(events)]


class Gauge:
    """Measures one device, in a process of its own."""

    def __init__(self, device: str, dtype: str, quick: bool) -> None:
        self.device, self.dtype, self.quick = device, getattr(torch, dtype), quick
        self.least = 0.0 if quick else 0.3
        """Seconds that each thing is repeated for."""
        torch.manual_seed(0)

    def noise(self, *shape: int) -> Tensor:
        """Random numbers: a GPU is some 10 % faster with constants."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def about(self) -> dict[str, Any]:
        """What the device is, and the peak that an MFU on it is a share of."""
        from smolforge.device import device_name, memory_bytes
        from smolforge.device.peak_flops import device_peak

        device = torch.device(self.device)
        rate, source = device_peak(device, self.dtype)
        return {
            "name": device_name(device),
            "memory_bytes": memory_bytes(device),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "peak_flops_per_second": rate,
            "peak_source": source,
        }

    def machine(self) -> tuple[Machine, dict[str, float]]:
        """The best of several large products and copies, and all of them."""
        sides = (64,) if self.quick else (4096, 8192, 16384)
        products = {f"{side} x {side} x {side}": self.product(side, side, side) for side in sides}
        if not self.quick:
            products |= {"65536 x 4096 x 4096": self.product(65536, 4096, 4096)}
        count = 1 << (16 if self.quick else 30)
        copies = {"copy": self.copy(count), "triad": self.triad(count)}
        return Machine(max(products.values()), max(copies.values())), products | copies

    def product(self, m: int, k: int, n: int) -> float:
        """FLOP/s of (m, k) @ (k, n)."""
        a, b, out = self.noise(m, k), self.noise(k, n), self.noise(m, n)
        return 2 * m * k * n / seconds_of(lambda: torch.mm(a, b, out=out), self.device, 3 * self.least)

    def copy(self, count: int) -> float:
        """Bytes a second, read and written."""
        a, b = (self.noise(count) for _ in range(2))
        return 2 * a.nbytes / seconds_of(lambda: b.copy_(a), self.device, self.least)

    def triad(self, count: int) -> float:
        """Bytes a second of a = b + s c."""
        a, b, c = (self.noise(count) for _ in range(3))
        return 3 * a.nbytes / seconds_of(lambda: torch.add(b, c, alpha=0.5, out=a), self.device, self.least)

    def products(self, config: Any, tokens: int) -> dict[str, dict[str, float]]:
        """Seconds of a step and FLOP/s of a model's own products, forward and backward, each alone.

        So much slower than the peak is a shape whose sides do not fill the matrix units.
        """
        width, inside = config.hidden_size, config.intermediate_size
        queries, keys = (n * config.resolved_head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        layers, chunk = config.num_hidden_layers, min(tokens, 8192)
        shapes = {
            "q_proj": (tokens, width, queries, layers),
            "k_proj, v_proj": (tokens, width, keys, 2 * layers),
            "o_proj": (tokens, queries, width, layers),
            "gate_proj, up_proj": (tokens, width, inside, 2 * layers),
            "down_proj": (tokens, inside, width, layers),
            f"head, {chunk} tokens": (chunk, width, config.vocab_size, tokens / chunk),
        }
        found = {}
        for name, (m, k, n, times) in shapes.items():
            x, w, g = self.noise(m, k), self.noise(n, k), self.noise(m, n)
            each = [
                seconds_of(work, self.device, self.least / 10)
                for work in (lambda x=x, w=w: x @ w.T, lambda g=g, w=w: g @ w, lambda g=g, x=x: g.T @ x)
            ]
            found[name] = {"seconds": times * sum(each), "flops_per_second": 6 * m * k * n / sum(each)}
        return found

    def attention(self, config: Any, rows: int, length: int) -> dict[str, dict[str, Any]]:
        """Forward and backward of one layer's attention by each backend: seconds, causal FLOP/s, error against fp32."""
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        q, k, v = (
            self.noise(rows, length, n, config.resolved_head_dim).transpose(1, 2).requires_grad_() for n in heads
        )
        flops = 6 * rows * heads[0] * config.resolved_head_dim * length**2
        with torch.no_grad():
            expected = F.scaled_dot_product_attention(
                *(x[:1].float() for x in (q, k, v)), is_causal=True, enable_gqa=True
            )
        found: dict[str, dict[str, Any]] = {}
        for name, attend in kernels(rows, length, self.device).items():
            try:
                found[name] = self.one(attend, (q, k, v), expected, flops)
            except Exception as error:
                found[name] = {"failed": str(error).strip().partition("\n")[0][:120]}
        return found

    def one(self, attend: Callable[..., Tensor], qkv: Any, expected: Tensor, flops: int) -> dict[str, float]:
        out = attend(*qkv)
        gradient = torch.randn_like(out)
        error = (out[:1].float() - expected).norm() / expected.norm()

        def both() -> None:
            torch.autograd.grad(attend(*qkv), qkv, gradient)

        seconds = seconds_of(both, self.device, self.least)
        return {"seconds": seconds, "flops_per_second": flops / seconds, "error": error.item()}


def kernels(rows: int, length: int, device: str) -> dict[str, Callable[..., Tensor]]:
    """Causal attention by each backend; those without groups of heads get their keys and values repeated."""
    from job import attending

    def by(name: str, grouped: bool) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if not grouped:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            with attending(name):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        return attend

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)

    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
    found = {"default": by("default", True), "flex": flex}
    for name in ("flash", "cudnn", "efficient"):
        found |= {name: by(name, True), f"{name}, repeated": by(name, False)}
    return found
