"""SWEET-RL in one sitting: rollout -> critic -> turn pairs -> actor, in plain PyTorch, nothing hidden.

    python nano.py        # trains everything from scratch on a CPU and prints how often the task is solved

An agent talks with a human who wants a Python function and has described only part of it. In each of its four turns the
agent asks a question or hands in the function; the last turn has to be the function. The reward is known at the end
alone: do all tests pass? So which of the turns were good, and which question was a turn lost?

The answer of the paper (arXiv 2503.15478) in three sentences. Train a *critic*, a language model that may read the
hidden solution c, to prefer the dialogues that succeeded over those that failed, and write its preference as a sum of
one number a turn, the advantage A (Eq. 2 and 3). Sample many turns at one point of a dialogue and let A say which are
better. Train the *actor*, which never sees c, to prefer the better ones by plain DPO on single turns (Eq. 4).

    A(o_t, a_t, c) = 1/L sum_l [ log pi_theta(a_t^l | o_t, a_t^<l, c) - log pi_ref(a_t^l | o_t, a_t^<l, c) ]     (Eq. 3)
    critic: -log sigmoid( beta [ sum_t A(o_t^+, a_t^+, c) - sum_t A(o_t^-, a_t^-, c) ] )                         (Eq. 2)
    actor:  -log sigmoid( beta [ log pi(a^+|o)/pi_ref(a^+|o) - log pi(a^-|o)/pi_ref(a^-|o) ] )                   (Eq. 4)

o_t is the dialogue so far, a_t the agent's turn of L tokens, c the reference solution; + marks the better one of a
pair, - the worse. pi_ref is the model before training. A is divided by L because a sum of log-probs grows with the
number of tokens: without it the longest turn, the answer, would speak for the whole dialogue.

What the other files add: real models, other humans and tasks, baselines, exact resume, shared prefixes, a report. The
equations are the same, and a test holds the functions of this file equal to theirs.
Shapes: B sequences, T tokens, K turns, V vocabulary. An "example" is (input_ids, turn_ids), two lists of one length:
turn_ids is k on the tokens of the agent's k-th turn and 0 on all that the agent only reads.
"""
import copy
import random
import time
from collections import Counter

import torch
import torch.nn.functional as F

from env import DialogueEnv, end_of_turn, grade, render
from worlds import backend as world  # procedural tasks, a scripted human, a demonstrator to imitate

seed = 0
n_documents, base_lr, base_batch, base_epochs = 16000, 6e-3, 24, 2       # the initial policy imitates these dialogues
n_tasks, dialogues_per_task, max_tokens = 120, 8, 48                     # offline dialogues; tokens of a turn at most
pairs_per_task, pairs_per_state = 16, 2                                  # at most: pairs of dialogues, pairs of turns
n_states, n_candidates = 1600, 16                                        # where turns are sampled, and how many
critic_lr, critic_beta, critic_nll, critic_batch, critic_epochs = 1e-3, 1.0, 0.1, 8, 3
actor_lr, actor_beta, actor_nll, actor_batch, actor_epochs = 1e-3, 1.0, 1.0, 16, 4
n_test = 200                                                             # held-out tasks


# ----------------------------------------------------------------------------------------------------------------------
# log-probs: the one number that critic and actor are made of

def turn_logprobs(model, examples):
    """log pi(a_t | o_t) of every agent turn: sums_BK (nats) and lengths_BK (tokens), both 0 where a turn is absent."""
    B, T = len(examples), max(len(input_ids) for input_ids, _ in examples)
    ids_BT = torch.zeros(B, T, dtype=torch.long)  # padded on the right: no real token sees what comes after it
    turns_BT = torch.zeros(B, T, dtype=torch.long)
    for b, (input_ids, turn_ids) in enumerate(examples):
        ids_BT[b, :len(input_ids)] = torch.tensor(input_ids)
        turns_BT[b, :len(turn_ids)] = torch.tensor(turn_ids)
    logits_BTV = model(input_ids=ids_BT).logits[:, :-1]  # position t predicts token t + 1
    logprobs_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
    K = int(turns_BT.max())
    in_turn_BTK = turns_BT[:, 1:, None] == torch.arange(1, K + 1)  # is this token one of turn k?
    sums_BK = (logprobs_BT[:, :, None] * in_turn_BTK).sum(1)
    return sums_BK, in_turn_BTK.sum(1)


@torch.no_grad()
def reference_logprobs(model, examples, batch_size=128):
    """The sums of `turn_logprobs` without gradient: a list of K numbers for each example."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))  # of like length: little padding
    sums = [None] * len(examples)
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        sums_BK, _ = turn_logprobs(model, [examples[i] for i in batch])
        for i, row in zip(batch, sums_BK.tolist()):
            sums[i] = row[:max(examples[i][1])]
    return sums


def add_reference(model, pairs):
    """Note pi_ref's log-probs beside each pair. The model before its first step is pi_ref: no second one is needed."""
    for side in ("chosen", "rejected"):
        for pair, sums in zip(pairs, reference_logprobs(model, [pair[side] for pair in pairs])):
            pair["ref_" + side] = sums


def both_sides(model, pairs):
    """Log-probs of a batch of pairs, under the model and under pi_ref. Rows: all chosen ones, then all rejected."""
    sums_BK, lengths_BK = turn_logprobs(model, [p["chosen"] for p in pairs] + [p["rejected"] for p in pairs])
    ref_BK = torch.zeros_like(sums_BK, requires_grad=False)
    for b, row in enumerate([p["ref_chosen"] for p in pairs] + [p["ref_rejected"] for p in pairs]):
        ref_BK[b, :len(row)] = torch.tensor(row, dtype=ref_BK.dtype)
    return sums_BK, ref_BK, lengths_BK


# ----------------------------------------------------------------------------------------------------------------------
# the two losses

def turn_advantages(sums_BK, ref_sums_BK, lengths_BK):
    """Eq. 3: how much more likely the critic makes each turn than pi_ref does, per token. 0 where a turn is absent."""
    return (sums_BK - ref_sums_BK) / lengths_BK.clamp(min=1)


def critic_loss(model, pairs, beta=critic_beta, nll=critic_nll):
    """Eq. 2 on pairs of whole dialogues, and a little likelihood of the better one."""
    sums_BK, ref_BK, lengths_BK = both_sides(model, pairs)
    score_B = turn_advantages(sums_BK, ref_BK, lengths_BK).sum(-1)
    n = len(pairs)
    preference = -F.logsigmoid(beta * (score_B[:n] - score_B[n:])).mean()
    return preference - nll * sums_BK[:n].sum() / lengths_BK[:n].sum()


def actor_loss(model, pairs, beta=actor_beta, nll=actor_nll):
    """Eq. 4 on pairs of single turns, and the likelihood of the better one, which keeps what the model could do."""
    sums_BK, ref_BK, lengths_BK = both_sides(model, pairs)
    ratio_B = (sums_BK - ref_BK).sum(-1)
    n = len(pairs)
    preference = -F.logsigmoid(beta * (ratio_B[:n] - ratio_B[n:])).mean()
    return preference - nll * sums_BK[:n].sum() / lengths_BK[:n].sum()


def imitation_loss(model, examples):
    """Minus the mean log-prob of the demonstrator's tokens."""
    sums_BK, lengths_BK = turn_logprobs(model, examples)
    return -sums_BK.sum() / lengths_BK.sum()


def train(model, examples, loss_fn, lr, batch_size, epochs, rng):
    """AdamW; the learning rate rises over the first twentieth of the steps and then falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    batches = []
    for _ in range(epochs):
        order = list(range(len(examples)))
        rng.shuffle(order)
        batches += [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    for step, batch in enumerate(batches):
        share = step / len(batches)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((share + 1 / len(batches)) / 0.05, (1 - share) / 0.95)
        optimizer.zero_grad()
        loss_fn(model, [examples[i] for i in batch]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


# ----------------------------------------------------------------------------------------------------------------------
# dialogues

@torch.no_grad()
def sample(model, tokenizer, prompts):
    """One turn for each prompt: lists of token ids that end with the end-of-turn token (or were cut off)."""
    T, end = max(len(prompt) for prompt in prompts), end_of_turn(tokenizer)
    ids_BT = torch.tensor([[end] * (T - len(prompt)) + prompt for prompt in prompts])  # generate pads on the left
    mask_BT = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, do_sample=True, top_k=0, top_p=1.0,
                            max_new_tokens=max_tokens, eos_token_id=end, pad_token_id=end)
    turns = []
    for row in out_BT[:, T:].tolist():
        length = row.index(end) + 1 if end in row else len(row)
        turns.append(row[:length])
    return turns


def play(model, tokenizer, tasks, rng):
    """Play one dialogue on each task to its end: [{"task", "messages", "reward"}]."""
    envs = [DialogueEnv(world.MAX_TURNS) for _ in tasks]
    for env, task in zip(envs, tasks):
        env.reset(task)
    live = envs
    while live:
        turns = sample(model, tokenizer, [render(tokenizer, env.messages)[0] for env in live])
        for env, turn in zip(live, turns):
            env.step(tokenizer.decode(turn, skip_special_tokens=True), output_ids=turn)  # the agent asks or answers
        live = [env for env in live if env.answer is None]
        for env in live:
            env.observe(world.respond(env.task, env.messages, rng))                      # the human replies
    rewards = grade([env.answer for env in envs], tasks)                                 # run the tests
    return [{"task": env.task, "messages": env.messages, "reward": r} for env, r in zip(envs, rewards)]


def dialogue_pairs(tokenizer, dialogues, rng):
    """Success against failure on the same task, both as the critic reads them: with c in front."""
    by_task = {}
    for dialogue in dialogues:
        by_task.setdefault(dialogue["task"].ground_truth, []).append(dialogue)
    pairs = []
    for reference, group in by_task.items():
        won = [d["messages"] for d in group if d["reward"] == 1.0]
        lost = [d["messages"] for d in group if d["reward"] < 1.0]
        found = [(better, worse) for better in won for worse in lost]
        for better, worse in rng.sample(found, min(pairs_per_task, len(found))):
            pairs.append({"chosen": render(tokenizer, better, reference),
                          "rejected": render(tokenizer, worse, reference)})
    return pairs


# ----------------------------------------------------------------------------------------------------------------------
# candidate turns, ranked

def one_turn(prompt, turn):
    """The example in which only these tokens are the agent's."""
    return prompt + turn, [0] * len(prompt) + [1] * len(turn)


def candidates_of(base, tokenizer, states):
    """Sample turns at each state, [{"prompt", "with_c", "turns", "counts"}]: each different turn once."""
    groups = []
    for start in range(0, len(states), 32):
        part = states[start:start + 32]
        prompts = [render(tokenizer, messages)[0] for _, messages in part]               # what the actor sees
        sampled = sample(base, tokenizer, [prompt for prompt in prompts for _ in range(n_candidates)])
        for i, (reference, messages) in enumerate(part):
            mine = Counter(tuple(turn) for turn in sampled[i * n_candidates:(i + 1) * n_candidates])
            groups.append({"prompt": prompts[i], "with_c": render(tokenizer, messages, reference)[0],
                           "turns": [list(turn) for turn in mine], "counts": list(mine.values())})
    return groups


def per_token(model, groups, prompt):
    """Mean log-prob of a candidate's tokens, for all candidates of all states: what Eq. 3 subtracts."""
    examples = [one_turn(group[prompt], turn) for group in groups for turn in group["turns"]]
    return [row[0] / sum(turn_ids) for row, (_, turn_ids) in zip(reference_logprobs(model, examples), examples)]


def turn_pairs(groups, advantages, rng):
    """At each state: a turn of the better half (of what was sampled) against one of the worse half, without c."""
    pairs, first = [], 0
    for group in groups:
        turns, prompt = group["turns"], group["prompt"]
        mine = advantages[first:first + len(turns)]
        first += len(turns)
        ranked = sorted(range(len(turns)), key=lambda i: -mine[i])
        samples = [i for i in ranked for _ in range(group["counts"][i])]
        better, worse = samples[:n_candidates // 2], samples[n_candidates // 2:]
        found = list(dict.fromkeys((a, b) for a in better for b in worse if mine[a] > mine[b]))
        for a, b in rng.sample(found, min(pairs_per_state, len(found))):
            pairs.append({"chosen": one_turn(prompt, turns[a]), "rejected": one_turn(prompt, turns[b])})
    return pairs


# ----------------------------------------------------------------------------------------------------------------------

def main():
    started = time.time()
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # another number rounds otherwise
    rng = random.Random(seed)
    test_tasks = world.make_tasks(n_test, seed, "test")

    def say(text):
        print(f"[{time.time() - started:4.0f} s] {text}", flush=True)

    def solved(model):
        return sum(d["reward"] == 1.0 for d in play(model, tokenizer, test_tasks, random.Random(seed))) / n_test

    # 0. the initial policy: a tiny Llama that imitates a clumsy demonstrator (a real model would be loaded here)
    base, tokenizer = world.new_model(world.Base(), seed)
    documents = [render(tokenizer, messages, reference) for messages, reference in world.documents(n_documents, seed)]
    train(base, documents, imitation_loss, base_lr, base_batch, base_epochs, rng)
    say(f"initial policy: solves {solved(base):.1%} of {n_test} held-out tasks")

    # 1. offline dialogues, of which only the end is graded
    tasks = world.make_tasks(n_tasks, seed, "train")
    dialogues = play(base, tokenizer, [task for task in tasks for _ in range(dialogues_per_task)], rng)
    say(f"{len(dialogues)} offline dialogues, {sum(d['reward'] == 1.0 for d in dialogues)} of them solved")

    # 2. the critic reads c, and learns which dialogues end well
    pairs = dialogue_pairs(tokenizer, dialogues, rng)
    add_reference(base, pairs)
    critic = copy.deepcopy(base)
    train(critic, pairs, critic_loss, critic_lr, critic_batch, critic_epochs, rng)
    say(f"critic trained on {len(pairs)} pairs of dialogues")

    # 3. sixteen candidates at each state: every turn of every dialogue is a state, and some of them are enough here
    states = [(d["task"].ground_truth, d["messages"][:t]) for d in dialogues for t in range(1, len(d["messages"]), 2)]
    groups = candidates_of(base, tokenizer, rng.sample(states, min(n_states, len(states))))
    ref_with_c = per_token(base, groups, "with_c")
    trained = [ours - ref for ours, ref in zip(per_token(critic, groups, "with_c"), ref_with_c)]  # Eq. 3
    # The untrained critic: what the initial model itself makes of c. How much of the result needs Eq. 2 at all?
    untrained = [ref - without for ref, without in zip(ref_with_c, per_token(base, groups, "prompt"))]
    say(f"{len(trained)} different candidates at {len(groups)} states")

    # 4. the actor learns from pairs of turns, without c
    for name, advantages in (("SWEET", trained), ("the same with an untrained critic", untrained)):
        pairs = turn_pairs(groups, advantages, rng)
        add_reference(base, pairs)
        actor = copy.deepcopy(base)
        train(actor, pairs, actor_loss, actor_lr, actor_batch, actor_epochs, rng)
        say(f"{name}: solves {solved(actor):.1%} ({len(pairs)} pairs of turns)")


if __name__ == "__main__":
    main()
