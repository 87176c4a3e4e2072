"""The head on a GPU: time and peak memory of the Triton kernel against those who do the same (see bench/speed.py).

    python -m bench.gpu

Forward and backward in bf16, D 4096, V 128256, N 2048 and 8192, every row an agent token. "of matmul peak": the time
that the three matrix products alone take, as measured here, over the time taken. Peers: `pip install trl liger-kernel
cut-cross-entropy`; what is not there, peer or GPU, is "not measured".

Shapes: N agent tokens, D hidden, V vocabulary.
"""
import statistics

import torch

from bench.speed import REPEATS, eager, header, installed, row
from kernels.logprob import token_logprobs


def gpu_peers():
    """name -> function(hidden, weight, targets) -> log-probs, or None where the package is missing."""
    peers = {"naive": eager, "torch.compile(naive)": torch.compile(eager), "Liger": None, "cut-cross-entropy": None,
             "TRL selective_log_softmax": None}
    if installed("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
        peers["Liger"] = lambda h, w, y: -liger(h, w, y, reduction="none")
    if installed("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy
        peers["cut-cross-entropy"] = lambda h, w, y: -linear_cross_entropy(h, w, y, reduction="none")
    if installed("trl"):
        from trl.trainer.utils import selective_log_softmax
        peers["TRL selective_log_softmax"] = lambda h, w, y: selective_log_softmax(h @ w.T, y)
    return peers


def gpu_cost(work):
    """Milliseconds and peak GB above the inputs of one call, the median of several after a warm-up."""
    times = []
    for _ in range(3 + REPEATS):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:]), (torch.cuda.max_memory_allocated() - before) / 2 ** 30


def bench_gpu():
    """One row for each contender and N."""
    print(f"torch {torch.__version__}; GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    header("head on the GPU, N x 128256 x 4096, bf16", "contender", "ms", "peak GB", "of matmul peak", "difference")
    if not torch.cuda.is_available():
        return row("log-probs forward + backward", *["not measured"] * 5)
    for n in (2048, 8192):
        hidden = torch.randn(n, 4096, device="cuda", dtype=torch.bfloat16).requires_grad_()
        weight = (torch.randn(128256, 4096, device="cuda") / 64).bfloat16().requires_grad_()
        targets = torch.randint(128256, (n,), device="cuda")
        with torch.no_grad():  # forward and backward need three such products
            product = gpu_cost(lambda h=hidden, w=weight: h @ w.T)[0]
        want = token_logprobs(hidden, weight, targets).detach()
        for name, peer in {"ours": token_logprobs, **gpu_peers()}.items():
            def work(peer=peer, hidden=hidden, weight=weight, targets=targets):
                hidden.grad = weight.grad = None
                value = peer(hidden, weight, targets)
                value.sum().backward()
                return value.detach()
            if peer is None:
                row(f"N {n}", name, *["not measured"] * 4)
                continue
            milliseconds, peak = gpu_cost(work)
            row(f"N {n}", name, f"{milliseconds:.1f}", f"{peak:.2f}", f"{3 * product / milliseconds:.0%}",
                f"{(work().float() - want).abs().max().item():.0e}")


if __name__ == "__main__":
    bench_gpu()
