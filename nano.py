"""SWEET-RL in one sitting: rollout -> critic -> turn pairs -> actor, in plain PyTorch.

    python nano.py        # trains everything from scratch on a CPU and prints how often the task is solved

An agent talks with a human who wants a Python function and has described only part of it. In each of its four turns it
asks a question or hands in the function. The reward is known at the end alone: do all tests pass? So which of the turns
were good? The answer of the paper (arXiv 2503.15478): train a *critic*, a language model that may read the hidden
solution c, to prefer the dialogues that succeeded over those that failed, and write its preference as a sum of one
number a turn, the advantage A (Eq. 2 and 3). Sample many turns at one point of a dialogue and let A say which are
better. Train the *actor*, which never sees c, to prefer the better ones by plain DPO on single turns (Eq. 4).

    A(o_t, a_t, c) = 1/L sum_l [ log pi_critic(a_t^l | o_t, a_t^<l, c) - log pi_ref(a_t^l | o_t, a_t^<l, c) ]    (Eq. 3)
    critic: -log sigmoid( beta [ sum_t A(o_t^+, a_t^+, c) - sum_t A(o_t^-, a_t^-, c) ] )                         (Eq. 2)
    actor:  -log sigmoid( beta [ log pi_actor(a^+|o)/pi_ref(a^+|o) - log pi_actor(a^-|o)/pi_ref(a^-|o) ] )       (Eq. 4)

o_t is the dialogue so far, a_t the agent's turn of L tokens, c the reference solution; + marks the better one of a
pair, - the worse; pi_ref is the model before training, beta how sharply a difference counts. A is divided by L, or the
longest turn, the answer, would speak for all in the sum (Eq. 4 is about one turn: there is no such sum). Both losses
also imitate +: they subtract nll * its mean log-prob, which keeps what the model could do (nll: 0.01 in the paper).
A test holds log-probs, losses and pairs equal to those of the other files, which add models, humans, baselines, speed.
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
n_test = 200
n_documents, base_lr, base_batch, base_epochs = 16000, 6e-3, 24, 2  # what the initial policy imitates
n_tasks, dialogues_per_task, max_tokens = 120, 8, 48                # offline dialogues; tokens of a turn at most
pairs_per_task, pairs_per_state = 16, 2                             # at most: pairs of dialogues, pairs of turns
n_states, n_candidates = 1600, 16                                   # where turns are sampled, and how many
critic_lr, critic_beta, critic_nll, critic_batch, critic_epochs = 1e-3, 1.0, 0.1, 8, 3
actor_lr, actor_beta, actor_nll, actor_batch, actor_epochs = 1e-3, 1.0, 1.0, 16, 4

def turn_logprobs(model, examples):
    """log pi(a_t | o_t) of every agent turn: sums_BK (nats) and lengths_BK (tokens), both 0 where a turn is absent."""
    B = len(examples)
    T = max(len(input_ids) for input_ids, _ in examples)
    ids_BT = torch.zeros(B, T, dtype=torch.long)  # padded on the right: no real token sees what comes after it
    turns_BT = torch.zeros(B, T, dtype=torch.long)
    for b, (input_ids, turn_ids) in enumerate(examples):
        ids_BT[b, :len(input_ids)] = torch.tensor(input_ids)
        turns_BT[b, :len(turn_ids)] = torch.tensor(turn_ids)
    logits_BTV = model(input_ids=ids_BT).logits[:, :-1]  # position t predicts token t + 1
    targets_BT = ids_BT[:, 1:]
    logprobs_BTV = logits_BTV.log_softmax(-1)
    logprobs_BT = logprobs_BTV.gather(-1, targets_BT[..., None]).squeeze(-1)
    turn_K = torch.arange(1, int(turns_BT.max()) + 1)
    in_turn_BTK = turns_BT[:, 1:, None] == turn_K  # is this token one of turn k?
    sums_BK = (logprobs_BT[..., None] * in_turn_BTK).sum(1)
    return sums_BK, in_turn_BTK.sum(1)

@torch.no_grad()
def reference_logprobs(model, examples, batch_size=128):
    """The sums of `turn_logprobs` without gradient: a list of K numbers for each example."""
    lengths = [len(input_ids) for input_ids, _ in examples]
    order = sorted(range(len(examples)), key=lengths.__getitem__)  # of like length: little padding
    sums = [None] * len(examples)
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        sums_BK, _ = turn_logprobs(model, [examples[i] for i in batch])
        for i, row in zip(batch, sums_BK.tolist()):
            sums[i] = row[:max(examples[i][1])]  # turns are numbered from 1
    return sums

def add_reference(model, pairs):
    """Note pi_ref's log-probs beside each pair. The model before its first step is pi_ref: no second one is needed."""
    for side in ("chosen", "rejected"):
        sums_of_all = reference_logprobs(model, [pair[side] for pair in pairs])
        for pair, sums in zip(pairs, sums_of_all):
            pair["ref_" + side] = sums

def both_sides(model, pairs):
    """Log-probs of a batch of pairs, under the model and under pi_ref. Rows: all chosen ones, then all rejected."""
    examples = [p["chosen"] for p in pairs] + [p["rejected"] for p in pairs]
    reference = [p["ref_chosen"] for p in pairs] + [p["ref_rejected"] for p in pairs]
    sums_BK, lengths_BK = turn_logprobs(model, examples)
    ref_BK = torch.zeros_like(sums_BK)
    for b, row in enumerate(reference):
        ref_BK[b, :len(row)] = torch.tensor(row, dtype=ref_BK.dtype)
    return sums_BK, ref_BK, lengths_BK

def turn_advantages(sums_BK, ref_sums_BK, lengths_BK):
    """Eq. 3: how much more likely the critic makes each turn than pi_ref does, per token. 0 where a turn is absent."""
    return (sums_BK - ref_sums_BK) / lengths_BK.clamp(min=1)

def preference_loss(score_B, beta):
    """-log sigmoid of how much better the chosen half of the rows is than the rejected half."""
    chosen, rejected = score_B.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()

def mean_logprob(sums_BK, lengths_BK):
    """Of a chosen token: the term of imitation."""
    chosen = slice(len(sums_BK) // 2)
    return sums_BK[chosen].sum() / lengths_BK[chosen].sum()

def critic_loss(model, pairs, beta=critic_beta, nll=critic_nll):
    """Eq. 2, on pairs of whole dialogues: the better one has the larger sum of advantages."""
    sums_BK, ref_BK, lengths_BK = both_sides(model, pairs)
    advantages_BK = turn_advantages(sums_BK, ref_BK, lengths_BK)
    return preference_loss(advantages_BK.sum(-1), beta) - nll * mean_logprob(sums_BK, lengths_BK)

def actor_loss(model, pairs, beta=actor_beta, nll=actor_nll):
    """Eq. 4, on pairs of single turns: log-probs are summed over the turn."""
    sums_BK, ref_BK, lengths_BK = both_sides(model, pairs)
    ratio_BK = sums_BK - ref_BK
    return preference_loss(ratio_BK.sum(-1), beta) - nll * mean_logprob(sums_BK, lengths_BK)

def imitation_loss(model, examples):
    """Minus the mean log-prob of the demonstrator's tokens."""
    sums_BK, lengths_BK = turn_logprobs(model, examples)
    return -sums_BK.sum() / lengths_BK.sum()

def train(model, examples, loss_fn, lr, batch_size, epochs, rng):
    """AdamW; the learning rate rises over the first twentieth of the steps and then falls to 0."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    order = list(range(len(examples)))
    batches = []
    for _ in range(epochs):
        rng.shuffle(order)
        for start in range(0, len(order), batch_size):
            batches.append(order[start:start + batch_size])
    warm = 0.05 * len(batches)
    for step, batch in enumerate(batches):
        rising = (step + 1) / warm
        falling = (len(batches) - step) / (len(batches) - warm)
        optimizer.param_groups[0]["lr"] = lr * min(rising, falling)
        optimizer.zero_grad()
        loss = loss_fn(model, [examples[i] for i in batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

@torch.no_grad()
def sample(model, tokenizer, prompts):
    """One turn for each prompt: lists of token ids that end with the end-of-turn token (or were cut off)."""
    end = end_of_turn(tokenizer)
    T = max(map(len, prompts))
    padding = [T - len(prompt) for prompt in prompts]  # on the left, as `generate` wants it
    ids = [[end] * n + prompt for n, prompt in zip(padding, prompts)]
    mask = [[0] * n + [1] * (T - n) for n in padding]
    out_BT = model.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=True, top_k=0, top_p=1.0,
        max_new_tokens=max_tokens,
        eos_token_id=end, pad_token_id=end)
    turns = []
    for row in out_BT[:, T:].tolist():
        length = row.index(end) + 1 if end in row else len(row)
        turns.append(row[:length])
    return turns

def play(model, tokenizer, tasks, rng):
    """Play one dialogue on each task to its end: (environments, rewards)."""
    envs = [DialogueEnv(world.MAX_TURNS) for _ in tasks]
    for env, task in zip(envs, tasks):
        env.reset(task)
    live = envs
    while live:
        prompts = [render(tokenizer, env.messages)[0] for env in live]
        for env, turn in zip(live, sample(model, tokenizer, prompts)):
            text = tokenizer.decode(turn, skip_special_tokens=True)
            env.step(text, output_ids=turn)                          # the agent asks or answers
        live = [env for env in live if env.answer is None]
        for env in live:
            reply = world.respond(env.task, env.messages, rng)
            env.observe(reply)                                       # the human replies
    return envs, grade([env.answer for env in envs], tasks)          # run the tests

def dialogue_pairs(tokenizer, dialogues, rewards, rng):
    """Success against failure on the same task, both as the critic reads them: with c in front."""
    by_task = {}
    for env, reward in zip(dialogues, rewards):
        task = env.task.problem_description, env.task.ground_truth
        won, lost = by_task.setdefault(task, ([], []))
        (won if reward == 1.0 else lost).append(env.messages)
    pairs = []
    for (_, reference), (won, lost) in by_task.items():
        possible = [(better, worse) for better in won for worse in lost]
        for better, worse in rng.sample(possible, min(pairs_per_task, len(possible))):
            chosen = render(tokenizer, better, reference)
            rejected = render(tokenizer, worse, reference)
            pairs.append({"chosen": chosen, "rejected": rejected})
    return pairs

def one_turn(prompt, turn):
    """The example in which only these tokens are the agent's."""
    return prompt + turn, [0] * len(prompt) + [1] * len(turn)

def sample_candidates(base, tokenizer, states):
    """Sample turns at each state, [{"prompt", "with_c", "turns", "counts"}]: each different turn once."""
    groups = []
    for reference, messages in states:
        prompt, _ = render(tokenizer, messages)                      # what the actor sees
        with_c, _ = render(tokenizer, messages, reference)           # what the critic sees
        groups.append({"prompt": prompt, "with_c": with_c})
    for start in range(0, len(groups), 32):
        part = groups[start:start + 32]
        prompts = [group["prompt"] for group in part for _ in range(n_candidates)]
        turns = iter(sample(base, tokenizer, prompts))
        for group in part:
            counts = Counter(tuple(next(turns)) for _ in range(n_candidates))
            group["turns"] = list(map(list, counts))
            group["counts"] = list(counts.values())
    return groups

def mean_logprobs(model, groups, prompt):
    """Mean log-prob of a candidate's tokens after "with_c" or "prompt", for all of all states: one side of Eq. 3."""
    examples = [one_turn(group[prompt], turn) for group in groups for turn in group["turns"]]
    sums = reference_logprobs(model, examples)
    return [row[0] / sum(turn_ids) for row, (_, turn_ids) in zip(sums, examples)]  # one turn: its ids are 1

def turn_pairs(advantages, counts, rng):
    """Pairs (a, b) of the candidates of a state: a from the better half of the samples, b from the worse."""
    samples = []
    for i, count in enumerate(counts):
        samples += [i] * count  # a turn that was sampled 8 times has 8 of the 16 places
    samples.sort(key=advantages.__getitem__, reverse=True)
    half = len(samples) // 2
    better, worse = samples[:half], samples[-half:]
    pairs = [(a, b) for a in better for b in worse if advantages[a] > advantages[b]]
    rng.shuffle(pairs)
    return list(dict.fromkeys(pairs))[:pairs_per_state]  # each pair once

def all_turn_pairs(groups, advantages, rng):
    """The pairs of all states, without c. advantages: of all candidates of all states, one after the other."""
    pairs, advantages = [], iter(advantages)
    for group in groups:
        turns, prompt = group["turns"], group["prompt"]
        mine = [next(advantages) for _ in turns]
        for a, b in turn_pairs(mine, group["counts"], rng):
            pairs.append({"chosen": one_turn(prompt, turns[a]),
                          "rejected": one_turn(prompt, turns[b])})
    return pairs

def main():
    started = time.time()
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # more threads change rounding, and with it the printed numbers
    rng = random.Random(seed)

    def say(text):
        print(f"[{time.time() - started:4.0f} s] {text}", flush=True)
    def solved(model):
        tasks = world.make_tasks(n_test, seed, "test")
        _, rewards = play(model, tokenizer, tasks, random.Random(seed))
        return f"solves {rewards.count(1.0) / n_test:.1%} of {n_test} held-out tasks"

    # 0. the initial policy: a tiny Llama that imitates a clumsy demonstrator (a real model would be loaded here)
    base, tokenizer = world.new_model(world.Base(), seed)
    documents = world.documents(n_documents, seed)  # (messages, c or None): half show c, so that it learns to read one
    documents = [render(tokenizer, messages, c) for messages, c in documents]
    train(base, documents, imitation_loss, base_lr, base_batch, base_epochs, rng)
    say(f"initial policy: {solved(base)}")

    # 1. offline dialogues, of which only the end is graded
    tasks = world.make_tasks(n_tasks, seed, "train") * dialogues_per_task  # each task several times
    dialogues, rewards = play(base, tokenizer, tasks, rng)
    say(f"{len(dialogues)} offline dialogues, {rewards.count(1.0)} of them solved")

    # 2. the critic reads c, and learns which dialogues end well
    pairs = dialogue_pairs(tokenizer, dialogues, rewards, rng)
    add_reference(base, pairs)
    critic = copy.deepcopy(base)
    train(critic, pairs, critic_loss, critic_lr, critic_batch, critic_epochs, rng)
    say(f"critic trained on {len(pairs)} pairs of dialogues")

    # 3. sixteen candidates at each state: every turn of every dialogue is a state, and some of them are enough here
    states = []
    for env in dialogues:
        for turn in range(1, len(env.messages), 2):  # odd messages are the agent's turns
            states.append((env.task.ground_truth, env.messages[:turn]))
    groups = sample_candidates(base, tokenizer, rng.sample(states, n_states))
    ref_with_c = mean_logprobs(base, groups, "with_c")
    trained = [ours - ref for ours, ref in zip(mean_logprobs(critic, groups, "with_c"), ref_with_c)]  # Eq. 3
    # The untrained critic, 1/L [log pi_ref(a|o,c) - log pi_ref(a|o)]: how much of the result needs Eq. 2 at all?
    untrained = [ref - without for ref, without in zip(ref_with_c, mean_logprobs(base, groups, "prompt"))]
    say(f"{len(trained)} different candidates at {len(groups)} states")

    # 4. the actor learns from pairs of turns, without c
    for name, advantages in (("SWEET", trained), ("the same with an untrained critic", untrained)):
        pairs = all_turn_pairs(groups, advantages, rng)
        add_reference(base, pairs)
        actor = copy.deepcopy(base)
        train(actor, pairs, actor_loss, actor_lr, actor_batch, actor_epochs, rng)
        say(f"{name}: {solved(actor)} ({len(pairs)} pairs of turns)")

if __name__ == "__main__":
    main()
