"""Critics beside the paper's: what ranks the candidate turns is the only thing that differs from one to the next.

Each is a class with `fit` and `score`, as critic.BradleyTerry documents them. `--critic NAME` or `--critic
module:Class` runs one beside the paper's: what depends on it lies in RUN/NAME/, and everything else is shared.

    without-c   the paper's ablation: the critic does not read the reference.
    sum         the paper's ablation: sums over a turn's tokens in the place of means.
    trajectory  the official code: one mean over all agent tokens of a trajectory.
    own         the official code: pi_ref does not read c when turns are ranked, A = 1/L [log pi_theta(a|o,c) -
                log pi_ref(a|o)]. That is the paper's A plus the untrained A.
    untrained   A = 1/L [log pi_ref(a|o,c) - log pi_ref(a|o)]: no training at all. The initial model, told the solution,
                against itself without it. What it can do, Eq. 2 has not taught.
    imitation   Eq. 3's ratio, of a model that imitates the better dialogue of each pair, given c: the likelihood term
                of the critic's loss without Eq. 2. What it can do, comparing dialogues has not taught.
    regression  A is a linear head on the mean of the turn's hidden states, given c, trained by Eq. 2 on dialogues.
                The paper's Table 3 (36.2 against 40.4), and its critic for web pages (there a vision model).
    value       V(o): the reward that a dialogue will end with, learned from outcomes, given c. A = V after the turn
                less V before it. The paper's Figure 3a has a value function.
    judge       a model that was trained to chat is asked, given c, whether the turn helps. A = log p(Yes) - log p(No).
                The paper's Figure 3a; the prompt is ours.
    oracle      what the world knows: 1 for a useful question or a right answer, 0 for the rest. No critic knows more.

Exercised by `python -m pytest tests/test_critics.py`.

Shapes: B dialogues, K turns, N agent tokens in the batch, R rows of the batch, T tokens, D hidden.
"""
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import critic
from actor import train_imitation
from env import Task, encode_text, render
from kernels.logprob import add_up, agent_positions, at_least_fp32, last_hidden, lay_out, pair_sizes, reference_sums
from machinery.files import InputError, write_json
from machinery.optional import find, load
from machinery.train import check_context, check_finite, check_views, fit

KNOWN_CRITICS = {
    "bradley-terry": "critic:BradleyTerry",
    "without-c": "studies.critics:WithoutC",
    "sum": "studies.critics:Sum",
    "trajectory": "studies.critics:Trajectory",
    "own": "studies.critics:Own",
    "untrained": "studies.critics:Untrained",
    "imitation": "studies.critics:Imitation",
    "regression": "studies.critics:Regression",
    "value": "studies.critics:Value",
    "judge": "studies.critics:Judge",
    "oracle": "studies.critics:Oracle",
}


TITLES = {  # what tables call those that are not "NAME critic"
    "bradley-terry": "SWEET, ranked by Eq. 3",
    "without-c": "SWEET without c",
    "sum": "SWEET, sums",
    "trajectory": "SWEET, one mean",
    "own": "SWEET, both terms",
    "oracle": "oracle",
}


def find_critic(spec, flag="--critic"):
    """The critic that a flag names. InputError where there is none."""
    return find(spec, KNOWN_CRITICS, flag, "fit(run, out)", "score(run, states, cfg)")


def title_of(kind):
    """What tables call SWEET with a critic that is not the run's own."""
    return TITLES.get(kind, f"{kind} critic")


class WithoutC(critic.BradleyTerry):
    """It reads no more than the actor does."""
    reference = False


class Sum(critic.BradleyTerry):
    """Long turns weigh more."""
    normalize = "none"


class Trajectory(critic.BradleyTerry):
    """A turn's share in the mean over all of its trajectory's tokens."""
    normalize = "trajectory"


class Own(critic.BradleyTerry):
    """Two terms: what outcomes taught, and what the initial model knew."""
    rank_against = "own"


class Unfitted:
    """A critic that learns nothing: its folder says so."""

    def fit(self, run, out):
        write_json(out / "critic.json", {"learned": "nothing"})


class Untrained(Unfitted):
    """log pi_ref with c minus without, per token: both are part of every sampled candidate."""

    def score(self, run, states, cfg):
        for state in states:
            for candidate in state["candidates"]:
                gain = candidate["ref_sum"] - candidate["ref_sum_without_c"]
                candidate["advantage"] = gain / len(candidate["output_ids"])


class Imitation(critic.BradleyTerry):
    """Ranks as the paper's critic does, after imitation alone.

    By Bayes' rule, log p(turn | o, c, better) - log p(turn | o, c) = log P(better | turn, o, c) - log P(better | o, c):
    imitating the better dialogues, too, says how much a turn adds to the chance of being one. It learns nothing from
    the worse ones.
    """

    def fit(self, run, out):
        model, tokenizer = run.model("base", train=True)
        cfg = run.settings["critic"]

        def view(trajectory):
            return critic.critic_view(tokenizer, trajectory)
        pairs = run.better_and_worse(run.settings["pairs"].per_task, model, tokenizer, view)
        views = [view(better) for better, _ in pairs]
        train_imitation(model, views, out, cfg, run.seed, label="critic", **run.learning(model, tokenizer))


# ------------------------------------------------------------------ a number from hidden states

class Headed(torch.nn.Module):
    """A language model, and beside its own head one that maps a hidden state of the last layer to a number. It says 0
    at first. folder: where `save` has left one that was trained."""
    FILE = "head.safetensors"

    def __init__(self, model, folder=None):
        super().__init__()
        self.model = model
        width = model.get_output_embeddings().weight.shape[1]
        self.head = torch.nn.Linear(width, 1, device=model.device)  # float32, whatever the model is
        if folder is None:
            torch.nn.init.zeros_(self.head.weight)
            torch.nn.init.zeros_(self.head.bias)
        else:
            self.head.load_state_dict(load_file(folder / self.FILE))

    def turns(self, batch):
        """For each turn of a batch (of `lay_out`): what the head says in front of it, on average over its tokens and at
        its last one: before_BK, mean_BK, after_BK, all 0 where a turn is absent, and lengths_BK."""
        # of each agent token: its row (which may hold several examples), the position in front of it, and its turn's
        # cell in a flat (B, K)
        inputs, (row_N, front_N), cell_N, shape = agent_positions(self.model, batch)
        hidden_RTD = last_hidden(self.model, inputs)
        score_RT = self.head(at_least_fp32(hidden_RTD)).squeeze(-1)
        score_N = score_RT[row_N, front_N + 1]
        sums_BK, lengths_BK = add_up(score_N, cell_N, shape)
        first_N = cell_N.diff(prepend=cell_N[:1] - 1) != 0
        last_N = first_N.roll(-1)  # the next token is another turn's first one
        front_score_N = score_RT[row_N, front_N]
        before_BK, _ = add_up(front_score_N[first_N], cell_N[first_N], shape)
        after_BK, _ = add_up(score_N[last_N], cell_N[last_N], shape)
        return before_BK, sums_BK / lengths_BK.clamp(min=1), after_BK, lengths_BK


class HeadCritic:
    """What the critics with such a head share. Their own: what they learn from, and how a turn's numbers become its
    advantage."""

    def learn(self, run, headed, examples, sizes, loss, tokenizer, out):
        """Fit model and head; both are left in `out`."""
        how = run.learning(headed.model, tokenizer)
        save_model = how.pop("save")

        def save(folder):
            save_model(folder)
            save_file(headed.head.state_dict(), folder / Headed.FILE)
        cfg = run.settings["critic"]
        fit(headed, examples, loss, out, cfg, run.seed, save, label="critic", sizes=sizes, **how)

    def score(self, run, states, cfg):
        model, tokenizer = run.model("critic")
        headed = Headed(model, run.path("critic"))
        candidates, views = [], []
        for state in states:
            candidates += state["candidates"]
            views += critic.candidate_views(tokenizer, state)

        def numbers(_, batch):
            return self.advantages(headed, batch)
        found = [row[0] for row in reference_sums(model, views, numbers=numbers)]
        check_finite(found, run.path("critic"))
        for candidate, advantage in zip(candidates, found):
            candidate["advantage"] = round(advantage, 6)


class Regression(HeadCritic):
    """A(o, a, c) is the head's mean over the turn. "Trained on outcomes" is read as for the paper's own critic: Eq. 2,
    the sum over the better dialogue's turns against the worse one's. Without log-probs there is no likelihood term."""

    def advantages(self, headed, batch):
        _, mean_BK, _, lengths_BK = headed.turns(batch)
        return mean_BK, lengths_BK

    def loss(self, headed, part, cfg):
        """Eq. 2 on a list of {"chosen", "rejected"}, and what to watch."""
        views = [pair["chosen"] for pair in part] + [pair["rejected"] for pair in part]
        advantages_BK, lengths_BK = self.advantages(headed, lay_out(headed.model, views))
        pair_loss = load(cfg.loss, "--critic-loss")
        chosen_BK, rejected_BK = advantages_BK.chunk(2)
        return pair_loss(chosen_BK, rejected_BK, cfg.beta), critic.watch(advantages_BK.detach(), lengths_BK)

    def fit(self, run, out):
        model, tokenizer = run.model("base", train=True)
        cfg = run.settings["critic"]

        def view(trajectory):
            return critic.critic_view(tokenizer, trajectory)

        def loss(headed, part, batch):
            return self.loss(headed, part, cfg)
        examples = []
        for better, worse in run.better_and_worse(run.settings["pairs"].per_task, model, tokenizer, view):
            examples.append({"chosen": view(better), "rejected": view(worse)})
        self.learn(run, Headed(model), examples, pair_sizes(examples), loss, tokenizer, out)


class Value(HeadCritic):
    """V is the head's sigmoid. It learns every offline dialogue's reward by cross-entropy, in front of and at the end
    of each of its turns."""

    def advantages(self, headed, batch):
        before_BK, _, after_BK, lengths_BK = headed.turns(batch)
        return after_BK.sigmoid() - before_BK.sigmoid(), lengths_BK

    def loss(self, headed, part):
        """Cross-entropy on a list of (view, reward): the mean over a dialogue's turns, then over dialogues."""
        batch = lay_out(headed.model, [view for view, _ in part])
        before_BK, _, after_BK, lengths_BK = headed.turns(batch)
        rewards = [[reward] for _, reward in part]
        reward_BK = torch.tensor(rewards).to(before_BK).expand_as(before_BK)
        loss_before_BK = F.binary_cross_entropy_with_logits(before_BK, reward_BK, reduction="none")
        loss_after_BK = F.binary_cross_entropy_with_logits(after_BK, reward_BK, reduction="none")
        total_BK = (loss_before_BK + loss_after_BK) / 2
        spoken_BK = (lengths_BK > 0).to(total_BK)
        loss_B = (total_BK * spoken_BK).sum(-1) / spoken_BK.sum(-1)
        return loss_B.mean(), {}

    def fit(self, run, out):
        model, tokenizer = run.model("base", train=True)
        examples, names = [], []
        for trajectory in run.trajectories(tokenizer):
            examples.append((critic.critic_view(tokenizer, trajectory), trajectory["reward"]))
            names.append(trajectory["where"])
        check_views(model, [view for view, _ in examples], names)

        def loss(headed, part, batch):
            return self.loss(headed, part)
        sizes = [len(input_ids) for (input_ids, _), _ in examples]
        self.learn(run, Headed(model), examples, sizes, loss, tokenizer, out)


# ------------------------------------------------------------------ a model that is asked

QUESTION = """An assistant helps a person, who wants exactly this, which the assistant cannot see:

{reference}

Their conversation so far:

{conversation}

The assistant's next message:

{turn}

Does this message help the person to get exactly what they want? Reply with one word, Yes or No."""


class Judge(Unfitted):
    """The initial model is asked about each candidate. It needs a model that can be asked: one with words."""

    def fit(self, run, out):
        self.words(run.model("base")[1])
        super().fit(run, out)

    def words(self, tokenizer):
        """The ids of Yes and No. InputError where they are not one token each."""
        found = [list(encode_text(tokenizer, word)) for word in ("Yes", "No")]
        if any(len(ids) != 1 for ids in found):
            raise InputError("--critic judge: needs a --model that was trained to chat, for which Yes and No are one "
                             "token each; this one's tokenizer has no such words")
        return found

    def score(self, run, states, cfg):
        model, tokenizer = run.model("base")
        candidates, views = [], []
        names = {"user": "Person", "assistant": "Assistant"}
        for state in states:
            lines = [f"{names[message['role']]}: {message['content']}" for message in state["messages"]]
            for candidate in state["candidates"]:
                asked = QUESTION.format(reference=state["task"]["ground_truth"], conversation="\n".join(lines),
                                        turn=candidate["content"])
                prompt, _ = render(tokenizer, [{"role": "user", "content": asked}])
                check_context(model, len(prompt) + 1, "what the judge is asked")
                candidates.append(candidate)
                for ids in self.words(tokenizer):
                    views.append((prompt + ids, [0] * len(prompt) + [1]))
        found = [row[0] for row in reference_sums(model, views)]
        check_finite(found, model.name_or_path)
        for candidate, yes, no in zip(candidates, found[::2], found[1::2]):
            candidate["advantage"] = round(yes - no, 6)


class Oracle(Unfitted):
    """The world's own judgement."""

    def score(self, run, states, cfg):
        for state in states:
            task = Task.from_record(state["task"])
            for candidate in state["candidates"]:
                _, good = run.world.judge(task, state["messages"], candidate["content"])
                candidate["advantage"] = float(good)
