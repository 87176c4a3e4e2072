"""The critic: how good was each turn, judged by someone who knows the solution.

SWEET trains no value head. The critic *is* a language model pi_theta that reads the reference solution c in front of
the dialogue, and the advantage of a turn is how much more likely pi_theta makes it than the frozen initial model
pi_ref does, per token:

    A(o_t, a_t, c) = 1/L sum_l [ log pi_theta(a_t^l | o_t, a_t^<l, c) - log pi_ref(a_t^l | o_t, a_t^<l, c) ]    (Eq. 3)

Nobody labels turns. What is known is which of two whole dialogues on the same task ended better, and by Bradley-Terry
the better one should have the larger sum of advantages; over many pairs the gradient of that sum can find out which
turns deserve it:

    loss = -log sigmoid( beta [ sum_t A(o_t^+, a_t^+, c) - sum_t A(o_t^-, a_t^-, c) ] )                        (Eq. 2)

Place in the data flow: trajectories.jsonl -> `trajectory_pairs` -> `train` -> critic/; samples.jsonl -> `rank` ->
candidates.jsonl. Exercised by `python sweet.py critic` and `python -m pytest tests/test_losses.py`. Differences from
the paper: none in the formulas; as there, training adds a term of imitation (nll). `BradleyTerry` is the paper's
critic; its ablations (no c, sum instead of mean), the official code's ways and critics of other kinds are in
studies/critics.py, one `--critic NAME` each.

Shapes: B trajectories, K turns.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from env import render
from machinery.optional import load
from machinery.schema import task_key
from machinery.train import arg, check_finite, fit
from kernels.logprob import add_reference, agent_tokens, lay_out, pair_logprobs, pair_sizes, reference_sums
from kernels.logprob import turn_logprobs


@dataclass(frozen=True)
class Pairs:
    """Which trajectories and which turns are paired."""
    per_task: int = 16
    """Trajectory pairs a task at most, for the critic."""
    margin: float = arg(0.0, least=0)
    """Reward difference that makes a trajectory pair; 0: success against failure."""
    per_state: int = 2
    """Turn pairs a state at most."""


@dataclass(frozen=True)
class CriticSettings:
    """Which critic, and its training (Eq. 2)."""
    kind: str = arg("bradley-terry", flag="critic")
    """Which critic: a name in studies/critics.py, or module:Class."""
    lr: float = 1e-3
    """Learning rate."""
    loss: str = "critic:bradley_terry_loss"
    """Eq. 2, or module:function of your own with the same arguments."""
    beta: float = 1.0
    """Eq. 2's beta."""
    nll: float = arg(0.1, least=0)
    """Weight of the chosen turns' negative log-likelihood."""
    batch_size: int = 8
    """Trajectory pairs a step."""
    epochs: int = 3
    """Passes over the pairs."""


# ------------------------------------------------------------------ Eq. 2 and 3

def turn_advantages(sums_BK, ref_sums_BK, lengths_BK, normalize="turn"):
    """Eq. 3. Log-probs summed over each turn by the critic and by pi_ref, and tokens per turn -> advantages_BK (nats
    per token).

    0 where a turn is absent (length 0). normalize: "turn", the paper's mean; "none", a plain sum (the paper's
    ablation); "trajectory", one mean over all agent tokens of the row (what the official code computes).
    """
    ratio_BK = sums_BK - ref_sums_BK
    tokens_BK = {
        "turn": lengths_BK,
        "none": torch.ones_like(lengths_BK),
        "trajectory": lengths_BK.sum(-1, keepdim=True).expand_as(lengths_BK),
    }[normalize]
    return torch.where(lengths_BK > 0, ratio_BK / tokens_BK.clamp(min=1), 0.0)


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
    by_task = {}
    for trajectory in trajectories:
        by_task.setdefault(task_key(trajectory), []).append(trajectory)

    def is_better(one, other):
        if margin:
            return one["reward"] - other["reward"] >= margin - 1e-9  # .9 - .8 is a little less than .1
        return one["reward"] == 1.0 and other["reward"] < 1.0
    pairs = []
    for group in by_task.values():
        found = [(one, other) for one in group for other in group if is_better(one, other)]
        pairs += rng.sample(found, min(per_task, len(found)))
    rng.shuffle(pairs)
    return pairs


def critic_view(tokenizer, trajectory, use_reference=True):
    """(input_ids, turn_ids) of a trajectory as the critic reads it: c in front, unless `use_reference` is off."""
    reference = trajectory["task"]["ground_truth"] if use_reference else None
    return render(tokenizer, trajectory["dialogue_history"], reference)


def loss_fn(model, pairs, beta, nll, normalize, batch=None, pair_loss=bradley_terry_loss):
    """The training loss on a list of pairs, Eq. 2 - nll * mean log-prob of a chosen token, and what to watch.

    batch: all pairs of the step, where these are a part of it (a micro-batch). The mean is over the chosen agent tokens
    of the whole step, so that the gradients of its parts add up to it.
    """
    B = len(pairs)
    sums_BK, ref_BK, lengths_BK = pair_logprobs(model, pairs)  # rows: B chosen ones, then B rejected ones
    advantages_BK = turn_advantages(sums_BK, ref_BK, lengths_BK, normalize)
    loss = pair_loss(advantages_BK[:B], advantages_BK[B:], beta)
    mean_tokens = agent_tokens([pair["chosen"] for pair in batch or pairs])
    loss = loss - nll * sums_BK[:B].sum() / (B * mean_tokens)
    return loss, watch(advantages_BK.detach(), lengths_BK)


def watch(advantages_BK, lengths_BK):
    """How well trajectories are told apart, and the answers' share in it: given c, the last turn alone tells success,
    and where it takes the whole margin the questions learn nothing. Rows: chosen ones, then rejected ones."""
    B = len(advantages_BK) // 2
    score_B = advantages_BK.sum(-1)
    margin_B = score_B[:B] - score_B[B:]
    turn_K = torch.arange(1, lengths_BK.shape[1] + 1, device=lengths_BK.device)
    last_B1 = ((lengths_BK > 0) * turn_K).argmax(-1, keepdim=True)  # the column of the last turn, the answer
    answer_B = advantages_BK.gather(-1, last_B1).squeeze(-1)
    return {"accuracy": (margin_B > 0).float().mean().item(),
            "margin": margin_B.mean().item(),
            "margin_answers": (answer_B[:B] - answer_B[B:]).mean().item()}


def train(model, tokenizer, pairs, out, cfg, seed, save, reference=True, normalize="turn", **how):
    """Fit the critic, starting from `model`, which is also pi_ref: its log-probs are taken before the first step.
    reference, normalize: as `BradleyTerry` has them."""
    examples = []
    for better, worse in pairs:
        chosen = critic_view(tokenizer, better, reference)
        rejected = critic_view(tokenizer, worse, reference)
        examples.append({"chosen": chosen, "rejected": rejected})
    add_reference(model, examples)

    pair_loss = load(cfg.loss, "--critic-loss")

    def loss(model, part, batch):
        return loss_fn(model, part, cfg.beta, cfg.nll, normalize, batch, pair_loss)
    sizes = pair_sizes(examples)
    return fit(
        model, examples, loss, out, cfg, seed, save,
        label="critic", sizes=sizes, **how)


class BradleyTerry:
    """The paper's critic, and what any other one needs: `fit`, once, and `score`, wherever turns are ranked.
    `--critic module:Class` runs yours, made by `Class()`; studies/critics.py has others.

    reference: whether it reads c. normalize: over what A is a mean (`turn_advantages`). rank_against: what pi_ref reads
    when turns are ranked: "c", the same as the critic, or "own", the dialogue alone (as in the official code).
    """
    reference = True
    normalize = "turn"
    rank_against = "c"

    def fit(self, run, out):
        """Learn from the offline dialogues; leave what was learned in the folder `out`. run (sweet.Run): .model(name,
        train), .better_and_worse(...), .settings, .seed, and .learning(model, tokenizer): how `machinery.train.fit` is
        to save, and what fits into memory."""
        model, tokenizer = run.model("base", train=True)
        cfg = run.settings["critic"]

        def view(trajectory):
            return critic_view(tokenizer, trajectory, self.reference)
        pairs = run.better_and_worse(run.settings["pairs"].per_task, model, tokenizer, view)
        train(
            model, tokenizer, pairs, out, cfg, run.seed,
            reference=self.reference,
            normalize=self.normalize,
            **run.learning(model, tokenizer))

    def score(self, run, states, cfg):
        """Add `advantage` to every candidate of every state (see `rank`). run, here or of the report or of `play`:
        .model(name), .path("critic") (what `fit` left), .world, .grade; cfg: the critic's settings."""
        rank(*run.model("critic"), states, self.reference, self.normalize, self.rank_against)


# ------------------------------------------------------------------ ranking

def candidate_views(tokenizer, state, use_reference=True):
    """Every candidate turn of a state as (input_ids, turn_ids), where only the candidate's tokens have a turn number
    (1)."""
    reference = state["task"]["ground_truth"] if use_reference else None
    prefix, _ = render(tokenizer, state["messages"], reference)
    views = []
    for candidate in state["candidates"]:
        ids = candidate["output_ids"]
        views.append((prefix + ids, [0] * len(prefix) + [1] * len(ids)))
    return views


def candidate_sums(model, tokenizer, states, use_reference):
    """The log-prob of every candidate of every state: [(candidate, sum)]. InputError where one is not finite."""
    candidates, views = [], []
    for state in states:
        candidates += state["candidates"]
        views += candidate_views(tokenizer, state, use_reference)
    sums = [row[0] for row in reference_sums(model, views)]
    check_finite(sums, model.name_or_path)
    return list(zip(candidates, sums))


def score_reference(model, tokenizer, states):
    """Add pi_ref's log-prob to every candidate: `ref_sum` given c, and `ref_sum_without_c`. model: the initial
    policy."""
    for candidate, total in candidate_sums(model, tokenizer, states, True):
        candidate["ref_sum"] = total
    for candidate, total in candidate_sums(model, tokenizer, states, False):
        candidate["ref_sum_without_c"] = total


def rank(model, tokenizer, states, reference=True, normalize="turn", rank_against="c"):
    """Add `advantage` (Eq. 3) to every candidate turn of every state; the last three as `BradleyTerry` has them.

    states: {"task", "messages", "candidates": [{"output_ids", "ref_sum", "ref_sum_without_c"}]}. Views and
    sums come from the functions that training used. A single turn has no trajectory to take a mean over: normalize
    "trajectory" ranks by the turn's mean.
    """
    against_c = reference and rank_against == "c"
    ref_key = "ref_sum" if against_c else "ref_sum_without_c"
    scored = candidate_sums(model, tokenizer, states, reference)
    sums_N = torch.tensor([total for _, total in scored])
    ref_N = torch.tensor([candidate[ref_key] for candidate, _ in scored])
    lengths_N = torch.tensor([float(len(candidate["output_ids"])) for candidate, _ in scored])
    of_turn = "none" if normalize == "none" else "turn"
    advantages_N1 = turn_advantages(sums_N[:, None], ref_N[:, None], lengths_N[:, None], of_turn)
    advantages = advantages_N1.squeeze(-1).tolist()
    check_finite(advantages, model.name_or_path)
    for (candidate, _), advantage in zip(scored, advantages):
        candidate["advantage"] = round(advantage, 6)


@torch.no_grad()
def judge_turns(trained, initial, trajectory):
    """The advantage of each turn of one trajectory. trained: (critic, tokenizer); initial: the model that is pi_ref."""
    model, tokenizer = trained
    batch = lay_out(model, [critic_view(tokenizer, trajectory)])
    sums_BK, lengths_BK = turn_logprobs(model, batch)
    ref_BK, _ = turn_logprobs(initial, batch)
    return turn_advantages(sums_BK, ref_BK, lengths_BK)[0].tolist()
