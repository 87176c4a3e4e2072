"""Log-probabilities of the agent's tokens: the one number that critic, actor and ranking are all made of.

A causal language model turns T tokens into hidden states; the head (a V x D matrix) turns each hidden state into V
logits; the log-prob of token y is  logits[y] - logsumexp(logits).  Three savings keep this cheap, and none changes a
number:

1. Only rows that predict an *agent* token go through the head (about a fifth of a dialogue).
2. The head is applied to a chunk of rows at a time. Some chunks are kept for the backward pass, 64 MB of them, and
   the others are computed again there, so that no N x V tensor exists (N = 2048 rows of a 128k vocabulary would be
   1 GB in fp32, several times over).
3. A prefix that several sequences share is computed once (kernels/prefix.py).

nano.py computes the same numbers without any of the three.

Place in the data flow: (input_ids, turn_ids) from `env.render` -> `lay_out` -> `turn_logprobs` -> sums and lengths
per turn. Exercised by `python -m pytest tests/test_kernels.py` and measured by `python -m bench.speed`.

Shapes: B examples, R rows of the batch, T tokens, K turns, D hidden, V vocabulary, N agent tokens in the batch.
"""
import importlib.util
import itertools

import torch
from tqdm import tqdm

from kernels import ranks
from kernels.prefix import Tree, can_share, head_is_plain, pad_rows, say_once, share

SHORT = 16  # tokens: up to this length a prefix is computed in the same pass as its branches
WORTH = 0.8  # trees have to save a fifth of the tokens, padding included


# ------------------------------------------------------------------ the head

def at_least_fp32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _exponentials(hidden_ND, weight_VD, targets_N):
    """exp(logits - max) of every row but for its target, where a 0 stands, the sum with the target, and the target's
    log-prob. bf16 is summed in fp32."""
    target_N1 = targets_N[:, None]
    logits_NV = at_least_fp32(hidden_ND @ weight_VD.T)
    chosen_N1 = logits_NV.gather(-1, target_N1)
    max_N1 = logits_NV.amax(-1, keepdim=True)
    exp_NV = logits_NV.sub_(max_N1).exp_()
    sum_N1 = exp_NV.sum(-1, keepdim=True)
    logprob_N1 = chosen_N1 - max_N1 - sum_N1.log()
    return exp_NV.scatter_(-1, target_N1, 0.0), sum_N1, logprob_N1


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(h W^T)[y], a chunk of rows at a time, with the gradient written out. p are the probabilities of a
    row, and W_y is row y of W:

        d logp / d h = (1 - p_y) W_y - sum_{v != y} p_v W_v,   d logp / d W_v = (1 - p_y if v == y else -p_v) h

    (W_y - sum_v p_v W_v is the same, but in bf16 the difference of two numbers that are nearly equal when p_y is near
    1.) The first `keep` chunks leave their exponentials for the backward pass, the others compute them again.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, chunk, keep):
        ctx.chunk = chunk
        kept, logprobs = [], []
        for i, start in enumerate(range(0, len(targets_N), chunk)):
            rows = slice(start, start + chunk)
            parts = _exponentials(hidden_ND[rows], weight_VD, targets_N[rows])
            logprobs.append(parts[2].squeeze(-1))
            if i < keep:
                kept += parts
            del parts  # before the next ones are made
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, *kept)
        return torch.cat(logprobs) if logprobs else at_least_fp32(hidden_ND.new_zeros(0))

    @staticmethod
    def backward(ctx, grad_N):
        hidden_ND, weight_VD, targets_N, *kept = ctx.saved_tensors
        learns_weight = ctx.needs_input_grad[1]
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=grad_N.dtype) if learns_weight else None
        for i, start in enumerate(range(0, len(targets_N), ctx.chunk)):
            rows = slice(start, start + ctx.chunk)
            h, y, g = hidden_ND[rows], targets_N[rows], grad_N[rows, None]
            parts = kept[3 * i:3 * i + 3] or _exponentials(h, weight_VD, y)
            exp_NV, sum_N1, logprob_N1 = parts
            rest_N1 = -torch.expm1(logprob_N1)  # 1 - p_y
            others_ND = exp_NV.to(weight_VD.dtype) @ weight_VD / sum_N1
            grad_hidden_ND[rows] = (g * (rest_N1 * weight_VD[y] - others_ND)).to(h.dtype)
            if learns_weight:
                grad_weight_VD.addmm_(exp_NV.T, h * (g / sum_N1), alpha=-1)
                grad_weight_VD.index_add_(0, y, h * (g * rest_N1))
            del exp_NV, parts  # before the next ones are made
        if learns_weight:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND, grad_weight_VD, None, None, None


def _use_triton(hidden_ND, weight_VD):
    dtype = hidden_ND.dtype
    if not hidden_ND.is_cuda or dtype != weight_VD.dtype or dtype == torch.float64:
        return False
    if importlib.util.find_spec("triton") is None:
        say_once("Triton is not installed; the head runs in plain PyTorch, a chunk of rows at a time")
        return False
    return True


def token_logprobs(hidden_ND, weight_VD, targets_N, chunk=None, keep=4):
    """Log-probability (nats) of each target token. Differentiable in hidden and weight; never holds N x V.

    hidden_ND: final hidden states; weight_VD: the head; targets_N: token ids. Returns logprobs_N in at least fp32.
    chunk: rows at a time; as many as make 4 million logits unless given. keep: how many chunks stay in memory until
    the backward pass (64 MB in all), which need not compute them again. On CUDA this is a Triton kernel where
    Triton is installed and the dtype is one that it takes.
    """
    if chunk is None and _use_triton(hidden_ND, weight_VD):
        from kernels.triton_logprob import fused_logprobs
        return fused_logprobs(hidden_ND, weight_VD, targets_N)
    chunk = chunk or max(1, 2 ** 22 // len(weight_VD))
    if not torch.is_grad_enabled():
        keep = 0
    return _TokenLogprobs.apply(hidden_ND, weight_VD, targets_N, chunk, keep)


# ------------------------------------------------------------------ log-probs per turn

def collate(examples, device="cpu"):
    """Right-pad a list of (input_ids, turn_ids) into one batch {"input_ids": (B, T), "turn_ids": (B, T)}.

    Padding has turn 0 and comes after every real token, so under causal attention no real token sees it.
    """
    input_ids, turn_ids = zip(*examples)
    return {"input_ids": pad_rows(input_ids, 0).to(device), "turn_ids": pad_rows(turn_ids, 0).to(device)}


def _prefix(example):
    """The tokens that can be shared: all before the first agent token, except the last one. That one starts the
    branch, because its hidden state predicts the first agent token."""
    input_ids, turn_ids = example
    positions_of_the_agent = itertools.compress(itertools.count(), turn_ids)
    first_agent = next(positions_of_the_agent, len(input_ids))
    return tuple(input_ids[:max(first_agent - 1, 0)])


def lay_out(model, examples):
    """The batch for `turn_logprobs`. Examples that begin with the same prefix share a row, [prefix | branch | branch],
    which reads the prefix once; if that saves too little, or the model cannot do it, one row per example (`collate`).

    owner_ids says which example a token belongs to: 0 the prefix, b + 1 example b, -1 padding.
    """
    prefixes = [_prefix(example) for example in examples]
    lengths = [len(input_ids) for input_ids, _ in examples]
    branch_lengths = [length - len(prefix) for length, prefix in zip(lengths, prefixes)]
    longest_prefix = max(map(len, prefixes))
    short = longest_prefix <= SHORT  # then the prefix is part of the row, not of a cache

    # 1. fill the rows
    rows = {}  # which row -> its three lists
    for b, row_key in enumerate(share(prefixes, branch_lengths)):
        input_ids, turn_ids = examples[b]
        n = len(prefixes[b])
        if row_key not in rows:
            inside = n if short else 0
            rows[row_key] = {
                "input_ids": list(input_ids[:inside]),
                "turn_ids": [0] * inside,
                "owner_ids": [0] * inside,
            }
        row = rows[row_key]
        row["input_ids"] += input_ids[n:]
        row["turn_ids"] += [0] + list(turn_ids[n + 1:])  # a branch's first token is predicted by nothing in the branch
        row["owner_ids"] += [b + 1] * branch_lengths[b]

    # 2. is it worth it? compare the tokens that go through the model
    width = max(len(row["input_ids"]) for row in rows.values())
    shared_tokens = len(rows) * width
    if not short:
        shared_tokens += len(set(prefixes)) * longest_prefix
    plain_tokens = len(examples) * max(lengths)
    if shared_tokens > WORTH * plain_tokens or not can_share(model):
        return collate(examples, model.device)

    # 3. pad the rows on the right
    batch = {}
    for name, padding in (("input_ids", 0), ("turn_ids", 0), ("owner_ids", -1)):
        batch[name] = pad_rows([row[name] for row in rows.values()], padding).to(model.device)
    batch["prefixes"] = [() if short else prefixes[first] for first, _ in rows]
    return batch


def agent_positions(model, batch):
    """Where the agent's tokens are in a batch: what the model is to read, (row_N, position_N) of the token in front of
    each of them, and the cell of its turn: cell_N, an index into a flat tensor of the shape (B, K)."""
    turn_RT = batch["turn_ids"]
    row_N, position_N = torch.where(turn_RT[:, 1:] > 0)
    turn_N = turn_RT[row_N, position_N + 1]
    if "owner_ids" in batch:
        owner_RT = batch["owner_ids"]
        B = int(owner_RT.max())
        example_N = owner_RT[row_N, position_N + 1] - 1
        inputs = Tree(model, batch["prefixes"]).inputs(batch["input_ids"], owner_RT)
    else:
        B = len(turn_RT)
        example_N = row_N
        inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    K = max(int(turn_RT.max()), 1)
    return inputs, (row_N, position_N), example_N * K + turn_N - 1, (B, K)


def add_up(numbers_N, cell_N, shape):
    """A number for each agent token -> sums_BK over the turns, and lengths_BK, how many numbers a turn has."""
    sums = numbers_N.new_zeros(shape).flatten().index_add(0, cell_N, numbers_N)
    lengths = torch.zeros_like(sums).index_add(0, cell_N, torch.ones_like(numbers_N))
    return sums.view(shape), lengths.view(shape)


def last_hidden(model, inputs):
    """What the body of a model writes. Where its weights are sharded, hooks of the whole model put embedding and head
    together: it is run to its end, for the logits of one token, and the head's weight then is whole."""
    if not ranks.is_sharded(model):
        return model.base_model(**inputs).last_hidden_state
    seen = []
    hook = model.base_model.register_forward_hook(lambda module, _, output: seen.append(output.last_hidden_state))
    try:
        model(**inputs, logits_to_keep=1)
    finally:
        hook.remove()
    return seen[0]


def turn_logprobs(model, batch):
    """Summed log-prob of every agent turn, and its number of tokens: everything that Eq. 2-4 need from a model.

    batch: from `lay_out` or `collate`. Returns sums_BK (nats, differentiable) and lengths_BK, where K is the last
    turn in the batch and column k-1 is turn k; a turn that an example lacks has sum 0 and length 0.
    """
    inputs, (row_N, position_N), cell_N, shape = agent_positions(model, batch)
    targets_N = batch["input_ids"][row_N, position_N + 1]  # position t predicts token t + 1
    if head_is_plain(model):
        hidden_ND = last_hidden(model, inputs)[row_N, position_N]
        logprobs_N = token_logprobs(hidden_ND, model.get_output_embeddings().weight, targets_N)
    else:
        logits_NV = at_least_fp32(model(**inputs).logits[row_N, position_N])
        logprobs_N = logits_NV.log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)
    return add_up(logprobs_N, cell_N, shape)


def agent_tokens(examples):
    """How many agent tokens an example of a list of (input_ids, turn_ids) has, on average."""
    tokens = 0
    for _, turn_ids in examples:
        tokens += sum(turn > 0 for turn in turn_ids)
    return tokens / len(examples)


def pad_turns(rows, like_BK):
    """Lists of per-turn sums of unequal length -> one tensor of the shape and kind of like_BK, 0 where a turn is
    absent."""
    padded = torch.zeros_like(like_BK, requires_grad=False)
    for b, row in enumerate(rows):
        padded[b, :len(row)] = torch.tensor(row, dtype=padded.dtype)
    return padded


def pair_logprobs(model, pairs):
    """What both losses need of a list of {"chosen", "rejected", "ref_chosen", "ref_rejected"} (see `add_reference`):
    the model's sums_BK, pi_ref's ref_BK and lengths_BK. Rows: all chosen ones, then all rejected ones."""
    examples = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    reference = [pair["ref_chosen"] for pair in pairs] + [pair["ref_rejected"] for pair in pairs]
    sums_BK, lengths_BK = turn_logprobs(model, lay_out(model, examples))
    return sums_BK, pad_turns(reference, sums_BK), lengths_BK


def pair_sizes(pairs):
    """Tokens of each pair, so that pairs of like length share a batch."""
    sizes = []
    for pair in pairs:
        sizes.append(sum(len(pair[side][0]) for side in ("chosen", "rejected")))
    return sizes


@torch.no_grad()
def reference_sums(model, examples, batch_tokens=16384, label=None, numbers=turn_logprobs, deal=map):
    """Summed log-probs per turn of every example, without gradient: a list of K numbers for each (input_ids, turn_ids).
    numbers: another function of a model and a batch that gives a number for each turn, numbers_BK, and lengths_BK.
    deal: `ranks.share_out`, where all processes score the same examples and none waits for another's layers.

    Used for pi_ref, once, before the first step (the policy before its first step *is* the reference, so no second
    model is ever in memory), and for ranking. Equal examples are computed once; examples with the same prefix, and
    prefixes of like length, share a batch of at most batch_tokens tokens; the result does not depend on it.
    """
    # 1. equal examples are computed once
    first = {}  # content of an example -> index of the first example with that content
    representative = []
    for i, (input_ids, turn_ids) in enumerate(examples):
        content = (tuple(input_ids), tuple(turn_ids))
        representative.append(first.setdefault(content, i))

    # 2. batches of neighbours: same prefix first, then prefixes of like length
    lengths = [len(input_ids) for input_ids, _ in examples]
    prefixes = [_prefix(example) for example in examples]

    def neighbourhood(i):
        return len(prefixes[i]), prefixes[i], lengths[i]
    batches, tokens, before = [], 0, None
    for i in sorted(first.values(), key=neighbourhood):
        cost = lengths[i]
        if prefixes[i] == before:
            cost -= len(prefixes[i])  # a shared prefix counts once
        if not batches or tokens + cost > batch_tokens:
            batches.append([])
            tokens, cost = 0, lengths[i]
        batches[-1].append(i)
        tokens += cost
        before = prefixes[i]

    # 3. score them
    sums = {}
    delay = 0 if label else 2  # seconds: a part of a stage has a bar only if it takes longer
    with tqdm(total=len(first), desc=f"{label or 'scored':>12}", delay=delay, leave=bool(label)) as bar:
        def score(batch):
            sums_BK, _ = numbers(model, lay_out(model, [examples[i] for i in batch]))
            bar.update(len(batch))
            return sums_BK.tolist()
        for batch, rows in zip(batches, deal(score, batches)):
            for i, row in zip(batch, rows):
                n_turns = max(examples[i][1])
                sums[i] = row[:n_turns]
    return [sums[i] for i in representative]


def add_reference(model, pairs):
    """pi_ref's log-probs for a list of {"chosen": example, "rejected": example}: adds "ref_chosen" and "ref_rejected".
    To be called before the first step, while the model still is pi_ref."""
    examples = []
    for pair in pairs:
        examples += [pair["chosen"], pair["rejected"]]
    deal = map if ranks.is_sharded(model) else ranks.share_out
    sums = reference_sums(model, examples, label="pi_ref", deal=deal)
    for i, pair in enumerate(pairs):
        pair["ref_chosen"], pair["ref_rejected"] = sums[2 * i:2 * i + 2]
