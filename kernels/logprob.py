"""Log-probabilities of the agent's tokens: the one number that critic, actor and ranking are all made of.

A causal language model turns T tokens into hidden states; the head (a V x D matrix) turns each hidden state into V
logits; the log-prob of token y is  logits[y] - logsumexp(logits).  Two savings keep this cheap and neither changes a
number:

1. Only rows that predict an *agent* token go through the head (about a fifth of a dialogue).
2. The head is applied to a chunk of rows at a time and its logits are recomputed in the backward pass, so that no
   N x V tensor exists (N = 2048 rows of a 128k vocabulary would be 1 GB in fp32, several times over).

Place in the data flow: (input_ids, turn_ids) from `env.render` -> `collate` -> `turn_logprobs` -> sums and lengths
per turn. Exercised by `python -m pytest tests/test_logprob.py`.

Shapes: B batch, T tokens, K turns, D hidden, V vocabulary, N agent tokens in the batch.
"""
import torch
from tqdm import tqdm

from kernels.fit import check_context


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(h W^T)[y], a chunk of rows at a time, with the gradient written out:

        d logp / d logits = onehot(y) - softmax(logits),   d logits / d h = W,   d logits / d W = h
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, chunk):
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
        ctx.chunk = chunk
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)  # bf16 sums over V lose digits; fp64 stays fp64
        logprobs_N = torch.empty(len(targets_N), dtype=wide, device=hidden_ND.device)
        for rows in torch.arange(len(targets_N), device=hidden_ND.device).split(chunk):
            logits = (hidden_ND[rows] @ weight_VD.T).to(wide)
            chosen = logits.gather(-1, targets_N[rows, None]).squeeze(-1)
            logprobs_N[rows] = chosen - logits.logsumexp(-1)
        return logprobs_N

    @staticmethod
    def backward(ctx, grad_N):
        hidden_ND, weight_VD, targets_N = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=grad_N.dtype) if ctx.needs_input_grad[1] else None
        for rows in torch.arange(len(targets_N), device=hidden_ND.device).split(ctx.chunk):
            grad_logits = (hidden_ND[rows] @ weight_VD.T).to(grad_N.dtype).softmax(-1).mul_(-grad_N[rows, None])
            grad_logits.scatter_add_(-1, targets_N[rows, None], grad_N[rows, None])
            grad_logits = grad_logits.to(hidden_ND.dtype)
            grad_hidden[rows] = grad_logits @ weight_VD
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden_ND[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None, None


def token_logprobs(hidden_ND, weight_VD, targets_N, chunk=1024):
    """Log-probability (nats) of each target token. Differentiable in hidden and weight; never holds N x V.

    hidden_ND: final hidden states; weight_VD: the head; targets_N: token ids. Returns logprobs_N in at least fp32.
    """
    return _TokenLogprobs.apply(hidden_ND, weight_VD, targets_N, chunk)


def collate(examples, device="cpu"):
    """Right-pad a list of (input_ids, turn_ids) into one batch {"input_ids": BT, "turn_ids": BT}.

    Padding has turn 0 and comes after every real token: under causal attention no real token sees it, no mask is
    needed.
    """
    width = max(len(ids) for ids, _ in examples)
    pad = [[list(row) + [0] * (width - len(row)) for row in column] for column in zip(*examples)]
    return {name: torch.tensor(rows, device=device) for name, rows in zip(("input_ids", "turn_ids"), pad)}


@torch.no_grad()
def head_is_plain(model):
    """True when the model's logits are hidden @ weight.T and nothing more (no bias, scale or soft-capping): seen, not
    assumed."""
    if not hasattr(model, "_head_is_plain"):
        head = model.get_output_embeddings()
        probe = torch.arange(min(8, model.config.get_text_config().vocab_size), device=head.weight.device)[None]
        own = model(input_ids=probe).logits.float()
        ours = (model.base_model(input_ids=probe).last_hidden_state @ head.weight.T).float()
        same = own.shape == ours.shape and torch.allclose(own, ours, rtol=1e-3, atol=1e-3)
        model._head_is_plain = same and getattr(head, "bias", None) is None
        if not model._head_is_plain:
            print(f"note: {type(model).__name__} changes its logits after the head; using its own head (more memory)")
    return model._head_is_plain


def turn_logprobs(model, batch):
    """Summed log-prob of every agent turn, and its number of tokens: everything that Eq. 2-4 need from a model.

    batch: {"input_ids": BT, "turn_ids": BT} (see `collate`). Returns sums_BK (nats, differentiable) and lengths_BK,
    where K is the last turn in the batch and column k-1 is turn k; a turn that a row lacks has sum 0 and length 0.
    """
    input_ids_BT, turn_ids_BT = batch["input_ids"], batch["turn_ids"]
    row_N, position_N = (turn_ids_BT[:, 1:] > 0).nonzero(as_tuple=True)  # position t predicts token t + 1
    targets_N = input_ids_BT[row_N, position_N + 1]
    turn_N = turn_ids_BT[row_N, position_N + 1]
    if head_is_plain(model):
        hidden_BTD = model.base_model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        logprobs_N = token_logprobs(hidden_BTD[row_N, position_N], model.get_output_embeddings().weight, targets_N)
    else:
        logits_NV = model(input_ids=input_ids_BT, use_cache=False).logits[row_N, position_N]
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        logprobs_N = logits_NV.log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)
    B, K = len(input_ids_BT), max(int(turn_ids_BT.max()), 1)
    cell_N = row_N * K + turn_N - 1
    sums = torch.zeros(B * K, dtype=logprobs_N.dtype, device=logprobs_N.device).index_add(0, cell_N, logprobs_N)
    lengths = torch.zeros_like(sums).index_add(0, cell_N, torch.ones_like(logprobs_N))
    return sums.view(B, K), lengths.view(B, K)


def pad_turns(rows, like_BK):
    """Lists of per-turn sums of unequal length -> one tensor of the shape and kind of like_BK, 0 where a turn is
    absent."""
    padded = torch.zeros_like(like_BK, requires_grad=False)
    for b, row in enumerate(rows):
        padded[b, :len(row)] = torch.tensor(row, dtype=padded.dtype)
    return padded


@torch.no_grad()
def reference_sums(model, examples, batch_tokens=16384, label=None):
    """Summed log-probs per turn of every example, without gradient: a list of K numbers for each (input_ids, turn_ids).

    Used for pi_ref, once, before the first step (the policy before its first step *is* the reference, so no second
    model is ever in memory), and for ranking. Examples of like length share a batch; the result does not depend on
    it.
    """
    check_context(model, max((len(ids) for ids, _ in examples), default=0), "the longest of these dialogues")
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    sums = [None] * len(examples)
    with tqdm(total=len(examples), desc=f"{label or '':>12}", disable=label is None, mininterval=0.5) as bar:
        while order:
            n = max(1, min(len(order), batch_tokens // len(examples[order[-1]][0])))
            batch, order = order[-n:], order[:-n]
            rows, _ = turn_logprobs(model, collate([examples[i] for i in batch], model.device))
            for i, row in zip(batch, rows.tolist()):
                sums[i] = row[:max(examples[i][1])]
            bar.update(n)
    return sums
