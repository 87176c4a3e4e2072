"""Critics beside the paper's: what ranks the candidate turns is the only thing that differs from one to the next.

Each is a class with `fit` and `score`, as critic.BradleyTerry documents them. `--critic NAME` or `--critic
module:Class` runs one beside the paper's: what depends on it lies in RUN/NAME/, and everything else is shared.

    without-c   the paper's ablation: the critic does not read the reference.
    sum         the paper's ablation: sums over a turn's tokens in the place of means.
    trajectory  the official code: one mean over all agent tokens of a trajectory.
    own         the official code: ranks by log pi_theta(a|o,c) - log pi_ref(a|o), the paper's A plus the untrained A.
    untrained   A = 1/L [log pi_ref(a|o,c) - log pi_ref(a|o)]: no training at all. The initial model, told the solution,
                against itself without it. What it can do, Eq. 2 has not taught.
    imitation   Eq. 3's ratio, of a model that imitates the better dialogue of each pair, given c: the likelihood term
                of the critic's loss without Eq. 2. What it can do, comparing dialogues has not taught.
    oracle      what the world knows: 1 for a useful question or a right answer, 0 for the rest. No critic knows more.

Exercised by `python -m pytest tests/test_critics.py`.
"""
import critic
from actor import train_imitation
from env import Task
from machinery.files import write_json
from machinery.optional import find

KNOWN_CRITICS = {
    "bradley-terry": "critic:BradleyTerry",
    "without-c": "studies.critics:WithoutC",
    "sum": "studies.critics:Sum",
    "trajectory": "studies.critics:Trajectory",
    "own": "studies.critics:Own",
    "untrained": "studies.critics:Untrained",
    "imitation": "studies.critics:Imitation",
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
        out.mkdir(parents=True)
        write_json(out / "critic.json", {"learned": "nothing"})


class Untrained(Unfitted):
    """log pi_ref with c minus without, per token: both are part of every sampled candidate."""

    def score(self, run, states, cfg):
        for state in states:
            for candidate in state["candidates"]:
                gain = candidate["ref_sum"] - candidate["ref_sum_without_c"]
                candidate["advantage"] = gain / len(candidate["output_ids"])


class Imitation(critic.BradleyTerry):
    """Ranks as the paper's critic does, after imitation alone."""

    def fit(self, run, out):
        model, tokenizer = run.model("base", train=True)
        cfg = run.settings["critic"]

        def view(trajectory):
            return critic.critic_view(tokenizer, trajectory)
        pairs = run.better_and_worse(run.settings["pairs"].per_task, model, tokenizer, view)
        views = [view(better) for better, _ in pairs]
        train_imitation(model, views, out, cfg, run.seed, label="critic", **run.learning(model, tokenizer))


class Oracle(Unfitted):
    """The world's own judgement."""

    def score(self, run, states, cfg):
        for state in states:
            task = Task.from_record(state["task"])
            for candidate in state["candidates"]:
                _, good = run.world.judge(task, state["messages"], candidate["content"])
                candidate["advantage"] = float(good)
