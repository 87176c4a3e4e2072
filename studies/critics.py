"""Critics beside the paper's: what ranks the candidate turns is the only thing that differs from one to the next.

Each is a class with `fit` and `score`, as critic.BradleyTerry documents them. `--critic NAME` or `--critic
module:Class` puts one in the place of the paper's in a whole run; everything else stays as it is.

    untrained   A = 1/L [log pi_ref(a|o,c) - log pi_ref(a|o)]: no training at all. The initial model, told the solution,
                against itself without it. What it can do, Eq. 2 has not taught.
    imitation   Eq. 3's ratio, of a model that imitates the better dialogue of each pair, given c: the likelihood term
                of the critic's loss without Eq. 2. What it can do, comparing dialogues has not taught.
    oracle      what the world knows: 1 for a useful question or a right answer, 0 for the rest. No critic knows more.

Further ones are flags of the paper's: --no-reference (without c), --critic-normalize none (sums in the place of means),
--critic-rank-against own (both terms, as the official code ranks).

Exercised by `python -m pytest tests/test_critics.py`.
"""
import difflib

import critic
from actor import train_imitation
from env import Task
from machinery.files import InputError, write_json
from machinery.optional import make

KNOWN_CRITICS = {
    "bradley-terry": "critic:BradleyTerry",
    "untrained": "studies.critics:Untrained",
    "imitation": "studies.critics:Imitation",
    "oracle": "studies.critics:Oracle",
}


def find_critic(spec):
    """The critic that `--critic` names. InputError where there is none."""
    if spec not in KNOWN_CRITICS and ":" not in spec:
        near = difflib.get_close_matches(spec, KNOWN_CRITICS, 1)
        perhaps = f" (perhaps {near[0]})" if near else ""
        raise InputError(f"--critic {spec}: expected {' or '.join(KNOWN_CRITICS)} or module:Class{perhaps}")
    return make(KNOWN_CRITICS.get(spec, spec), "--critic", "fit(run, out)", "score(run, states, cfg)")


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


class Imitation:
    """Ranks as the paper's critic does, after imitation alone."""

    def fit(self, run, out):
        model, tokenizer = run.model("base", train=True)
        cfg = run.settings["critic"]

        def view(trajectory):
            return critic.critic_view(tokenizer, trajectory, cfg.reference)
        pairs = run.better_and_worse(run.settings["pairs"].per_task, model, tokenizer, view)
        views = [view(better) for better, _ in pairs]
        train_imitation(model, views, out, cfg, run.seed, label="critic", **run.learning(model, tokenizer))

    def score(self, run, states, cfg):
        critic.rank(*run.model("critic"), states, cfg)


class Oracle(Unfitted):
    """The world's own judgement."""

    def score(self, run, states, cfg):
        for state in states:
            task = Task.from_record(state["task"])
            for candidate in state["candidates"]:
                _, good = run.world.judge(task, state["messages"], candidate["content"])
                candidate["advantage"] = float(good)
