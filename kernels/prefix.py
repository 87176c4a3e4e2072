"""One prefix, many branches: what several sequences have in common is computed once.

The cost of the method is long prefixes that are shared: sixteen candidates of one state, the chosen and the rejected
turn of one prompt, ten turns of one dialogue, each critic call with the reference in front. A causal model's keys and
values of a prefix do not depend on what follows, so they can be computed once and kept. The whole of this idea is the
class `Tree`. Scoring and DPO use it through `kernels.logprob.lay_out`, candidates and rollouts through `branches` and
`machinery.sampling`. Rounding aside, none of them gets another number from it.

On a model whose cache cannot be shared (sliding windows, recurrent states), each sequence has a row of its own: `Rows`.
Which model is which is found by a probe, once a model.

Exercised by `python -m pytest tests/test_kernels.py` and measured by `python -m bench.speed`.

Shapes: B branches, N new tokens, R rows with live branches, C new tokens a row, S slots of the cache, D hidden,
V vocabulary.
"""
import functools
import inspect
import sys
import weakref

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from kernels import ranks

PROBE_ERROR = 0.06  # relative: what rounds apart in bf16, in 48 layers, is up to 0.033; what is wrong was 0.1 and more


@functools.cache
def say_once(text):
    """A note on stderr, the first time that it is said."""
    tqdm.write(f"note: {text}", file=sys.stderr)


# ------------------------------------------------------------------ what a model can do

def probed_once(probe):
    """Keep what a probe of a model has found, for as long as the model lives. A model in training mode is probed each
    time: dropout may have decided."""
    found = weakref.WeakKeyDictionary()

    @functools.wraps(probe)
    def remembered(model):
        if model.training:
            return probe(model)
        if model not in found:
            found[model] = probe(model)
        return found[model]
    return remembered


@probed_once
@torch.no_grad()
def head_is_plain(model):
    """True if the model's logits are hidden @ weight.T and nothing more: no bias, no scale, no soft-capping.

    The probe reads a few tokens with hooks in place. One makes the head say 1000 to everything: a scale or a cap
    behind the head changes that number. The others see whether the head reads what the body has written.
    """
    head = model.get_output_embeddings()
    seen = {}

    def after_body(module, inputs, output):
        seen["written"] = output[0]

    def after_head(module, inputs, output):
        seen["read"] = inputs[0]
        return torch.full_like(output, 1000.0)
    hooks = [model.base_model.register_forward_hook(after_body), head.register_forward_hook(after_head)]
    vocabulary = model.config.get_text_config().vocab_size
    row = torch.arange(min(8, vocabulary), device=head.weight.device)[None]
    try:
        logits = model(input_ids=row, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    plain = (
        type(head) is torch.nn.Linear
        and head.bias is None
        and "written" in seen
        and torch.equal(seen["written"], seen["read"])
        and bool((logits == 1000.0).all())
    )
    if not plain:
        say_once(f"{type(model).__name__} changes its logits beside the head; using its own head (more memory)")
    return plain


def can_share(model):
    """Whether a `Tree` computes what rows of their own do on this model. Says why not, once."""
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        say_once("under gradient checkpointing a cache carries no gradients; every sequence is computed in full")
        return False
    if ranks.is_sharded(model):
        say_once("the processes of --shard run each layer at the same time; every sequence is computed in full")
        return False
    return why_not_share(model) is None


@probed_once
@torch.no_grad()
def why_not_share(model):
    """What keeps a model from sharing prefixes, or None."""
    from transformers import DynamicCache
    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {"DynamicLayer"}
    attention = model.config._attn_implementation
    if kinds:  # sliding windows count slots, and recurrent states have none
        why = f"its cache has layers of the kind {', '.join(sorted(kinds))}"
    elif attention not in ("sdpa", "eager"):
        why = f"its attention ({attention}) takes no mask of ours"
    elif "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        why = "it takes no positions"
    elif "local" in getattr(model.config, "attention_layers", ()):  # GPT-Neo's windows, which its cache does not tell
        why = "its local attention counts slots"
    elif model.base_model is model:
        why = "its body cannot be run without its head"
    else:
        why = _tree_differs(model)
    if why is not None:
        say_once(f"{type(model).__name__} cannot share a prefix: {why}; every sequence is computed in full")
    return why


def _tree_differs(model):
    """Two branches on a prefix of three tokens, from a tree and from plain rows: how the tree fails, or None."""
    vocabulary = model.config.get_text_config().vocab_size
    prefix, first, second = (3, 4), (5, 6, 7), (5, 8, 9)

    def tensor(row):
        return torch.tensor(row, device=model.device)
    rows = tensor([[*prefix, *first], [*prefix, *second]]) % vocabulary
    try:
        plain_BD = model.base_model(input_ids=rows, use_cache=False).last_hidden_state[:, -1].float()
        tree = Tree(model, [tuple(rows[0, :2].tolist())], [0, 0])
        branches_RC = tensor([[*first, *second]]) % vocabulary
        inputs = tree.inputs(branches_RC, tensor([[1, 1, 1, 2, 2, 2]]))
        tree_BD = model.base_model(**inputs).last_hidden_state[0, [2, 5]].float()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"on a probe it fails ({error})"
    if (tree_BD - plain_BD).norm() < PROBE_ERROR * plain_BD.norm():
        return None
    return "on a probe its hidden states are others than in full sequences"


@probed_once
@torch.no_grad()
def can_pad(model):
    """Whether left-padded rows with a cache give what sequences by themselves do, on a prompt beside a longer one and
    then a token more. Says so, once, if not."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens = [token % vocabulary for token in (3, 1, 2, 4, 5, 6)]
    prompts = [tokens, tokens[:3:-1]]
    both = torch.arange(2, device=model.device)

    def logits(padded):
        rows = Rows(model, padded)
        return torch.stack([rows.begin_turn(both, prompts), rows.step(both, both)]).float()
    right = logits(padded=False)
    try:
        same = bool((logits(padded=True) - right).norm() < PROBE_ERROR * right.norm())
    except (TypeError, ValueError, RuntimeError, AttributeError):
        same = False
    if not same:
        say_once(f"{type(model).__name__} has no cache that works in padded rows; sampling reads each sequence by "
                 "itself, anew for each token")
    return same


@probed_once
def cache_name(model):
    """What the model calls the keys and values that it reads and adds to: transformers 5.24 renamed the argument."""
    for module in (model, model.base_model):  # a head that hands everything on does not name it
        names = inspect.signature(module.forward).parameters
        for name in ("past_key_values", "cache"):
            if name in names:
                return name
    return "past_key_values"


# ------------------------------------------------------------------ the tree

class Tree:
    """Sequences that begin alike, as trees: each distinct prefix is run once, and many branches grow from it.

    A row is a prefix followed by all of its branches, one after the other (or, in sampling, interleaved). Two that go
    on after "the cat sat", with "down ." and with "and left .":

        slot    0    1      2    3     4      5    6    7     8
        token  the  cat    sat  down   .     sat  and  left   .
        owner   0    0      1    1     1      2    2    2     2

    The prefix is all but the last token that is shared, and every branch starts with that one ("sat"): its hidden state
    predicts the branch's first own token, and so each branch holds all of its predictions.

    A token sees the prefix (owner 0) and what came before it in its own branch: `see`. Its position is how many
    tokens it sees before itself. Attention knows of other tokens only through these two, so every branch gets what it
    would get in a row of its own. Keys and values of all slots stay in the cache, and carry gradients: the gradients of
    all branches add up in the prefix.
    """

    def __init__(self, model, prefixes, row_of_branch=None):
        """prefixes: tuples of token ids, one for each row; row_of_branch: the row of each branch that will grow (see
        `step`). Without it each branch has a row of its own, and `begin_turn` brings it back in a later turn."""
        from transformers import DynamicCache
        self.model = model
        self.cache = DynamicCache()
        self.cache_name = cache_name(model)
        self.rows = list(range(len(prefixes)))  # the rows that are in the batch
        self.row_of_branch = row_of_branch or self.rows
        self.several_turns = row_of_branch is None
        self.parked = {}  # row -> the (keys, values) of each layer, of rows that left the batch and may come back

        distinct = {prefix: i for i, prefix in enumerate(dict.fromkeys(prefixes))}
        width = max(map(len, distinct))
        length_R1 = torch.tensor([[len(prefix)] for prefix in prefixes], device=model.device)
        self.owner_RS = self._owners(length_R1, width)
        if width:  # right-padded under causal attention: no mask is needed
            ids = [list(prefix) + [0] * (width - len(prefix)) for prefix in distinct]
            ids = torch.tensor(ids, device=model.device)
            model.base_model(input_ids=ids, use_cache=True, **{self.cache_name: self.cache})
        if len(distinct) < len(prefixes):
            which = [distinct[prefix] for prefix in prefixes]
            self.cache.reorder_cache(torch.tensor(which, device=model.device))

    @staticmethod
    def _owners(length_R1, width):
        """owner_RS of rows that hold so many tokens of the prefix: 0 on these, -1 on padding."""
        return -(torch.arange(width, device=length_R1.device) >= length_R1).long()

    def inputs(self, input_ids_RC, owner_RC):
        """What the model needs to run C more tokens a row. owner: 1 + the branch of each, or -1 on padding."""
        self.owner_RS = torch.cat([self.owner_RS, owner_RC], 1)
        owner_R1S = self.owner_RS[:, None]
        see_RCS = (owner_R1S == 0) | (owner_R1S == owner_RC[:, :, None])
        see_RCS = see_RCS.tril(see_RCS.shape[2] - see_RCS.shape[1])
        position_RC = (see_RCS.sum(-1) - 1) * (owner_RC >= 0)  # padding stays within the context
        mask_RCS = torch.zeros(see_RCS.shape, dtype=self.model.dtype, device=see_RCS.device)
        mask_RCS.masked_fill_(~see_RCS, torch.finfo(self.model.dtype).min)
        return {
            "input_ids": input_ids_RC,
            "position_ids": position_RC,
            "attention_mask": mask_RCS[:, None],
            self.cache_name: self.cache,
            "use_cache": True,
        }

    def begin_turn(self, branch_B, prompts):
        """A turn begins on the live branches: read what is new in their prompts (token ids that begin with all that the
        branch has seen). Returns the logits of what follows. For a second turn each branch needs a row of its own;
        live branches are named in ascending order, and one that is left out of a turn does not come back."""
        branches = branch_B.tolist()
        if self.parked:
            self._return([self.row_of_branch[branch] for branch in branches])
        length_R = (self.owner_RS >= 0).sum(1).tolist()
        seen = dict(zip(self.rows, length_R))
        new_tokens = []
        for branch, prompt in zip(branches, prompts):
            new_tokens.append(prompt[seen[self.row_of_branch[branch]]:])
        if not all(new_tokens):
            raise ValueError("a turn can begin only where its prompt goes on beyond what its branch has read")
        return self._read(branches, new_tokens)

    def step(self, branch_B, token_B):
        """One more token on each of the live branches; returns the logits of what follows."""
        return self._read(branch_B.tolist(), token_B[:, None].tolist())

    def _read(self, branches, new_tokens):
        """Run the new tokens of each live branch, all in one pass; returns the logits after the last one of each."""
        rows = sorted({self.row_of_branch[branch] for branch in branches})
        if len(rows) < len(self.rows):
            self._leave([row in rows for row in self.rows])
        place = {row: r for r, row in enumerate(rows)}
        ids, owners, last = [[] for _ in rows], [[] for _ in rows], []
        for branch, tokens in zip(branches, new_tokens):
            r = place[self.row_of_branch[branch]]
            ids[r] += tokens
            owners[r] += [branch + 1] * len(tokens)
            last.append((r, len(ids[r]) - 1))
        device = self.model.device
        ids_RC = pad_rows(ids, 0).to(device)
        owner_RC = pad_rows(owners, -1).to(device)
        row_B, column_B = torch.tensor(last, device=device).T
        inputs = self.inputs(ids_RC, owner_RC)
        if head_is_plain(self.model):
            hidden_BD = self.model.base_model(**inputs).last_hidden_state[row_B, column_B]
            return hidden_BD @ self.model.get_output_embeddings().weight.T
        return self.model(**inputs).logits[row_B, column_B]

    def _leave(self, stays):
        """Rows without a live branch leave the batch; if they may come back, what their tokens left in the cache is
        parked, a row at a time and without its gaps."""
        stays_R = torch.tensor(stays, device=self.owner_RS.device)
        for layer in self.cache.layers:  # one by one: never more than one layer twice in memory
            for r, row in enumerate(self.rows):
                if self.several_turns and not stays[r]:
                    used_S = self.owner_RS[r] >= 0
                    kept = layer.keys[r][:, used_S], layer.values[r][:, used_S]
                    self.parked.setdefault(row, []).append(kept)
            layer.keys = layer.keys[stays_R]
            layer.values = layer.values[stays_R]
        self.rows = [row for row, stay in zip(self.rows, stays) if stay]
        self.owner_RS = self.owner_RS[stays_R]

    def _return(self, rows):
        """Put the batch together again, of these rows alone."""
        self._leave([False] * len(self.rows))
        parked = [self.parked[row] for row in rows]
        self.parked = {}
        self.rows = rows
        lengths = [layers[0][0].shape[1] for layers in parked]
        length_R1 = torch.tensor(lengths, device=self.owner_RS.device)[:, None]
        self.owner_RS = self._owners(length_R1, max(lengths))

        def padded(tensors):
            """Keys or values of all rows, each heads x slots x width."""
            return pad_sequence([tensor.transpose(0, 1) for tensor in tensors], batch_first=True).transpose(1, 2)
        for i, layer in enumerate(self.cache.layers):
            layer.keys = padded([layers[i][0] for layers in parked])
            layer.values = padded([layers[i][1] for layers in parked])
            for layers in parked:
                layers[i] = None


def pad_rows(rows, value):
    """Lists of whole numbers -> one tensor, padded on the right."""
    width = max(map(len, rows))
    padded = [[*row, *[value] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long)


def share(prefixes, lengths=None):
    """The row of each branch, as (first branch on its prefix, number).

    Branches on one prefix share a row, with two limits. As many as there are on a prefix on average (of 32, 16 and 16
    candidates, 32 take two rows), because all rows of a batch are as wide as the widest. And no more tokens (lengths:
    of the branches) than the prefix has, or 512, because each token of a row is held against all others.
    """
    first = {}
    for i, prefix in enumerate(prefixes):
        first.setdefault(prefix, i)
    most = len(prefixes) // len(first)
    rows, open_row = [], {}  # prefix -> (number, branches, tokens) of the row that still takes branches
    for i, prefix in enumerate(prefixes):
        length = lengths[i] if lengths else 0
        number, n_branches, n_tokens = open_row.get(prefix, (0, 0, 0))
        if n_branches == most or n_branches and n_tokens + length > max(512, len(prefix)):
            number, n_branches, n_tokens = number + 1, 0, 0
        open_row[prefix] = (number, n_branches + 1, n_tokens + length)
        rows.append((first[prefix], number))
    return rows


# ------------------------------------------------------------------ without a tree

class Rows:
    """Every branch in a row of its own, its prompt read in full in every turn.

    padded: the rows side by side, left-padded, with a cache. A model that cannot do that (`can_pad`) gets each sequence
    by itself, anew for each token: slow, and right on any model.
    """

    def __init__(self, model, padded):
        self.model = model
        self.padded = padded
        self.cache_name = cache_name(model)

    def begin_turn(self, branch_B, prompts):
        """As Tree's."""
        from transformers import DynamicCache
        if not self.padded:
            self.sequences = {branch: list(prompt) for branch, prompt in zip(branch_B.tolist(), prompts)}
            return self._one_by_one(branch_B)
        self.branch_B = branch_B
        self.cache = DynamicCache(config=self.model.config)
        width = max(map(len, prompts))
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        self.mask_BS = torch.tensor(mask, device=branch_B.device)
        return self._side_by_side(torch.tensor(ids, device=branch_B.device))

    def step(self, branch_B, token_B):
        """As Tree's."""
        if not self.padded:
            for branch, token in zip(branch_B.tolist(), token_B.tolist()):
                self.sequences[branch].append(token)
            return self._one_by_one(branch_B)
        kept_B = torch.searchsorted(self.branch_B, branch_B)
        self.branch_B = branch_B
        self.cache.reorder_cache(kept_B)
        mask_BS = self.mask_BS[kept_B]
        self.mask_BS = torch.cat([mask_BS, torch.ones_like(mask_BS[:, :1])], 1)
        return self._side_by_side(token_B[:, None])

    def _side_by_side(self, ids_BC):
        position_BS = (self.mask_BS.cumsum(-1) - 1).clamp(min=0)
        output = self.model(
            input_ids=ids_BC,
            attention_mask=self.mask_BS,
            position_ids=position_BS[:, -ids_BC.shape[1]:],
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache})
        return output.logits[:, -1]

    def _one_by_one(self, branch_B):
        logits = []
        for branch in branch_B.tolist():
            row = torch.tensor([self.sequences[branch]], device=branch_B.device)
            logits.append(self.model(input_ids=row, use_cache=False).logits[:, -1])
        return torch.cat(logits)


def common_prefixes(prompts, groups):
    """What each prompt (a tuple of token ids) begins with as all others of its group do, without its last token.
    groups: of each prompt, anything that can be compared."""
    members = {}
    for prompt, group in zip(prompts, groups):
        members.setdefault(group, []).append(prompt[:-1])
    shared = {}
    for group, alike in members.items():
        first, last = min(alike), max(alike)  # what these two have in common, all between them have
        differ = [i for i, (a, b) in enumerate(zip(first, last)) if a != b]
        shared[group] = first[:differ[0]] if differ else first
    return [shared[group] for group in groups]


@torch.no_grad()
def branches(model, prompts, several_turns=False, prefixes=None):
    """The place where turns grow after prompts (tuples of token ids): `begin_turn` reads the prompts, `step` takes the
    next token of the live branches, and both return the logits of what follows. several_turns: further turns will
    follow on the same branches; prefixes: what of each prompt is to be read once for all that begin so (without them,
    all but its last token)."""
    if not can_share(model):
        return Rows(model, padded=can_pad(model))
    prefixes = prefixes or [prompt[:-1] for prompt in prompts]
    if several_turns:
        return Tree(model, prefixes)
    lengths = [len(prompt) - 1 - len(prefix) for prompt, prefix in zip(prompts, prefixes)]
    rows = share(prefixes, lengths)
    number = {row: i for i, row in enumerate(dict.fromkeys(rows))}
    return Tree(model, [prefixes[first] for first, _ in number], [number[row] for row in rows])
