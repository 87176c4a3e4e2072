"""Sampling: what a language model says after each of many prompts, side by side.

One token a step on every prompt whose turn is not over. A token is picked by inverting the cumulative distribution at
a point that depends on the row's key alone: neither order, nor batch size, nor a stop in between changes what is said.
At temperature 0 it is the likeliest one. What prompts have in common is read once (`kernels.prefix`).

The agent (`actor.py`) and a simulated human that is a local model (`machinery/speaker.py`) speak through it. Exercised
by `python -m pytest tests/test_actor.py tests/test_humans.py`.

Shapes: B rows, T tokens, V vocabulary.
"""
import hashlib

import numpy as np
import torch

from kernels.prefix import branches
from machinery.bars import progress
from machinery.files import InputError
from machinery.template import control_tokens, end_of_turn, known_ids
from machinery.train import check_context


def seed_of(key):
    """What the randomness of a row is seeded with: 64 bits that depend on its key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def noise(keys, max_tokens):
    """Uniform numbers [len(keys), max_tokens]: row i depends on keys[i] alone, so neither order nor batch size
    matters."""
    rows = []
    for key in keys:
        rng = np.random.default_rng(seed_of(key))
        rows.append(rng.random(max_tokens))
    return torch.from_numpy(np.stack(rows)).float()


def pick(logits_BV, noise_B, temperature=1.0, top_p=1.0):
    """One token a row, by inverting the cumulative distribution at noise_B. top_p keeps the smallest set of most
    likely tokens whose probability reaches top_p (the token that crosses the line included). Temperature 0: the
    likeliest token. InputError where a row has no distribution, its logits not being finite."""
    probs_BV = (logits_BV.float() / (temperature or 1.0)).softmax(-1)
    if top_p < 1.0:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        dropped_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
        probs_BV = probs_BV.masked_fill(dropped_BV.scatter(-1, order_BV, dropped_BV), 0.0)
    cumulative_BV = probs_BV.cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    if not total_B1.isfinite().all():
        raise InputError(f"the model's logits, at temperature {temperature:g}, are not finite; train it anew, with a "
                         "lower learning rate, or take another --model")
    if temperature == 0:
        return probs_BV.argmax(-1)
    largest_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))  # a point at the total would be no token
    point_B1 = torch.minimum(noise_B[:, None] * total_B1, largest_B1)
    return torch.searchsorted(cumulative_BV, point_B1, right=True).squeeze(-1)


class Memory:
    """What a model has read of dialogues that go on, so that a turn reads only what is new. It begins at their first
    turn; where a server samples, it stays empty."""

    def __init__(self):
        self.branches = None

    def recall(self, model, prompts, places):
        """The branches, and the row of each of these dialogues there. places: what the caller calls them."""
        if self.branches is None:
            self.branches = branches(model, prompts, several_turns=True)
            self.row = {place: row for row, place in enumerate(places)}
        return self.branches, [self.row[place] for place in places]


def sample(model, tokenizer, prompts, keys, *, max_tokens=64, count=None, server=None, **how):
    """One turn for each prompt (a list of token ids): lists of token ids that end with the end-of-turn token, or,
    when the turn was cut off at max_tokens or at a control token that has no place in a turn, without it.

    keys: what each row's randomness is seeded with, any value with a repr. count: a function that is told how many
    tokens were sampled. server: a PolicyServer (machinery/policy_server.py) that samples in place of the model here.
    how: temperature and top_p, and what `sample_here` knows.
    """
    check_context(model, max(map(len, prompts)) + max_tokens, "a dialogue with its next turn")
    prompts = [tuple(prompt) for prompt in prompts]
    speak = server.sample if server else sample_here
    turns = speak(model, tokenizer, prompts, keys, max_tokens=max_tokens, **how)
    if count:
        count(sum(map(len, turns)))
    return turns


@torch.no_grad()
def sample_here(model, tokenizer, prompts, keys, *, max_tokens, temperature=1.0, top_p=1.0,
                memory=None, places=None, stop=None):
    """`sample` by the model here. Ids that are no token of the tokenizer's (of a vocabulary padded to a multiple) have
    probability 0. memory: `branches` that have read the prompts already, or a Memory of the dialogues that they are of,
    with their `places` there. stop: the ids of the control tokens at which a turn is cut off, where they are others."""
    device, end = model.device, end_of_turn(tokenizer)
    active = torch.arange(len(prompts), device=device)  # the prompts whose turn is not over
    branch_B = active
    if places is not None:
        memory, rows = memory.recall(model, prompts, places)
        branch_B = torch.tensor(rows, device=device)
    memory = memory or branches(model, prompts)
    logits_BV = memory.begin_turn(branch_B, prompts)

    noise_BT = noise(keys, max_tokens).to(device)
    if stop is None:
        stop = control_tokens(tokenizer)
    control = torch.tensor(stop, device=device)
    vocabulary = range(logits_BV.shape[-1])
    no_token = sorted(set(vocabulary) - known_ids(tokenizer))
    no_token = torch.tensor(no_token, dtype=torch.long, device=device)
    turns = [[] for _ in prompts]
    for step in progress(range(max_tokens), "tokens"):
        logits_BV = logits_BV.index_fill(-1, no_token, -float("inf"))
        token_B = pick(logits_BV, noise_BT[active, step], temperature, top_p)
        cut_off_B = torch.isin(token_B, control)
        said_B = ~cut_off_B
        for i, token in zip(active[said_B].tolist(), token_B[said_B].tolist()):
            turns[i].append(token)
        goes_on_B = said_B & (token_B != end)
        if step == max_tokens - 1 or not goes_on_B.any():
            break
        active = active[goes_on_B]
        logits_BV = memory.step(branch_B[active], token_B[goes_on_B])
    return turns
