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
Differences from the paper: none in the formula; sizes and step sizes are the small world's (below).

Shapes: B rows, T tokens, V vocabulary.
"""
from collections import Counter
from dataclasses import dataclass

import torch.nn.functional as F

from env import INSTRUCTIONS, DialogueEnv, answers_in_code
from env import action_tokens, end_of_turn, grade, known_ids, render
from machinery.bars import progress
from machinery.files import InputError
from machinery.schema import fold, outside_state, read_records, unfold
from machinery.optional import load
from machinery.sampling import Memory, sample
from machinery.several import ask
from machinery.train import arg, check_context, context_of, fit
from kernels.logprob import add_reference, agent_tokens, lay_out, pair_logprobs, pair_sizes, turn_logprobs


@dataclass(frozen=True)
class Rollout:
    """Dialogues by the initial policy."""
    tasks: int = 120
    """Training tasks (with --tasks: all of the file, unless given)."""
    per_task: int = 8
    """Offline dialogues a task."""
    dialogues: int = arg(0, least=0)
    """Offline dialogues in all, at most, task by task; 0: per-task of each."""
    max_turns: int = 4
    """Turns of a dialogue, the answer included."""
    max_tokens: int = 48
    """Tokens of a turn at most."""
    temperature: float = 1.0
    """Sampling temperature of the offline dialogues."""
    call_seconds: float = 1.0
    """Seconds that a test call of an answer may run."""
    seed: int = arg(0, least=0)
    """Seed of the training tasks and of their dialogues; 0: --seed."""
    answer_on_code: bool = arg(False, flag="answer-on-code")
    """A turn that defines the function which the tests call is the answer, without the marker, too (not the paper's
    protocol)."""
    last_turn_notice: bool = arg(False, flag="last-turn-notice")
    """The human's last reply says that the result must be sent now (not the paper's protocol)."""


@dataclass(frozen=True)
class Candidates:
    """Turns for the critic to choose from."""
    states: int = arg(4000, least=0)
    """States (turns of offline dialogues) to sample at, at most; 0: any number."""
    share: float = arg(1.0, most=1)
    """The share of the states to sample at."""
    n: int = 16
    """Candidates a state."""


@dataclass(frozen=True)
class ActorSettings:
    """DPO on turn pairs (Eq. 4)."""
    lr: float = 1e-3
    """Learning rate."""
    loss: str = "actor:dpo_loss"
    """Eq. 4, or module:function of your own with the same arguments."""
    beta: float = 1.0
    """Eq. 4's beta."""
    nll: float = arg(1.0, least=0)
    """Weight of the chosen turn's negative log-likelihood."""
    batch_size: int = 16
    """Turn pairs a step."""
    epochs: int = 4
    """Passes over the pairs."""


@dataclass(frozen=True)
class Rft:
    """Rejection-sampling fine-tuning, a baseline."""
    lr: float = 1e-3
    """Learning rate."""
    batch_size: int = 32
    """Trajectories a step."""
    epochs: int = 20
    """Passes over the successful trajectories."""


@dataclass(frozen=True)
class Multiturn:
    """DPO on whole trajectories, a baseline."""
    per_task: int = 6
    """Trajectory pairs a task at most."""
    lr: float = 1e-3
    """Learning rate."""
    loss: str = "actor:dpo_loss"
    """DPO, or module:function of your own with the same arguments."""
    beta: float = 1.0
    """DPO's beta on whole trajectories."""
    nll: float = arg(1.0, least=0)
    """Weight of the chosen trajectory's negative log-likelihood."""
    batch_size: int = 8
    """Trajectory pairs a step."""
    epochs: int = 8
    """Passes over the pairs."""


# ------------------------------------------------------------------ Eq. 4

def dpo_loss(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta):
    """Eq. 4. Log-probs (nats, summed over tokens) of chosen and rejected under the policy and pi_ref -> mean loss."""
    return -F.logsigmoid(beta * ((chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B))).mean()


# ------------------------------------------------------------------ sampling

def turn_text(tokenizer, output_ids):
    """The text of a sampled turn, without its end-of-turn token."""
    if output_ids and output_ids[-1] == end_of_turn(tokenizer):
        output_ids = output_ids[:-1]
    return tokenizer.decode(output_ids, clean_up_tokenization_spaces=False)


def begin(task, cfg, instructions=INSTRUCTIONS):
    """A dialogue at its request. cfg: a Rollout."""
    env = DialogueEnv(cfg.max_turns, instructions, cfg.answer_on_code, cfg.last_turn_notice)
    env.reset(task)
    return env


def play_out(model, tokenizer, envs, human, keys, *, max_tokens, **decoding):
    """Play dialogues to their end, all in lock-step. envs: DialogueEnv in any state; keys: a seed for each; decoding:
    temperature, top_p, count, server of `sample`. Where the human leaves (replies None), the dialogue stays without an
    answer; where a further turn of max_tokens does not fit into the model's context, the last one is graded.

    Every agent turn keeps its `output_ids`, so that log-probs are of the tokens that were sampled, and, as in
    ColBench's format, `input` and `output` (the text that the model read and wrote).
    """
    active = [i for i, env in enumerate(envs) if env.answer is None]
    memory, read = Memory(), {}  # what the model has read is remembered: a turn reads only what is new
    limit = context_of(model) - max_tokens
    for _ in progress(range(max((env.max_turns for env in envs), default=0)), "turns"):
        if not active:
            break
        ask_human(human, [envs[i] for i in active])
        active = [i for i in active if envs[i].messages[-1]["role"] == "user"]
        prompts = {}
        for i in active:
            if prompt := next_prompt(tokenizer, envs[i], limit):
                prompts[i] = prompt
        active = list(prompts)
        if not active:
            break
        for i, prompt in prompts.items():
            before = read.get(i, ())
            if prompt[:len(before)] != before:
                raise InputError("the human changed what was said before; reply() must leave the dialogues as they are")
        turns = sample(
            model, tokenizer, list(prompts.values()),
            [(keys[i], envs[i].turns) for i in active],
            memory=memory, places=active, max_tokens=max_tokens, **decoding)
        texts = [turn_text(tokenizer, output_ids) for output_ids in turns]
        in_code = answers_in_code([envs[i] for i in active], texts)
        for i, text, output_ids, answers in zip(active, texts, turns, in_code):
            read[i] = (*prompts[i], *output_ids)
            envs[i].step(
                text,
                answers,
                input=tokenizer.decode(prompts[i]),
                output=tokenizer.decode(output_ids),
                output_ids=output_ids)
        active = [i for i in active if envs[i].answer is None]


def next_prompt(tokenizer, env, limit):
    """What the model is to read (a tuple of ids), or None: the dialogue has grown beyond `limit` tokens, and ends."""
    prompt, _ = render(tokenizer, env.messages)
    if len(prompt) > limit and env.turns:
        return env.stop()
    return tuple(prompt)


def ask_human(human, envs):
    """Let the human reply wherever the agent has asked (machinery/several.py)."""
    asked = [env for env in envs if env.messages[-1]["role"] == "assistant"]
    if not asked:
        return
    replies = ask(human, [env.task for env in asked], [env.messages for env in asked])
    for env, reply in zip(asked, replies):
        if reply is not None:
            env.observe(reply)


def play_tasks(model, tokenizer, tasks, human, keys, cfg, grade=grade, instructions=INSTRUCTIONS, **decoding):
    """Play a dialogue on each task to its end and grade it: a list of trajectories in ColBench's format, None for one
    that the human left."""
    envs = [begin(task, cfg, instructions) for task in tasks]
    play_out(model, tokenizer, envs, human, keys, max_tokens=cfg.max_tokens, **decoding)
    rewards = graded([env for env in envs if env.answer is not None], grade)
    trajectories = []
    for env in envs:
        trajectory = None
        if env.answer is not None:
            trajectory = {
                "task": env.task.to_record(),
                "dialogue_history": env.messages,
                "answer": env.answer,
                "reward": next(rewards),
            }
        trajectories.append(trajectory)
    return trajectories


def graded(envs, grade):
    """Yields the reward of each dialogue that has ended."""
    answers = [env.answer for env in envs]
    tasks = [env.task for env in envs]
    yield from grade(answers, tasks)


def check_tasks(model, tokenizer, tasks, cfg, instructions=INSTRUCTIONS, with_c=True):
    """InputError, before any work, where a task's first prompt, perhaps with c, is too long for the model."""
    for i, task in enumerate(tasks, 1):
        messages = begin(task, cfg, instructions).messages
        ids, _ = render(tokenizer, messages, task.ground_truth if with_c else None)
        what = f"{task.where}: task {i}{', its reference' if with_c else ''} and one turn"
        check_context(model, len(ids) + cfg.max_tokens, what)


def check_states(model, tokenizer, states, names, max_tokens):
    """InputError, before any work, where a state {"task", "messages"} with c and its longest candidate is too long;
    where its candidates are not sampled yet, they may have max_tokens."""
    for state, name in zip(states, names):
        longest = max((len(c["output_ids"]) for c in state.get("candidates", ())), default=max_tokens)
        input_ids, _ = render(tokenizer, state["messages"], state["task"]["ground_truth"])
        check_context(model, len(input_ids) + longest, name)


def for_files(trajectories):
    """Trajectories as files hold them: a system message is a message. None stays None."""
    found = []
    for trajectory in trajectories:
        found.append(trajectory and {**trajectory, "dialogue_history": unfold(trajectory["dialogue_history"])})
    return found


def bare(messages):
    """Messages as a model needs them: without the texts that trajectories keep for the reader."""
    kept = []
    for message in messages:
        message = dict(message)
        message.pop("input", None)
        message.pop("output", None)
        kept.append(message)
    return kept


def sample_candidates(model, tokenizer, states, keys, n, max_tokens, **decoding):
    """Add to each state {"task", "messages"} its "candidates", [{"content", "output_ids", "count"}]: the different
    ones among n sampled turns. decoding: as `play_out` has it."""
    prompts, row_keys = [], []
    for state, key in zip(states, keys):
        prompt, _ = render(tokenizer, state["messages"])
        prompts += [prompt] * n
        row_keys += [(*key, k) for k in range(n)]
    turns = sample(model, tokenizer, prompts, row_keys, max_tokens=max_tokens, **decoding)
    for i, state in enumerate(states):
        state["candidates"] = distinct(tokenizer, turns[i * n:(i + 1) * n])


def distinct(tokenizer, turns):
    """Sampled turns (lists of token ids) as candidates: each different one once, with how often it was sampled."""
    counts = Counter(tuple(turn) for turn in turns if turn)
    candidates = []
    for turn, count in counts.items():
        ids = list(turn)
        candidates.append({"content": turn_text(tokenizer, ids), "output_ids": ids, "count": count})
    return candidates


def read_candidates(tokenizer, path):
    """The same from a file of turns that were sampled elsewhere: texts, or {"content"} with or without "output_ids" and
    "count". InputError on anything else."""
    states = []
    for _, state in read_records(path, outside_state(known_ids(tokenizer)), "state"):
        turns = []
        for turn in state["candidates"]:
            turn = {"content": turn} if isinstance(turn, str) else turn
            turns += [action_tokens(tokenizer, turn)] * (turn.get("count") or 1)
        states.append({**state, "messages": fold(state["messages"]), "candidates": distinct(tokenizer, turns)})
    return states


# ------------------------------------------------------------------ learning

def turn_pairs(advantages, counts, n, rng):
    """Indices (chosen, rejected) of up to n different pairs: chosen from the better half by advantage, the other from
    the worse.

    counts: how often each candidate was sampled; the halves are of the samples, so that a turn which the policy takes
    half of the time is not one rare turn among many. Only pairs with a strictly larger advantage count; a state that
    has none gives none.
    """
    samples = []
    for i, count in enumerate(counts):
        samples += [i] * count
    samples.sort(key=lambda i: -advantages[i])  # best first
    half = len(samples) // 2
    better, worse = samples[:half], samples[len(samples) - half:]

    pairs = []
    for a in better:
        pairs += [(a, b) for b in worse if advantages[a] > advantages[b]]
    rng.shuffle(pairs)
    different = list(dict.fromkeys(pairs))  # a pair of often-sampled turns is in the list many times
    return different[:n]


def turn_view(tokenizer, prompt, turn):
    """(input_ids, turn_ids) of one turn after its observation: only the turn's tokens have a turn number (1)."""
    prefix, _ = render(tokenizer, prompt)
    ids = action_tokens(tokenizer, turn)
    return prefix + ids, [0] * len(prefix) + [1] * len(ids)


def preference_loss(model, pairs, beta, nll, batch=None, pair_loss=dpo_loss):
    """DPO on a list of {"chosen", "rejected", "ref_chosen", "ref_rejected"}: the loss, and what to watch. batch: all
    pairs of the step, where these are a part of it: the likelihood term is a mean over the chosen agent tokens of the
    whole step."""
    B = len(pairs)
    sums_BK, ref_BK, _ = pair_logprobs(model, pairs)  # rows: B chosen ones, then B rejected ones
    sums_B = sums_BK.sum(-1)
    ref_B = ref_BK.double().sum(-1).to(sums_B.dtype)
    chosen_B, rejected_B = sums_B.split(B)
    loss = pair_loss(chosen_B, rejected_B, *ref_B.split(B), beta)
    mean_tokens = agent_tokens([pair["chosen"] for pair in batch or pairs])
    loss = loss - nll * chosen_B.sum() / (B * mean_tokens)
    rewards_B = beta * (sums_B - ref_B).detach()  # what DPO calls the implicit reward
    better_B, worse_B = rewards_B.split(B)
    accuracy = (better_B > worse_B).float().mean().item()
    return loss, {"accuracy": accuracy, "margin": (better_B - worse_B).mean().item()}


def train_preferences(model, examples, out, cfg, seed, save, label, **how):
    """Fit the policy on pairs of views. `model` is the initial policy: its log-probs, pi_ref, are taken before the
    first step."""
    add_reference(model, examples)

    pair_loss = load(cfg.loss, f"--{label}-loss")

    def loss(model, part, batch):
        return preference_loss(model, part, cfg.beta, cfg.nll, batch, pair_loss)
    sizes = pair_sizes(examples)
    return fit(model, examples, loss, out, cfg, seed, save, label=label, sizes=sizes, **how)


def imitation_loss(model, views, batch=None):
    """RFT: minus the mean log-prob of the agent's tokens. batch: all views of the step, where these are a part."""
    sums_BK, _ = turn_logprobs(model, lay_out(model, views))
    tokens = len(views) * agent_tokens(batch or views)
    return -sums_BK.sum() / tokens, {}


def train_imitation(model, views, out, cfg, seed, save, label, **how):
    """Fit the policy on views of successful trajectories (RFT), or of a demonstrator's dialogues (the small world's
    base)."""
    sizes = [len(input_ids) for input_ids, _ in views]
    return fit(model, views, imitation_loss, out, cfg, seed, save, label=label, sizes=sizes, **how)
