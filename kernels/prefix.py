"""One prefix, many branches: what several sequences have in common is computed once.

The cost of the method is long prefixes that are shared: sixteen candidates of one state, the chosen and the rejected
turn of one prompt, ten turns of one dialogue, each critic call with the reference in front. A causal model's keys and
values of a prefix do not depend on what follows, so they can be computed once and kept. The whole of this idea is the
class `Tree`; scoring and DPO (through `kernels.logprob.lay_out`), candidates and rollouts (through `branches` and
`actor.sample`) all use it, and rounding aside none of them gets another number from it.

`use_plain_path(True)` (the flag --plain) switches it off, and with it the savings of kernels/logprob.py: every sequence
is scored in full, with the model's own logits at every position, and sampled from its prompt in a row of its own. It is
what one would write first, and what the tests compare with. On models whose cache cannot be shared the first half of it
happens, with a note: rows of their own, but the head on agent tokens only.

Exercised by `python -m pytest tests/test_kernels.py` and measured by `python -m bench.speed`.

Shapes: B branches, L live branches, N new tokens, R rows with live branches, C new tokens a row, S slots of the cache,
D hidden, V vocabulary.
"""
import inspect
import sys

import torch
from torch.nn.utils.rnn import pad_sequence

_plain, _said = False, set()
MUCH = 0.06  # relative: what rounds apart in bf16, in 48 layers, is up to 0.033; what is wrong was 0.1 and more


def use_plain_path(on):
    """Compute everything the plain way from now on (or no longer)."""
    global _plain
    _plain = on


def plain_path():
    return _plain


def say_once(text):
    if text not in _said:
        _said.add(text)
        print(f"note: {text}", file=sys.stderr)


@torch.no_grad()
def head_is_plain(model):
    """True when the model's logits are hidden @ weight.T and nothing more (no bias, scale or soft-capping): seen on a
    probe, in which the head says 1000 to everything, not assumed."""
    if not hasattr(model, "_head_is_plain"):
        head, seen = model.get_output_embeddings(), {}
        hooks = [model.base_model.register_forward_hook(lambda module, inputs, out: seen.update(body=out[0])),
                 head.register_forward_hook(lambda module, inputs, out: seen.update(head=inputs[0])
                                            or torch.full_like(out, 1000.0))]
        vocab = model.config.get_text_config().vocab_size
        row = torch.arange(min(8, vocab), device=head.weight.device)[None]
        try:
            logits = model(input_ids=row, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        unchanged = "body" in seen and torch.equal(seen["body"], seen["head"]) and bool((logits == 1000.0).all())
        model._head_is_plain = unchanged and type(head) is torch.nn.Linear and head.bias is None
        if not model._head_is_plain:
            say_once(f"{type(model).__name__} changes its logits beside the head; using its own head (more memory)")
    return model._head_is_plain


def cache_name(model):
    """What the model calls the keys and values that it reads and adds to: transformers 5.24 renamed the argument."""
    for module in (model, model.base_model):  # a head that hands everything on does not name it
        names = inspect.signature(module.forward).parameters
        for name in ("past_key_values", "cache"):
            if name in names:
                return name
    return "past_key_values"


class _Filled(Exception):
    """The last layer's keys and values are in the cache."""


def fill(model, cache, input_ids):
    """Run a prefix for its keys and values alone: the last layer stops where it has them. What would come after (its
    attention, its MLP) predicts the prefix's own next tokens, which nobody asks for."""
    put, last = cache.update, model.config.get_text_config().num_hidden_layers - 1

    def update(key_states, value_states, layer_idx, *more, **named):
        kept = put(key_states, value_states, layer_idx, *more, **named)
        if layer_idx == last:
            raise _Filled
        return kept
    cache.update = update
    try:
        model.base_model(input_ids=input_ids, use_cache=True, **{cache_name(model): cache})
    except _Filled:
        pass
    finally:
        del cache.update


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

    def __init__(self, model, prefixes, row_B=None):
        """prefixes: tuples of token ids, one for each row; row_B: the row of each branch that will grow (see `step`).
        Without it each branch has a row of its own, which `wake` brings back in a later turn."""
        from transformers import DynamicCache
        distinct = {prefix: i for i, prefix in enumerate(dict.fromkeys(prefixes))}
        width, device = max(map(len, distinct)), model.device
        self.model, self.cache, self.cache_name = model, DynamicCache(), cache_name(model)
        self.rows_R = torch.arange(len(prefixes), device=device)  # the rows that still have live branches
        self.row_B = self.rows_R if row_B is None else torch.tensor(row_B, device=device)
        self.parked = {} if row_B is None else None
        length_R1 = torch.tensor([[len(prefix)] for prefix in prefixes], device=device)
        self.owner_RS = -(torch.arange(width, device=device) >= length_R1).long()
        if width:  # right-padded under causal attention: no mask is needed
            ids = [list(prefix) + [0] * (width - len(prefix)) for prefix in distinct]
            fill(model, self.cache, torch.tensor(ids, device=device))
        if len(distinct) < len(prefixes):
            self.cache.reorder_cache(torch.tensor([distinct[prefix] for prefix in prefixes], device=device))

    def inputs(self, input_ids_RC, owner_RC):
        """What the model needs to run C more tokens a row. owner: 1 + the branch of each, or -1 on padding."""
        self.owner_RS = torch.cat([self.owner_RS, owner_RC], 1)
        see_RCS = (self.owner_RS[:, None] == 0) | (self.owner_RS[:, None] == owner_RC[:, :, None])
        see_RCS = see_RCS.tril(see_RCS.shape[2] - see_RCS.shape[1])
        position_RC = (see_RCS.sum(-1) - 1) * (owner_RC >= 0)  # padding stays within the context
        mask_RCS = torch.zeros(see_RCS.shape, dtype=self.model.dtype, device=see_RCS.device)
        mask_RCS.masked_fill_(~see_RCS, torch.finfo(self.model.dtype).min)
        return {"input_ids": input_ids_RC, "position_ids": position_RC, "attention_mask": mask_RCS[:, None],
                self.cache_name: self.cache, "use_cache": True}

    def step(self, live_N, token_N, wanted=slice(None)):
        """More tokens on the live branches, all in one pass. live_N: the branch of each token; one may get several.
        Returns the logits of what follows each token, or each `wanted` one."""
        rows, row_N = self.row_B[live_N].unique(return_inverse=True)
        if len(rows) < len(self.rows_R):
            self._leave(torch.isin(self.rows_R, rows))
        sorted_N, order_N = row_N.sort(stable=True)
        column_N = torch.empty_like(row_N)  # how many of these tokens go to the same row before it
        column_N[order_N] = torch.arange(len(row_N), device=row_N.device) - torch.searchsorted(sorted_N, sorted_N)
        ids_RC = row_N.new_zeros(len(rows), int(column_N.max()) + 1)
        owner_RC = torch.full_like(ids_RC, -1)
        ids_RC[row_N, column_N], owner_RC[row_N, column_N] = token_N, live_N + 1
        inputs, where = self.inputs(ids_RC, owner_RC), (row_N[wanted], column_N[wanted])
        if head_is_plain(self.model):
            hidden_ND = self.model.base_model(**inputs).last_hidden_state[where]
            return hidden_ND @ self.model.get_output_embeddings().weight.T
        return self.model(**inputs).logits[where]

    def _leave(self, stays_R):
        """Rows without a live branch leave the batch; if they may come back, what their tokens left in the cache is
        parked, a row at a time and without its gaps."""
        gone = [(r, row, self.owner_RS[r] >= 0) for r, row in enumerate(self.rows_R.tolist()) if not stays_R[r]]
        for layer in self.cache.layers:  # one by one: never more than one layer twice in memory
            for r, row, used in gone if self.parked is not None else ():
                self.parked.setdefault(row, []).append((layer.keys[r][:, used], layer.values[r][:, used]))
            layer.keys, layer.values = layer.keys[stays_R], layer.values[stays_R]
        self.rows_R, self.owner_RS = self.rows_R[stays_R], self.owner_RS[stays_R]

    def _return(self, rows):
        """Put the batch together again, of these rows alone."""
        self._leave(torch.zeros_like(self.rows_R, dtype=torch.bool))
        parked, self.parked = [self.parked[row] for row in rows.tolist()], {}
        length_R1 = torch.tensor([[layers[0][0].shape[1]] for layers in parked], device=rows.device)
        self.rows_R, self.owner_RS = rows, -(torch.arange(int(length_R1.max()), device=rows.device) >= length_R1).long()
        for i, layer in enumerate(self.cache.layers):
            keys, values = zip(*(layers[i] for layers in parked))  # of each row: heads x slots x width
            layer.keys, layer.values = (pad_sequence([t.transpose(0, 1) for t in tensors], True).transpose(1, 2)
                                        for tensors in (keys, values))
            for layers in parked:
                layers[i] = None

    def wake(self, live_L, prompts):
        """A turn begins on the live branches: read what is new in their prompts (token ids that begin with all that the
        branch has seen). Returns the logits of what follows. For a second turn, each branch needs a row of its own;
        live branches are named in ascending order, and one that is left out of a turn does not come back."""
        if self.parked:
            self._return(self.row_B[live_L])
        seen_L = (self.owner_RS >= 0).sum(1)[torch.searchsorted(self.rows_R, self.row_B[live_L])]
        new = [prompt[n:] for prompt, n in zip(prompts, seen_L.tolist())]
        counts_L = torch.tensor([len(tokens) for tokens in new], device=live_L.device)
        if not counts_L.all():
            raise ValueError("a turn can begin only where its prompt goes on beyond what its branch has read")
        token_N = torch.tensor([token for tokens in new for token in tokens], device=live_L.device)
        return self.step(live_L.repeat_interleave(counts_L), token_N, wanted=counts_L.cumsum(0) - 1)


def share(prefixes, lengths=None):
    """The row of each branch, as (first branch on its prefix, number). Branches on one prefix share a row, with two
    limits: as many as there are on a prefix in the mean (of 32, 16 and 16 candidates, 32 take two rows), because all
    rows of a batch are as wide as the widest; and no more tokens (lengths: of the branches) than the prefix has, or
    512, because each token of a row is held against all others."""
    first, rows, last = {}, [], {}
    same = [first.setdefault(prefix, i) for i, prefix in enumerate(prefixes)]
    most = len(prefixes) // len(first)
    for i, length in zip(same, lengths or [0] * len(prefixes)):
        number, branches, tokens = last.get(i, (0, 0, 0))
        if branches == most or branches and tokens + length > max(512, len(prefixes[i])):
            number, branches, tokens = number + 1, 0, 0
        last[i] = number, branches + 1, tokens + length
        rows.append((i, number))
    return rows


class Alone:
    """The plainest way to sample: each sequence by itself, read anew for each token."""

    def __init__(self, model):
        self.model = model

    def wake(self, live_L, prompts):
        """As Tree's."""
        self.ids = {branch: list(prompt) for branch, prompt in zip(live_L.tolist(), prompts)}
        return self._run(live_L)

    def step(self, live_L, token_L):
        """As Tree's, one token a branch."""
        for branch, token in zip(live_L.tolist(), token_L.tolist()):
            self.ids[branch].append(token)
        return self._run(live_L)

    def _run(self, live_L):
        rows = (torch.tensor([self.ids[branch]], device=live_L.device) for branch in live_L.tolist())
        return torch.cat([self.model(input_ids=row, use_cache=False).logits[:, -1] for row in rows])


class Rows:
    """The plain way to sample: every branch in a row of its own, left-padded, its prompt read in full in every turn."""

    def __init__(self, model):
        self.model, self.cache_name = model, cache_name(model)

    def wake(self, live_L, prompts):
        """As Tree's."""
        from transformers import DynamicCache
        width, self.live_L = max(map(len, prompts)), live_L
        self.cache = DynamicCache(config=self.model.config)
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=live_L.device)
        return self._run(torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=live_L.device))

    def step(self, live_L, token_L):
        """As Tree's, one token a branch."""
        kept = torch.searchsorted(self.live_L, live_L)
        self.cache.reorder_cache(kept)
        self.live_L, self.mask = live_L, torch.cat([self.mask[kept], self.mask.new_ones(len(kept), 1)], 1)
        return self._run(token_L[:, None])

    def _run(self, ids):
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        return self.model(input_ids=ids, attention_mask=self.mask, position_ids=positions, use_cache=True,
                          logits_to_keep=1, **{self.cache_name: self.cache}).logits[:, -1]


@torch.no_grad()
def can_pad(model):
    """Whether `Rows` computes what `Alone` does on this model: seen on a probe, a prompt beside a longer one and then a
    token more. Says once where it does not."""
    if not hasattr(model, "_can_pad"):
        vocab, live = model.config.get_text_config().vocab_size, torch.arange(2, device=model.device)
        prompts = [[i % vocab for i in prompt] for prompt in ((3, 1, 2, 4, 5, 6), (6, 5))]

        def logits(place):
            return torch.stack([place.wake(live, prompts), place.step(live, live)]).float()
        alone = logits(Alone(model))
        try:
            model._can_pad = bool((logits(Rows(model)) - alone).norm() < MUCH * alone.norm())
        except (TypeError, ValueError, RuntimeError, AttributeError):
            model._can_pad = False
        if not model._can_pad:
            say_once(f"{type(model).__name__} has no cache that works in padded rows; sampling reads each sequence by "
                     "itself, anew for each token")
    return model._can_pad


@torch.no_grad()
def can_share(model):
    """Whether `Tree` computes what plain rows do on this model: seen on a probe, where its parts make it possible.
    Says why not, once."""
    if plain_path():
        return False
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        say_once("under gradient checkpointing a cache carries no gradients; every sequence is computed in full")
        return False
    if not hasattr(model, "_can_share"):
        why = _why_not(model)
        if why:
            say_once(f"{type(model).__name__} cannot share a prefix: {why}; every sequence is computed in full")
        if model.training:  # dropout may have decided
            return why is None
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
    if "local" in getattr(model.config, "attention_layers", ()):  # GPT-Neo's windows, which its cache does not tell
        return "its local attention counts slots"
    if model.base_model is model:
        return "its body cannot be run without its head"
    try:
        same = _tree_equals_rows(model)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"on a probe it fails ({error})"
    return None if same else "on a probe its hidden states are others than in full sequences"


def _tree_equals_rows(model):
    """Two branches on a prefix of three tokens: the last hidden state of each, from a tree and from plain rows."""
    rows = torch.tensor([[3, 4, 5, 6, 7], [3, 4, 5, 8, 9]], device=model.device)
    rows %= model.config.get_text_config().vocab_size
    plain_BD = model.base_model(input_ids=rows, use_cache=False).last_hidden_state[:, -1].float()
    tree = Tree(model, [tuple(rows[0, :2].tolist())], [0, 0])
    inputs = tree.inputs(rows[:, 2:].reshape(1, 6), torch.tensor([[1, 1, 1, 2, 2, 2]], device=model.device))
    ours_BD = model.base_model(**inputs).last_hidden_state[0, [2, 5]].float()
    return bool((ours_BD - plain_BD).norm() < MUCH * plain_BD.norm())


def branches(model, prompts, alone=False):
    """The place where turns grow after prompts (tuples of token ids): `wake` begins a turn, `step` takes the next token
    of the live ones, and both return the logits of what follows. alone: several turns will grow after each other."""
    if not can_share(model):
        return Rows(model) if can_pad(model) else Alone(model)
    prefixes = [prompt[:-1] for prompt in prompts]
    if alone:
        return Tree(model, prefixes)
    rows = share(prefixes)
    number = {row: i for i, row in enumerate(dict.fromkeys(rows))}
    return Tree(model, [prefixes[i] for i, _ in number], [number[row] for row in rows])
