"""The critic: how good was each turn, judged by someone who knows the solution.

SWEET trains no value head. The critic *is* a language model pi_theta that reads the reference solution c in front of
the dialogue, and the advantage of a turn is how much more likely pi_theta makes it than the frozen initial model
pi_ref does, per token:

    A(o_t, a_t, c) = 1/L sum_l [ log pi_theta(a_t^l | o_t, a_t^<l, c) - log pi_ref(a_t^l | o_t, a_t^<l, c) ]    (Eq. 3)

Nobody labels turns. What is known is which of two whole dialogues on the same task ended better, and by Bradley-Terry
the better one should have the larger sum of advantages; the sum's gradient finds out which turns deserve it:

    loss = -log sigmoid( beta [ sum_t A(o_t^+, a_t^+, c) - sum_t A(o_t^-, a_t^-, c) ] )                        (Eq. 2)

Place in the data flow: trajectories.jsonl -> `trajectory_pairs` -> `train` -> critic/; samples.jsonl -> `rank` ->
candidates.jsonl. Exercised by `python sweet.py critic` and `python -m pytest tests/test_losses.py`. Differences from
the paper: none in the formulas. Flags give the paper's ablations (no c, sum instead of mean) and the official code's
single mean over the trajectory.

Shapes: B trajectories, K turns.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from env import ANSWER_MARKER, Task, render
from machinery.train import arg, check_finite, fit
from kernels.logprob import add_reference, agent_tokens, lay_out, pad_turns, reference_sums, turn_logprobs


@dataclass(frozen=True)
class Pairs:
    """Which trajectories and which turns are paired."""
    per_task: int = arg(16, "trajectory pairs a task at most, for the critic")
    margin: float = arg(0.0, "reward difference that makes a trajectory pair; 0: success against failure", 0.0,
                        least=0)
    per_state: int = arg(2, "turn pairs a state at most", 4)


@dataclass(frozen=True)
class Critic:
    """The critic's training (Eq. 2) and how its advantage is computed (Eq. 3)."""
    lr: float = arg(1e-3, "learning rate", 2e-7)
    beta: float = arg(1.0, "Eq. 2's beta", 0.1)
    nll: float = arg(0.1, "weight of the chosen turns' negative log-likelihood", 0.01, least=0)
    batch_size: int = arg(8, "trajectory pairs a step", 8)
    epochs: int = arg(3, "passes over the pairs", 4)
    normalize: str = arg("turn", "length normalisation of A: turn, none or trajectory", "turn",
                         among=("turn", "none", "trajectory"))
    rank_against: str = arg("c", "pi_ref reads the reference when ranking (c), or not (own, as the official code)", "c",
                            among=("c", "own"))
    reference: bool = arg(True, "the critic reads the reference; --no-reference: it does not", True, flag="reference")


# ------------------------------------------------------------------ Eq. 2 and 3

def turn_advantages(sums_BK, ref_sums_BK, lengths_BK, normalize="turn"):
    """Eq. 3. Log-probs summed over each turn by the critic and by pi_ref, and tokens per turn -> advantages_BK (nats
    per token).

    0 where a turn is absent (length 0). normalize: "turn", the paper's mean; "none", a plain sum (the paper's
    ablation); "trajectory", one mean over all agent tokens of the row (what the official code computes).
    """
    ratio_BK = sums_BK - ref_sums_BK
    tokens = {"turn": lengths_BK, "none": torch.ones_like(lengths_BK),
              "trajectory": lengths_BK.sum(-1, keepdim=True).expand_as(lengths_BK)}[normalize]
    return torch.where(lengths_BK > 0, ratio_BK / tokens.clamp(min=1), 0.0)


def bradley_terry_loss(chosen_BK, rejected_BK, beta):
    """Eq. 2. Advantages of the better and the worse trajectory of B pairs -> mean loss (log 2 when all advantages are
    0)."""
    return -F.logsigmoid(beta * (chosen_BK.sum(-1) - rejected_BK.sum(-1))).mean()


# ------------------------------------------------------------------ training

def trajectory_pairs(trajectories, per_task, margin, rng):
    """Pairs (better, worse) of trajectories on the same task, at most `per_task` each, in random order.

    margin 0: the better one is a success (reward 1), the worse one is not. Otherwise rewards differ by at least that
    much.
    """
    by_task, pairs = {}, []
    for trajectory in trajectories:
        task = trajectory["task"]  # two tasks may share their request and differ in what is hidden
        by_task.setdefault((task["problem_description"], task["ground_truth"]), []).append(trajectory)
    for group in by_task.values():
        found = [(a, b) for a in group for b in group if (
            a["reward"] - b["reward"] >= margin - 1e-9 if margin else a["reward"] == 1.0 > b["reward"])]
        pairs += rng.sample(found, min(per_task, len(found)))
    rng.shuffle(pairs)
    return pairs


def critic_view(tokenizer, trajectory, use_reference=True):
    """(input_ids, turn_ids) of a trajectory as the critic reads it: c in front, unless `use_reference` is off."""
    reference = trajectory["task"]["ground_truth"] if use_reference else None
    return render(tokenizer, trajectory["dialogue_history"], reference)


def loss_fn(model, pairs, beta, nll, normalize, batch=None):
    """The training loss on a list of pairs, and what to watch: accuracy, margin, and the margin's share in the last
    turn. batch: all pairs of the step, where these are a part (nll is a mean over the step's chosen agent tokens)."""
    B, tokens = len(pairs), agent_tokens([pair["chosen"] for pair in batch or pairs])
    sides = [(side, pair) for side in ("chosen", "rejected") for pair in pairs]
    sums_BK, lengths_BK = turn_logprobs(model, lay_out(model, [pair[side] for side, pair in sides]))
    ref_BK = pad_turns([pair[f"ref_{side}"] for side, pair in sides], sums_BK)
    advantages_BK = turn_advantages(sums_BK, ref_BK, lengths_BK, normalize)
    chosen_BK, rejected_BK = advantages_BK[:B], advantages_BK[B:]
    loss = bradley_terry_loss(chosen_BK, rejected_BK, beta)
    loss = loss - nll * sums_BK[:B].sum() / (B * tokens)
    with torch.no_grad():
        margin_B = chosen_BK.sum(-1) - rejected_BK.sum(-1)
        turn_K = torch.arange(1, lengths_BK.shape[1] + 1, device=lengths_BK.device)
        last_B1 = ((lengths_BK > 0) * turn_K).argmax(-1, keepdim=True)
        answers = advantages_BK.gather(-1, last_B1).squeeze(-1)
        metrics = {"accuracy": (margin_B > 0).float().mean().item(), "margin": margin_B.mean().item(),
                   "margin_answers": (answers[:B] - answers[B:]).mean().item()}
    return loss, metrics


def train(model, tokenizer, pairs, out, cfg, seed, save):
    """Fit the critic, starting from `model`, which is also pi_ref: its log-probs are taken before the first step."""
    examples = [{"chosen": critic_view(tokenizer, better, cfg.reference),
                 "rejected": critic_view(tokenizer, worse, cfg.reference)} for better, worse in pairs]
    add_reference(model, examples)
    return fit(model, examples, lambda m, part, batch: loss_fn(m, part, cfg.beta, cfg.nll, cfg.normalize, batch), out,
               cfg, seed, save, label="critic", sizes=[len(e["chosen"][0]) + len(e["rejected"][0]) for e in examples])


# ------------------------------------------------------------------ ranking

def candidate_views(tokenizer, state, use_reference=True):
    """Every candidate turn of a state as (input_ids, turn_ids), where only the candidate's tokens have a turn number
    (1)."""
    reference = state["task"]["ground_truth"] if use_reference else None
    prefix, _ = render(tokenizer, state["messages"], reference)
    return [(prefix + c["output_ids"], [0] * len(prefix) + [1] * len(c["output_ids"])) for c in state["candidates"]]


def score_reference(model, tokenizer, states):
    """Add pi_ref's log-prob to every candidate: `ref_sum` given c, and `ref_sum_without_c`. model: the initial
    policy."""
    for key, use_reference in (("ref_sum", True), ("ref_sum_without_c", False)):
        views = [view for state in states for view in candidate_views(tokenizer, state, use_reference)]
        sums = reference_sums(model, views)
        check_finite([row[0] for row in sums], model.name_or_path)
        sums = iter(sums)
        for candidate in (c for state in states for c in state["candidates"]):
            candidate[key] = next(sums)[0]


def rank(model, tokenizer, states, cfg):
    """Add `advantage` (Eq. 3) to every candidate turn of every state.

    states: {"task", "messages", "candidates": [{"output_ids", "ref_sum", "ref_sum_without_c"}]}. From text to number
    this is the path that training took. A single turn has no trajectory to take a mean over: normalize "trajectory"
    ranks by the turn's mean.
    """
    ref_key = "ref_sum" if cfg.reference and cfg.rank_against == "c" else "ref_sum_without_c"
    candidates = [c for state in states for c in state["candidates"]]
    views = [view for state in states for view in candidate_views(tokenizer, state, cfg.reference)]
    sums_N1 = torch.tensor(reference_sums(model, views))
    ref_N1 = torch.tensor([[c[ref_key]] for c in candidates])
    lengths_N1 = torch.tensor([[float(len(c["output_ids"]))] for c in candidates])
    advantages_N1 = turn_advantages(sums_N1, ref_N1, lengths_N1, "none" if cfg.normalize == "none" else "turn")
    advantages = advantages_N1.squeeze(-1).tolist()
    check_finite(advantages, model.name_or_path)
    for candidate, advantage in zip(candidates, advantages):
        candidate["advantage"] = round(advantage, 6)


@torch.no_grad()
def judge_turns(trained, initial, trajectory, cfg):
    """The advantage of each turn of one trajectory. trained: (critic, tokenizer); initial: the model that is pi_ref."""
    model, tokenizer = trained
    batch = lay_out(model, [critic_view(tokenizer, trajectory, cfg.reference)])
    sums_BK, lengths_BK = turn_logprobs(model, batch)
    return turn_advantages(sums_BK, turn_logprobs(initial, batch)[0], lengths_BK, cfg.normalize)[0].tolist()


# ------------------------------------------------------------------ is it right?

def label(states, judge, grade):
    """Add to every candidate what the world knows: `kind` and `good`, by judge(task, messages, text); an answer is good
    when it earns the full reward."""
    answers = []
    for state in states:
        task = Task.from_record(state["task"])
        for c in state["candidates"]:
            c["kind"], c["good"] = judge(task, state["messages"], c["content"])
            if c["kind"] == "answer":
                answers.append((c, c["content"].split(ANSWER_MARKER, 1)[1], task))
    rewards = grade([text for _, text, _ in answers], [task for _, _, task in answers])
    for (c, _, _), reward in zip(answers, rewards):
        c["good"] = reward == 1.0


def area_under_curve(good, bad):
    """The chance that a random good one has a larger score than a random bad one (ties count half)."""
    return sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / (len(good) * len(bad))


def agreement_with_labels(states):
    """AUC within a state, averaged over the states that hold good and bad candidates of a kind.

    states: {"candidates": [{"advantage", "kind", "good"}]}. Returns {kind: {"auc", "states"}} for questions and
    answers.
    """
    result = {}
    for kind in ("question", "answer"):
        areas = []
        for state in states:
            mine = [c for c in state["candidates"] if c["kind"] == kind]
            sides = [[c["advantage"] for c in mine if c["good"] is good] for good in (True, False)]
            if all(sides):
                areas.append(area_under_curve(*sides))
        result[kind] = {"auc": sum(areas) / len(areas) if areas else None, "states": len(areas)}
    return result


def agreement_with_monte_carlo(states):
    """Does a larger advantage mean a larger value? Pairs of candidates of one state whose values, means over the
    rewards of dialogues played on from them, differ by more than two standard errors: the share that the critic
    orders alike.

    states: {"candidates": [{"advantage", "returns": rewards}]}. Returns {"accuracy", "pairs"}.
    """
    right, pairs = 0.0, 0
    for state in states:
        measured = []
        for c in state["candidates"]:
            returns = torch.tensor(c["returns"], dtype=torch.float64)
            # the +1 success and +1 failure keep the error of "always 0" or "always 1" from being 0
            mean = (returns.sum() + 1) / (len(returns) + 2)
            measured.append((c["advantage"], returns.mean().item(), (mean * (1 - mean) / len(returns)).item()))
        for i, (a, value_a, error_a) in enumerate(measured):
            for b, value_b, error_b in measured[:i]:
                if abs(value_a - value_b) > 2 * (error_a + error_b) ** 0.5:
                    pairs += 1
                    right += 0.5 if a == b else (a > b) == (value_a > value_b)
    return {"accuracy": right / pairs if pairs else None, "pairs": pairs}
