"""The head in one kernel: hidden states and head weights in, one log-prob per agent token out, no logits in memory.

A GPU is short of memory traffic, not of arithmetic. Plain PyTorch writes the logits (N x V numbers) to the GPU's main
memory, reads them for the softmax, and again in the backward pass. Here each *program* (a block of threads) computes
one tile of the logits, BN rows by BV tokens of the vocabulary, in registers, reduces it to what is needed, and lets it
go. Main memory only sees the inputs, one number a row and tile, and the gradients.

    forward    the tile's largest logit and its sum of exp(logit - largest) for each row -> tops_JN, sums_JN; the
               target's logit, by the tile that holds it -> chosen_N. Then, in PyTorch, over the J tiles:
               top = max tops, total = sum of sums * exp(tops - top), log p = (chosen - top) - log total
    backward   the tile again; d = grad * (onehot(y) - softmax); grad_hidden += d W, grad_weight += d^T h

How to read Triton: a kernel is written for one program, which knows its place from `tl.program_id`. It works on whole
blocks: `tl.arange` makes indices, pointer + indices is a block of addresses, and `tl.load(..., mask=...)` reads those
that exist (N, D and V need not be multiples of the block). `tl.constexpr` values are fixed when the kernel is compiled.

`kernels.logprob.token_logprobs` uses this on CUDA. Without a GPU the same code runs, slowly, under Triton's
interpreter: `TRITON_INTERPRET=1 python -m pytest tests/test_kernels.py -k triton`.

Shapes: N agent tokens, D hidden, V vocabulary, J tiles of the vocabulary; BN, BD, BV: a block of each.
"""
import os

import torch
import triton
import triton.language as tl

BLOCKS = {"BN": 64, "BV": 128, "BD": 64}  # BN x BV numbers of a tile are held in registers, in fp32
SLICE = 16384  # rows of the head whose gradient is summed in fp32 at a time
WIDEN = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter multiplies bf16 as if it were integers


@triton.jit
def _dot(a, b, total, WIDEN: tl.constexpr):
    """total + a b, products summed in fp32; "ieee": fp32 inputs stay fp32 (no TF32)."""
    if WIDEN:  # changes no product: that of two bf16 numbers fits into fp32
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _read(matrix, row, column, ROWS, D: tl.constexpr):
    """Block of a matrix with D columns: rows `row`, columns `column`, 0 where there is none."""
    there = (row < ROWS) & (column < D)
    return tl.load(matrix + row * D + column, mask=there, other=0.0)


@triton.jit
def _tile(hidden, weight, n, v, N, V,
          D: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, WIDEN: tl.constexpr):
    """Logits of rows n (BN of them) and tokens v (BV): the matrix product, BD columns at a time, summed in fp32."""
    logits = tl.zeros((BN, BV), dtype=tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        # h is BN x BD; w is read as BD x BV, that is, transposed: only the addresses change
        h = _read(hidden, n[:, None], d[None, :], N, D)
        w = _read(weight, v[None, :], d[:, None], V, D)
        logits = _dot(h, w, logits, WIDEN)
    exists = v[None, :] < V
    return tl.where(exists, logits, float("-inf"))  # a token past the end has probability 0


@triton.jit
def _block(axis: tl.constexpr, B: tl.constexpr):
    """The B numbers that this program has on an axis; in 64 bits, because N x D and V x D can pass 2 billion."""
    place = tl.program_id(axis).to(tl.int64)
    return place * B + tl.arange(0, B)


@triton.jit
def _forward(hidden, weight, targets, tops, sums, chosen, N, V,
             D: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, WIDEN: tl.constexpr):
    """Program (i, j): rows of block i, tokens of block j."""
    n = _block(0, BN)
    v = _block(1, BV)
    logits = _tile(hidden, weight, n, v, N, V, D, BN, BV, BD, WIDEN)
    top = tl.max(logits, 1)  # subtracted before exp: nothing overflows
    total = tl.sum(tl.exp(logits - top[:, None]), 1)
    row = tl.program_id(1).to(tl.int64) * N + n
    tl.store(tops + row, top, mask=n < N)
    tl.store(sums + row, total, mask=n < N)
    y = tl.load(targets + n, mask=n < N, other=-1)
    hit = v[None, :] == y[:, None]  # at most one True a row; only one tile of a row has it, so no two programs write
    found = tl.sum(hit.to(tl.int32), 1) > 0
    logit = tl.sum(tl.where(hit, logits, 0.0), 1)
    tl.store(chosen + n, logit, mask=(n < N) & found)


@triton.jit
def _backward(hidden, weight, targets, top, total, grad, grad_hidden, grad_weight, first, N, V,
              D: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, WIDEN: tl.constexpr,
              HIDDEN: tl.constexpr, WEIGHT: tl.constexpr):
    """Program (i, j): rows of block i, tokens of block j counted from `first`. Many programs add to one number of the
    gradient, so they add atomically, in fp32; in which order is the GPU's choice, and the last digits with it."""
    n = _block(0, BN)
    place = _block(1, BV)  # row of grad_weight, which holds SLICE rows
    v = first + place
    logits = _tile(hidden, weight, n, v, N, V, D, BN, BV, BD, WIDEN)
    row_exists = n < N
    g = tl.load(grad + n, mask=row_exists, other=0.0)
    y = tl.load(targets + n, mask=row_exists, other=-1)
    row_top = tl.load(top + n, mask=row_exists, other=0.0)
    row_total = tl.load(total + n, mask=row_exists, other=1.0)
    softmax = tl.exp(logits - row_top[:, None]) / row_total[:, None]
    hit = v[None, :] == y[:, None]
    onehot = tl.where(hit, 1.0, 0.0)
    delta = g[:, None] * (onehot - softmax)
    delta = delta.to(hidden.dtype.element_ty)  # in bf16 for the fast matrix units
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        column = d[None, :]
        if HIDDEN:
            w = _read(weight, v[:, None], column, V, D)
            nothing = tl.zeros((BN, BD), dtype=tl.float32)
            change = _dot(delta, w, nothing, WIDEN)
            there = row_exists[:, None] & (column < D)
            tl.atomic_add(grad_hidden + n[:, None] * D + column, change, mask=there)
        if WEIGHT:
            h = _read(hidden, n[:, None], column, N, D)
            nothing = tl.zeros((BV, BD), dtype=tl.float32)
            change = _dot(tl.trans(delta), h, nothing, WIDEN)
            there = (v < V)[:, None] & (column < D)
            tl.atomic_add(grad_weight + place[:, None] * D + column, change, mask=there)


def _blocks(hidden_ND):
    """Half as many columns at a time for fp32: what a program holds then fits into the fast memory of small GPUs."""
    if hidden_ND.element_size() == 2:
        return BLOCKS
    return {**BLOCKS, "BD": max(16, BLOCKS["BD"] // 2)}


class _FusedLogprobs(torch.autograd.Function):
    """The two kernels as one differentiable operation."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N):
        hidden_ND, weight_VD = hidden_ND.contiguous(), weight_VD.contiguous()  # addresses are computed from the shape
        (N, D), V = hidden_ND.shape, len(weight_VD)
        tiles = triton.cdiv(V, BLOCKS["BV"])
        tops_JN, sums_JN = hidden_ND.new_empty(2, tiles, N, dtype=torch.float32)
        chosen_N = hidden_ND.new_empty(N, dtype=torch.float32)
        grid = (triton.cdiv(N, BLOCKS["BN"]), tiles)
        if N:
            _forward[grid](
                hidden_ND, weight_VD, targets_N, tops_JN, sums_JN, chosen_N, N, V, D,
                **_blocks(hidden_ND), WIDEN=WIDEN)
        top_N = tops_JN.amax(0)
        total_N = (sums_JN * (tops_JN - top_N).exp()).sum(0)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, top_N, total_N)
        return (chosen_N - top_N) - total_N.log()

    @staticmethod
    def backward(ctx, grad_N):
        hidden_ND, weight_VD, targets_N, top_N, total_N = ctx.saved_tensors
        (N, D), V = hidden_ND.shape, len(weight_VD)
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden_ND, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight_VD) if wants_weight else None
        # a slice of the head at a time: its gradient is summed in fp32, and kept in the head's own type
        for first in range(0, V if N else 0, SLICE):
            rows = min(SLICE, V - first)
            part = hidden_ND.new_zeros(rows if wants_weight else 1, D, dtype=torch.float32)
            grid = (triton.cdiv(N, BLOCKS["BN"]), triton.cdiv(rows, BLOCKS["BV"]))
            _backward[grid](
                hidden_ND, weight_VD, targets_N, top_N, total_N, grad_N.contiguous(),
                grad_hidden, part, first, N, first + rows, D,
                **_blocks(hidden_ND), WIDEN=WIDEN, HIDDEN=wants_hidden, WEIGHT=wants_weight)
            if wants_weight:
                grad_weight[first:first + rows] = part
        return grad_hidden.to(hidden_ND.dtype), grad_weight, None


def fused_logprobs(hidden_ND, weight_VD, targets_N):
    """Log-probability (nats, fp32) of each target token: `kernels.logprob.token_logprobs`, as Triton kernels.

    hidden_ND, weight_VD: bf16, fp16 or fp32, both alike; targets_N: token ids. Differentiable in the first two.
    """
    return _FusedLogprobs.apply(hidden_ND, weight_VD, targets_N)
