"""The actor: the policy pi(a_t | o_t) that talks, and how it learns from good and bad turns.

Sampling runs many dialogues in lock-step. Learning is DPO on single turns: for one observation o_t, a chosen turn a^+
and a rejected turn a^- (picked by the critic's advantage), and the frozen initial policy pi_ref, which sees what the
actor sees and no c:

    loss = -log sigmoid( beta [ log pi(a^+|o_t)/pi_ref(a^+|o_t)  -  log pi(a^-|o_t)/pi_ref(a^-|o_t) ] )          (Eq. 4)

with log-probs summed over the tokens of the turn. The baselines use the same loop on other data: multi-turn DPO puts
whole trajectories in the place of the turns, and RFT (rejection-sampling fine-tuning) raises the log-probs of
successful trajectories.

Place in the data flow: base/ + tasks -> `play_out` -> trajectories.jsonl; states -> `sample` -> samples.jsonl;
candidates.jsonl -> `turn_pairs` -> pairs.jsonl -> `train_preferences` -> actor/.
Exercised by `python sweet.py rollout`, `python sweet.py actor`; `python -m pytest tests/test_actor.py`.
Differences from the paper: none in the formula; sizes and step sizes of the small world are in `sweet.py`.

Shapes: B rows, T tokens, V vocabulary.
"""
import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from env import INSTRUCTIONS, DialogueEnv, Task, control_tokens, end_of_turn, grade, render
from kernels.fit import arg, fit
from kernels.logprob import collate, reference_sums, turn_logprobs


@dataclass(frozen=True)
class Rollout:
    """Dialogues by the initial policy."""
    tasks: int = arg(120, "training tasks", 10000)
    per_task: int = arg(8, "offline dialogues a task")
    max_turns: int = arg(4, "turns of a dialogue, the answer included", 10)
    max_tokens: int = arg(48, "tokens of a turn at most")
    temperature: float = arg(1.0, "sampling temperature of the offline dialogues")


@dataclass(frozen=True)
class Candidates:
    """Turns for the critic to choose from."""
    states: int = arg(2000, "states (turns of offline dialogues) to sample at")
    n: int = arg(16, "candidates a state", 16)


@dataclass(frozen=True)
class Actor:
    """DPO on turn pairs (Eq. 4)."""
    lr: float = arg(1e-3, "learning rate", 2e-7)
    beta: float = arg(1.0, "Eq. 4's beta", 0.1)
    nll: float = arg(1.0, "weight of the chosen turn's negative log-likelihood", 0.01)
    batch_size: int = arg(16, "turn pairs a step", 8)
    epochs: int = arg(4, "passes over the pairs", 1)


@dataclass(frozen=True)
class Rft:
    """Rejection-sampling fine-tuning, a baseline."""
    lr: float = arg(1e-3, "learning rate", 2e-7)
    batch_size: int = arg(32, "trajectories a step", 32)
    epochs: int = arg(40, "passes over the successful trajectories", 4)


@dataclass(frozen=True)
class Multiturn:
    """DPO on whole trajectories, a baseline."""
    lr: float = arg(1e-3, "learning rate", 2e-7)
    beta: float = arg(1.0, "DPO's beta on whole trajectories", 0.1)
    nll: float = arg(3.0, "weight of the chosen trajectory's negative log-likelihood", 0.01)
    batch_size: int = arg(8, "trajectory pairs a step", 8)
    epochs: int = arg(8, "passes over the pairs", 4)


# ------------------------------------------------------------------ Eq. 4

def dpo_loss(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta):
    """Eq. 4. Log-probs (nats, summed over tokens) of chosen and rejected under the policy and pi_ref -> mean loss."""
    return -F.logsigmoid(beta * ((chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B))).mean()


# ------------------------------------------------------------------ sampling

def noise(keys, max_tokens):
    """Uniform numbers [len(keys), max_tokens]: row i depends on keys[i] alone, so neither order nor batch size
    matters."""
    seeds = (int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") for key in keys)
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(max_tokens) for seed in seeds])).float()


def pick(logits_BV, noise_B, temperature=1.0, top_p=1.0):
    """One token a row, by inverting the cumulative distribution at noise_B. top_p keeps the smallest set of most
    likely tokens whose probability reaches top_p (the token that crosses the line included)."""
    probs_BV = (logits_BV.float() / temperature).softmax(-1)
    if top_p < 1.0:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        dropped_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
        probs_BV = probs_BV.masked_fill(dropped_BV.scatter(-1, order_BV, dropped_BV), 0.0)
    cumulative_BV = probs_BV.cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    point_B1 = torch.minimum(noise_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BV, point_B1, right=True).squeeze(-1)


@torch.no_grad()
def sample(model, tokenizer, prompts, keys, *, temperature=1.0, top_p=1.0, max_tokens=64):
    """One turn for each prompt (a list of token ids): lists of token ids that end with the end-of-turn token, or,
    when the turn was cut off at max_tokens or at a control token that has no place in a turn, without it. keys: what
    each row's randomness is seeded with, any value with a repr."""
    eot, prompts = end_of_turn(tokenizer), [tuple(prompt) for prompt in prompts]
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    distinct, width = list(place), max(map(len, place))  # the candidates of one state share its prompt: read it once
    control = torch.tensor(control_tokens(tokenizer), device=model.device)
    ids = torch.tensor([(eot,) * (width - len(p)) + p for p in distinct], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct], device=model.device)
    copies = torch.tensor([place[p] for p in prompts], device=model.device)
    noise_BT = noise(keys, max_tokens).to(model.device)
    rows = torch.arange(len(prompts), device=model.device)  # which prompt each live row of the batch belongs to
    turns, cache = [[] for _ in prompts], None
    for step in range(max_tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                    logits_to_keep=1)
        logits_BV, cache = out.logits[:, -1], out.past_key_values
        if step == 0:
            logits_BV, mask = logits_BV[copies], mask[copies]
            cache.batch_select_indices(copies)
        token_B = pick(logits_BV, noise_BT[rows, step], temperature, top_p)
        cut_off = torch.isin(token_B, control)
        for row, token, cut in zip(rows.tolist(), token_B.tolist(), cut_off.tolist()):
            if not cut:
                turns[row].append(token)
        live = ~(cut_off | (token_B == eot))
        if not live.any():
            break
        rows, token_B, mask = rows[live], token_B[live], mask[live]
        if not live.all():
            cache.batch_select_indices(live.nonzero().squeeze(-1))  # finished rows leave the batch
        ids, mask = token_B[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], -1)
    return turns


def turn_text(tokenizer, output_ids):
    """The text of a sampled turn, without its end-of-turn token."""
    ids = output_ids[:-1] if output_ids and output_ids[-1] == end_of_turn(tokenizer) else output_ids
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def play_out(model, tokenizer, envs, human, keys, *, temperature=1.0, top_p=1.0, max_tokens=64):
    """Play dialogues to their end, all in lock-step. envs: DialogueEnv after reset() or observe(); keys: a seed for
    each.

    Every agent turn keeps its `output_ids`, so that log-probs are of the tokens that were sampled, and, as in
    ColBench's format, `input` and `output` (the text that the model read and wrote).
    """
    live = list(range(len(envs)))
    while live:
        prompts = [render(tokenizer, envs[i].messages)[0] for i in live]
        turns = sample(model, tokenizer, prompts, [(keys[i], envs[i].turns) for i in live], temperature=temperature,
                       top_p=top_p, max_tokens=max_tokens)
        going = []
        for i, prompt, output_ids in zip(live, prompts, turns):
            text = turn_text(tokenizer, output_ids)
            texts = {"input": tokenizer.decode(prompt), "output": tokenizer.decode(output_ids)}
            if not envs[i].step(text, **texts, output_ids=output_ids):
                going.append(i)
        for i, reply in zip(going, human.reply([envs[i].task for i in going], [envs[i].messages for i in going])):
            envs[i].observe(reply)
        live = going


def play_tasks(model, tokenizer, tasks, human, keys, cfg, grade=grade, instructions=INSTRUCTIONS, **decoding):
    """Play a dialogue on each task to its end and grade it: a list of trajectories in ColBench's format."""
    envs = [DialogueEnv(cfg.max_turns, instructions) for _ in tasks]
    for env, task in zip(envs, tasks):
        env.reset(task)
    play_out(model, tokenizer, envs, human, keys, max_tokens=cfg.max_tokens, **decoding)
    rewards = grade([env.answer for env in envs], tasks)
    return [{"task": env.task.to_record(), "dialogue_history": env.messages, "answer": env.answer, "reward": reward}
            for env, reward in zip(envs, rewards)]


def bare(messages):
    """Messages as a model needs them: without the texts that trajectories keep for the reader."""
    return [{key: value for key, value in message.items() if key not in ("input", "output")} for message in messages]


def sample_candidates(model, tokenizer, states, keys, n, max_tokens):
    """Add to each state {"task", "messages"} its "candidates", [{"content", "output_ids", "count"}]: the different
    ones among n sampled turns."""
    prompts = [render(tokenizer, state["messages"])[0] for state in states for _ in range(n)]
    turns = sample(model, tokenizer, prompts, [(*key, k) for key in keys for k in range(n)], max_tokens=max_tokens)
    for i, state in enumerate(states):
        counts = Counter(tuple(turn) for turn in turns[i * n:(i + 1) * n] if turn)
        state["candidates"] = [{"content": turn_text(tokenizer, list(turn)), "output_ids": list(turn), "count": count}
                               for turn, count in counts.items()]


def play_on(model, tokenizer, states, human, n, cfg, seed, grade=grade):
    """Value every candidate by Monte Carlo: add "returns", the rewards of n dialogues that the policy plays on from
    it."""
    envs, keys = [], []
    for s, state in enumerate(states):
        for c, candidate in enumerate(state["candidates"]):
            for k in range(n):
                env = DialogueEnv(cfg.max_turns)
                env.reset(Task.from_record(state["task"]))
                env.messages, env.turns = list(state["messages"]), len(state["messages"]) // 2
                env.step(candidate["content"], output_ids=candidate["output_ids"])
                envs.append(env)
                keys.append((seed, "play on", s, c, k))
    going = [i for i, env in enumerate(envs) if env.answer is None]
    for i, reply in zip(going, human.reply([envs[i].task for i in going], [envs[i].messages for i in going])):
        envs[i].observe(reply)
    for part in (going[i:i + 512] for i in range(0, len(going), 512)):
        play_out(model, tokenizer, [envs[i] for i in part], human, [keys[i] for i in part], max_tokens=cfg.max_tokens)
    rewards = iter(grade([env.answer for env in envs], [env.task for env in envs]))
    for candidate in (c for state in states for c in state["candidates"]):
        candidate["returns"] = [next(rewards) for _ in range(n)]


# ------------------------------------------------------------------ learning

def turn_pairs(advantages, counts, n, rng):
    """Indices (chosen, rejected) of up to n different pairs: chosen from the better half by advantage, the other from
    the worse.

    counts: how often each candidate was sampled; the halves are of the samples, so that a turn which the policy takes
    half of the time is not one rare turn among many. Only pairs with a strictly larger advantage count; a state that
    has none gives none.
    """
    order = sorted((i for i, count in enumerate(counts) for _ in range(count)), key=lambda i: -advantages[i])
    half = len(order) // 2
    found = [(a, b) for a in order[:half] for b in order[len(order) - half:] if advantages[a] > advantages[b]]
    rng.shuffle(found)
    return list(dict.fromkeys(found))[:n]


def turn_view(tokenizer, prompt, turn):
    """(input_ids, turn_ids) of one turn after its observation: only the turn's tokens have a turn number (1)."""
    prefix, _ = render(tokenizer, prompt)
    ids = turn.get("output_ids")
    if ids is None:
        ids = render(tokenizer, [*prompt, {"role": "assistant", "content": turn["content"]}])[0][len(prefix):]
    return prefix + ids, [0] * len(prefix) + [1] * len(ids)


def preference_loss(model, batch, beta, nll):
    """DPO on a batch of {"chosen", "rejected", "ref_chosen", "ref_rejected"}: the loss, and what to watch."""
    B = len(batch)
    sides = [(side, pair) for side in ("chosen", "rejected") for pair in batch]
    sums_BK, lengths_BK = turn_logprobs(model, collate([pair[side] for side, pair in sides], model.device))
    sums_B, ref_B = sums_BK.sum(-1), sums_BK.new_tensor([sum(pair[f"ref_{side}"]) for side, pair in sides])
    loss = dpo_loss(sums_B[:B], sums_B[B:], ref_B[:B], ref_B[B:], beta)
    loss = loss - nll * sums_B[:B].sum() / lengths_BK[:B].sum()
    with torch.no_grad():
        reward_B = beta * (sums_B - ref_B)
        metrics = {"accuracy": (reward_B[:B] > reward_B[B:]).float().mean().item(),
                   "margin": (reward_B[:B] - reward_B[B:]).mean().item()}
    return loss, metrics


def train_preferences(model, examples, out, cfg, seed, save, label):
    """Fit the policy on pairs of views. `model` is the initial policy: its log-probs, pi_ref, are taken before the
    first step."""
    for side in ("chosen", "rejected"):
        for example, sums in zip(examples, reference_sums(model, [e[side] for e in examples], label="pi_ref")):
            example[f"ref_{side}"] = sums
    return fit(model, examples, lambda m, batch: preference_loss(m, batch, cfg.beta, cfg.nll), out, cfg, seed, save,
               label=label, sizes=[len(e["chosen"][0]) + len(e["rejected"][0]) for e in examples])


def imitation_loss(model, batch):
    """RFT: minus the mean log-prob of the agent's tokens in a batch of views."""
    sums_BK, lengths_BK = turn_logprobs(model, collate(batch, model.device))
    return -sums_BK.sum() / lengths_BK.sum(), {}


def train_imitation(model, views, out, cfg, seed, save, label):
    """Fit the policy on views of successful trajectories (RFT), or of a demonstrator's dialogues (the small world's
    base)."""
    return fit(model, views, imitation_loss, out, cfg, seed, save, label=label, sizes=[len(ids) for ids, _ in views])
