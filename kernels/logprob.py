"""Log-probabilities of the agent's tokens: the one number that critic, actor and ranking are all made of.

A causal language model turns T tokens into hidden states; the head (a V x D matrix) turns each hidden state into V
logits; the log-prob of token y is  logits[y] - logsumexp(logits).  Three savings keep this cheap, and none changes a
number:

1. Only rows that predict an *agent* token go through the head (about a fifth of a dialogue).
2. The head is applied to a chunk of rows at a time. Some chunks are kept for the backward pass, 64 MB of them, and
   the others are computed again there, so that no N x V tensor exists (N = 2048 rows of a 128k vocabulary would be
   1 GB in fp32, several times over).
3. A prefix that several sequences share is computed once: the 16 candidates of a state, the chosen and the rejected
   turn of a prompt, the turns sampled at a state. The whole of this trick is the class `Tree`.

`use_plain_path(True)` (the flag --plain) switches all three off: every sequence in full, the model's own logits at
every position. It is what one would write first, and what the tests compare with.

Place in the data flow: (input_ids, turn_ids) from `env.render` -> `lay_out` -> `turn_logprobs` -> sums and lengths
per turn; prompts -> `branches` -> `actor.sample`. Exercised by `python -m pytest tests/test_kernels.py` and measured
by `python -m kernels.bench`.

Shapes: B examples, T tokens, K turns, D hidden, V vocabulary, N agent tokens in the batch; in a tree: R rows (one for
each distinct prefix), C new tokens a row, S slots of the cache, L live branches.
"""
import bisect
import importlib.util
import inspect
import itertools
import sys

import torch
from tqdm import tqdm

from kernels.fit import check_context

_plain, _said = False, set()


def use_plain_path(on):
    """Compute everything the plain way from now on (or no longer)."""
    global _plain
    _plain = on


def _say_once(text):
    if text not in _said:
        _said.add(text)
        print(f"note: {text}", file=sys.stderr)


# ------------------------------------------------------------------ the head


def _exponentials(hidden_ND, weight_VD, targets_N):
    """exp(logits - max) of every row, their sum, and the log-prob of its target. bf16 is summed in fp32."""
    logits_NV = (hidden_ND @ weight_VD.T).to(torch.promote_types(hidden_ND.dtype, torch.float32))
    chosen_N1, max_N1 = logits_NV.gather(-1, targets_N[:, None]), logits_NV.amax(-1, keepdim=True)
    exp_NV = logits_NV.sub_(max_N1).exp_()
    sum_N1 = exp_NV.sum(-1, keepdim=True)
    return exp_NV, sum_N1, (chosen_N1 - max_N1 - sum_N1.log()).squeeze(-1)


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(h W^T)[y], a chunk of rows at a time, with the gradient written out. W_y is row y of W:

        d logp / d h = W_y - softmax W,     d logp / d W = (onehot(y) - softmax)^T h,     softmax = exp / sum

    The first `keep` chunks leave their exponentials for the backward pass, the others compute them again.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, chunk, keep):
        ctx.chunk, kept, logprobs = chunk, [], []
        for i, (h, y) in enumerate(zip(hidden_ND.split(chunk), targets_N.split(chunk))):
            exp, total, logprob = _exponentials(h, weight_VD, y)
            logprobs.append(logprob)
            if i < keep:
                kept += [exp, total]
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, *kept)
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx, grad_N):
        hidden_ND, weight_VD, targets_N, *kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=grad_N.dtype) if ctx.needs_input_grad[1] else None
        for i, rows in enumerate(torch.arange(len(targets_N), device=hidden_ND.device).split(ctx.chunk)):
            h, y, g = hidden_ND[rows], targets_N[rows], grad_N[rows, None]
            exp, total = kept[2 * i:2 * i + 2] or _exponentials(h, weight_VD, y)[:2]
            mean_ND = exp.to(weight_VD.dtype) @ weight_VD / total
            grad_hidden[rows] = (g * (weight_VD[y] - mean_ND)).to(h.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(exp.T, h * (g / total), alpha=-1)
                grad_weight.index_add_(0, y, h * g)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None, None, None


def _use_triton(hidden_ND, weight_VD):
    if not hidden_ND.is_cuda or hidden_ND.dtype != weight_VD.dtype or hidden_ND.dtype == torch.float64:
        return False
    if importlib.util.find_spec("triton") is None:
        _say_once("Triton is not installed; the head runs in plain PyTorch, a chunk of rows at a time")
        return False
    return True


def token_logprobs(hidden_ND, weight_VD, targets_N, chunk=None, keep=2):
    """Log-probability (nats) of each target token. Differentiable in hidden and weight; never holds N x V.

    hidden_ND: final hidden states; weight_VD: the head; targets_N: token ids. Returns logprobs_N in at least fp32.
    chunk: rows at a time; as many as make 8 million logits unless given. keep: how many chunks stay in memory until
    the backward pass (64 MB in all), which takes a fourth of its work away. On CUDA this is a Triton kernel where
    Triton is installed and the dtype is one that it takes.
    """
    if chunk is None and _use_triton(hidden_ND, weight_VD):
        from kernels.triton_logprob import fused_logprobs
        return fused_logprobs(hidden_ND, weight_VD, targets_N)
    chunk = chunk or max(1, 2 ** 23 // len(weight_VD))
    return _TokenLogprobs.apply(hidden_ND, weight_VD, targets_N, chunk, keep if torch.is_grad_enabled() else 0)


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


# ------------------------------------------------------------------ one prefix, many branches

class Tree:
    """Sequences that begin alike, as trees: each distinct prefix is run once, and many branches grow from it.

    A row is a prefix followed by all of its branches, one after the other (or, in sampling, interleaved):

        slot    0    1    2    3      4    5      6    7    8
        token  the  cat  sat  down   and  slept  and  left  .        two branches after "the cat sat": "down"...
        owner   0    0    0    1      1    1      2    2    2        and "and left ."

    A token sees the prefix (owner 0) and what came before it in its own branch: `see`. Its position is how many
    tokens it sees before itself. Attention knows of other tokens only through these two, so every branch gets what it
    would get in a row of its own. Keys and values of all slots stay in the cache, and carry gradients: what branches
    feel flows back into the prefix, summed.

    The prefix here is all but the last token that is shared, and a branch starts with that one: its hidden state
    predicts the branch's first own token, and so each branch holds all of its predictions.
    """

    def __init__(self, model, prefixes):
        """prefixes: tuples of token ids, one for each branch to come; equal ones share a row (`row_B`)."""
        from transformers import DynamicCache
        distinct = {prefix: row for row, prefix in enumerate(dict.fromkeys(prefixes))}
        width, device = max(map(len, distinct)), model.device
        self.model, self.cache = model, DynamicCache()
        self.row_B = torch.tensor([distinct[prefix] for prefix in prefixes], device=device)
        self.rows_R = torch.arange(len(distinct), device=device)  # the rows that still have live branches
        length_R1 = torch.tensor([[len(prefix)] for prefix in distinct], device=device)
        self.owner_RS = -(torch.arange(width, device=device) >= length_R1).long()
        if width:  # right-padded under causal attention: no mask is needed
            ids = [list(prefix) + [0] * (width - len(prefix)) for prefix in distinct]
            model.base_model(input_ids=torch.tensor(ids, device=device), past_key_values=self.cache, use_cache=True)

    def inputs(self, input_ids_RC, owner_RC):
        """What the model needs to run C more tokens a row. owner: 1 + the branch of each, or -1 on padding."""
        self.owner_RS = torch.cat([self.owner_RS, owner_RC], 1)
        see_RCS = (self.owner_RS[:, None] == 0) | (self.owner_RS[:, None] == owner_RC[:, :, None])
        see_RCS = see_RCS.tril(see_RCS.shape[2] - see_RCS.shape[1])
        mask_RCS = torch.zeros(see_RCS.shape, dtype=self.model.dtype, device=see_RCS.device)
        mask_RCS.masked_fill_(~see_RCS, torch.finfo(self.model.dtype).min)
        return {"input_ids": input_ids_RC, "position_ids": see_RCS.sum(-1) - 1, "attention_mask": mask_RCS[:, None],
                "past_key_values": self.cache, "use_cache": True}

    def step(self, live_L, token_L):
        """One more token on each live branch; the logits_LV of what follows it. live_L: indices into prefixes."""
        rows, row_L = self.row_B[live_L].unique(return_inverse=True)
        if len(rows) < len(self.rows_R):  # rows without a live branch leave the batch
            kept = torch.searchsorted(self.rows_R, rows)
            self.rows_R, self.owner_RS = rows, self.owner_RS[kept]
            self.cache.reorder_cache(kept)
        sorted_L, order_L = row_L.sort(stable=True)
        column_L = torch.empty_like(row_L)  # how many live branches of the same row come before it
        column_L[order_L] = torch.arange(len(row_L), device=row_L.device) - torch.searchsorted(sorted_L, sorted_L)
        ids_RC = row_L.new_zeros(len(rows), int(column_L.max()) + 1)
        owner_RC = torch.full_like(ids_RC, -1)
        ids_RC[row_L, column_L], owner_RC[row_L, column_L] = token_L, live_L + 1
        inputs = self.inputs(ids_RC, owner_RC)
        if head_is_plain(self.model):
            hidden_LD = self.model.base_model(**inputs).last_hidden_state[row_L, column_L]
            return hidden_LD @ self.model.get_output_embeddings().weight.T
        return self.model(**inputs).logits[row_L, column_L]


class Rows:
    """The plain way to sample: every branch in a row of its own, its prompt run for it alone, left-padded."""

    def __init__(self, model, prompts):
        width, self.model, self.cache, self.live_L = max(map(len, prompts)), model, None, None
        self.ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=model.device)
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)

    def step(self, live_L, token_L):
        """As Tree's: one more token on each live branch (the first call: the last one of each prompt)."""
        if self.cache is not None:
            kept = torch.searchsorted(self.live_L, live_L)
            self.cache.reorder_cache(kept)
            self.ids, self.mask = token_L[:, None], torch.cat([self.mask[kept], self.mask.new_ones(len(kept), 1)], 1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -self.ids.shape[1]:]
        out = self.model(input_ids=self.ids, attention_mask=self.mask, position_ids=positions,
                         past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.live_L = out.past_key_values, live_L
        return out.logits[:, -1]


@torch.no_grad()
def can_share(model):
    """Whether `Tree` computes what plain rows do on this model: seen on a probe, where its parts make it possible.
    Says why not, once."""
    if _plain:
        return False
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        _say_once("under gradient checkpointing a cache carries no gradients; every sequence is computed in full")
        return False
    if not hasattr(model, "_can_share"):
        why = _why_not(model)
        if why:
            _say_once(f"{type(model).__name__} cannot share a prefix: {why}; every sequence is computed in full")
        model._can_share = why is None
    return model._can_share


def _why_not(model):
    """What keeps a model from sharing prefixes, or None."""
    from transformers import DynamicCache
    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {"DynamicLayer"}
    if kinds:  # sliding windows count slots, and recurrent states have none
        return f"its cache has layers of the kind {', '.join(sorted(kinds))}"
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention ({model.config._attn_implementation}) takes no mask of ours"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return "it takes no positions"
    return None if _tree_equals_rows(model) else "on a probe its hidden states are others than in full sequences"


def _tree_equals_rows(model):
    """Two branches on a prefix of three tokens: the last hidden state of each, from a tree and from plain rows."""
    rows = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 5, 6]], device=model.device)
    rows %= model.config.get_text_config().vocab_size
    plain_BD = model.base_model(input_ids=rows, use_cache=False).last_hidden_state[:, -1].float()
    tree = Tree(model, [tuple(rows[0, :2].tolist())] * 2)
    inputs = tree.inputs(rows[:, 2:].reshape(1, 6), torch.tensor([[1, 1, 1, 2, 2, 2]], device=model.device))
    ours_BD = model.base_model(**inputs).last_hidden_state[0, [2, 5]].float()
    return bool((ours_BD - plain_BD).norm() < 0.02 * plain_BD.norm())  # bf16 rounds to 0.004


def branches(model, prompts):
    """The place where one turn grows after each prompt (a tuple of token ids): its step(live_L, token_L) takes the
    next token of the live ones, first of all the last one of the prompt, and returns the logits of what follows."""
    return Tree(model, [prompt[:-1] for prompt in prompts]) if can_share(model) else Rows(model, prompts)


# ------------------------------------------------------------------ log-probs per turn

def collate(examples, device="cpu"):
    """Right-pad a list of (input_ids, turn_ids) into one batch {"input_ids": BT, "turn_ids": BT}.

    Padding has turn 0 and comes after every real token: under causal attention no real token sees it, no mask is
    needed.
    """
    width = max(len(ids) for ids, _ in examples)
    pad = [[list(row) + [0] * (width - len(row)) for row in column] for column in zip(*examples)]
    return {name: torch.tensor(rows, device=device) for name, rows in zip(("input_ids", "turn_ids"), pad)}


def _prefix(example):
    """All tokens before the first agent token but one (see Tree)."""
    input_ids, turn_ids = example
    first = next((i for i, turn in enumerate(turn_ids) if turn), len(input_ids))
    return tuple(input_ids[:max(first - 1, 0)])


def lay_out(model, examples):
    """The batch of a list of (input_ids, turn_ids): a tree for each distinct prefix, or, where nothing is shared or
    the model cannot share, a row for each example (`collate`)."""
    prefixes = [_prefix(example) for example in examples]
    if len(set(prefixes)) == len(examples) or not can_share(model):
        return collate(examples, model.device)
    rows = {}
    for b, (prefix, (input_ids, turn_ids)) in enumerate(zip(prefixes, examples)):
        n, row = len(prefix), rows.setdefault(prefix, ([], [], []))
        row[0].extend(input_ids[n:])
        row[1].extend([0, *turn_ids[n + 1:]])  # a branch's first token is predicted by nothing in the branch
        row[2].extend([b + 1] * (len(input_ids) - n))
    width = max(len(ids) for ids, _, _ in rows.values())
    columns = [[list(row) + [fill] * (width - len(row)) for row in column]
               for column, fill in zip(zip(*rows.values()), (0, 0, -1))]
    batch = dict(zip(("input_ids", "turn_ids", "owner_ids"), torch.tensor(columns, device=model.device)))
    return {"prefixes": list(rows), **batch}


def turn_logprobs(model, batch):
    """Summed log-prob of every agent turn, and its number of tokens: everything that Eq. 2-4 need from a model.

    batch: from `lay_out` or `collate`. Returns sums_BK (nats, differentiable) and lengths_BK, where K is the last
    turn in the batch and column k-1 is turn k; a turn that an example lacks has sum 0 and length 0.
    """
    input_ids, turn_ids, owner_ids = batch["input_ids"], batch["turn_ids"], batch.get("owner_ids")
    row_N, position_N = (turn_ids[:, 1:] > 0).nonzero(as_tuple=True)  # position t predicts token t + 1
    targets_N, turn_N = input_ids[row_N, position_N + 1], turn_ids[row_N, position_N + 1]
    if owner_ids is None:
        B, example_N, inputs = len(input_ids), row_N, {"input_ids": input_ids, "use_cache": False}
    else:
        B, example_N = int(owner_ids.max()), owner_ids[row_N, position_N + 1] - 1
        inputs = Tree(model, batch["prefixes"]).inputs(input_ids, owner_ids)
    if not _plain and head_is_plain(model):
        hidden_ND = model.base_model(**inputs).last_hidden_state[row_N, position_N]
        logprobs_N = token_logprobs(hidden_ND, model.get_output_embeddings().weight, targets_N)
    else:
        logits_NV = model(**inputs).logits[row_N, position_N]
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        logprobs_N = logits_NV.log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)
    K = max(int(turn_ids.max()), 1)
    cell_N = example_N * K + turn_N - 1
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
    model is ever in memory), and for ranking. Examples with the same prefix, and prefixes of like length, share a
    batch of at most batch_tokens tokens; the result does not depend on it.
    """
    check_context(model, max((len(ids) for ids, _ in examples), default=0), "the longest of these dialogues")
    prefixes, sums = [_prefix(example) for example in examples], [None] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: (len(prefixes[i]), prefixes[i], len(examples[i][0])))
    with tqdm(total=len(examples), desc=f"{label or '':>12}", disable=label is None, mininterval=0.5) as bar:
        while order:
            tokens = list(itertools.accumulate(len(examples[i][0]) for i in order))
            n = max(1, bisect.bisect_right(tokens, batch_tokens))
            batch, order = order[:n], order[n:]
            rows, _ = turn_logprobs(model, lay_out(model, [examples[i] for i in batch]))
            for i, row in zip(batch, rows.tolist()):
                sums[i] = row[:max(examples[i][1])]
            bar.update(n)
    return sums
