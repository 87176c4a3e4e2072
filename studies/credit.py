"""Is the critic right? Its ranking of candidate turns at held-out states, against what the world knows of each turn,
and against Monte Carlo: the mean reward of dialogues that the policy plays on from it.

Place in the data flow: held-out tasks, base/, critic/ -> `check` -> credit.jsonl (states with labelled candidates) and
credit.json (the figures), which the report shows. Exercised by `python -m pytest tests/test_actor.py`.
"""
import itertools
import random
from dataclasses import dataclass

import torch

import actor
import critic
from env import ANSWER_MARKER, Task, answers_in_code, grade
from kernels import ranks
from machinery.files import InputError, write_json, write_lines
from machinery.train import arg
from simulator import tell_leaks


@dataclass(frozen=True)
class Credit:
    """How the critic is checked."""
    states: int = 200
    """Held-out states whose candidates the critic is tested on."""
    monte_carlo_states: int = arg(20, least=0)
    """States whose candidates are also valued by playing on."""
    monte_carlo_rollouts: int = 24
    """Dialogues played on from each candidate."""


def check(run):
    """The stage `credit`: credit.jsonl, held-out states with their candidates, labelled and valued; credit.json, the
    figures."""
    cfg = run.settings["credit"]
    play = run.settings["rollout"]
    rng = random.Random(f"credit {run.seed}")
    tasks = run.held_out()[:cfg.states]
    human = run.human()
    model, tokenizer = run.model("base")
    actor.check_tasks(model, tokenizer, tasks, play, run.instructions)
    states = []
    keys = [(run.seed, "credit", i) for i in range(len(tasks))]
    played = actor.play_tasks(model, tokenizer, tasks, human, keys, play, **run.rules)
    if None in played:
        raise InputError("the human left; the same command starts this stage again")
    for trajectory in played:
        turns = range(1, len(trajectory["dialogue_history"]), 2)
        turn = turns[-1] if len(states) % 2 else rng.choice(turns)  # half of them where answers are given
        messages = actor.bare(trajectory["dialogue_history"][:turn])
        states.append({"task": trajectory["task"], "messages": messages})
    keys = [(run.seed, "credit candidates", i) for i in range(len(states))]
    actor.sample_candidates(model, tokenizer, states, keys, run.settings["candidates"].n, play.max_tokens,
                            **run.sampling)
    critic.score_reference(model, tokenizer, states)
    valued = states[:cfg.monte_carlo_states]
    play_on(model, tokenizer, valued, human, cfg.monte_carlo_rollouts, play, run.seed, run.grade, **run.sampling)
    run.critic.score(run, states, run.settings["critic"])
    label(states, run.world.judge, run.grade)
    write_lines(run.path("credit.jsonl"), states)
    found = agreement_with_labels(states)
    found["monte_carlo"] = agreement_with_monte_carlo(valued)
    write_json(run.path("credit.json"), found)
    tell_leaks(human)


def play_on(model, tokenizer, states, human, n, cfg, seed, grade=grade, **decoding):
    """Value every candidate by Monte Carlo: add "returns", the rewards of n dialogues that the policy plays on from
    it."""
    envs, keys, said = [], [], []
    for s, state in enumerate(states):
        for c, candidate in enumerate(state["candidates"]):
            for k in range(n):
                env = actor.begin(Task.from_record(state["task"]), cfg)
                env.messages = list(state["messages"])
                env.turns = len(state["messages"]) // 2
                envs.append(env)
                said.append(candidate)
                keys.append((seed, "play on", s, c, k))
    in_code = answers_in_code(envs, [candidate["content"] for candidate in said])
    for env, candidate, answers in zip(envs, said, in_code):
        env.step(candidate["content"], answers, output_ids=candidate["output_ids"])

    def chunk(start):
        part = slice(start, start + 512)
        actor.play_out(model, tokenizer, envs[part], human, keys[part], max_tokens=cfg.max_tokens,
                       **decoding)
        if any(env.answer is None for env in envs[part]):
            raise InputError("the human left; the same command starts this stage again")
        return list(actor.graded(envs[part], grade))
    rewards = itertools.chain(*ranks.share_out(chunk, range(0, len(envs), 512)))
    for state in states:
        for candidate in state["candidates"]:
            candidate["returns"] = [next(rewards) for _ in range(n)]


def label(states, judge, grade):
    """Add to every candidate what the world knows: `kind` and `good`, by judge(task, messages, text); an answer is good
    when it earns the full reward."""
    answers, texts, tasks = [], [], []
    for state in states:
        task = Task.from_record(state["task"])
        for candidate in state["candidates"]:
            content = candidate["content"]
            candidate["kind"], candidate["good"] = judge(task, state["messages"], content)
            if candidate["kind"] == "answer":
                answers.append(candidate)
                texts.append(content.split(ANSWER_MARKER, 1)[1])
                tasks.append(task)
    for candidate, reward in zip(answers, grade(texts, tasks)):
        candidate["good"] = reward == 1.0


def area_under_curve(good, bad):
    """The chance that a random good one has a larger score than a random bad one (ties count half)."""
    wins = 0.0
    for better in good:
        for worse in bad:
            wins += 0.5 if better == worse else better > worse
    return wins / (len(good) * len(bad))


def agreement_with_labels(states):
    """AUC within a state, averaged over the states that hold good and bad candidates of a kind.

    states: {"candidates": [{"advantage", "kind", "good"}]}. Returns {kind: {"auc", "states"}} for questions, for
    answers and "across": a good question against bad answers, a good answer against bad questions.
    """
    areas = {"question": [], "answer": [], "across": []}
    for state in states:
        sides = {(kind, good): [] for kind in ("question", "answer") for good in (True, False)}
        for candidate in state["candidates"]:
            if candidate["kind"] in areas:
                sides[candidate["kind"], bool(candidate["good"])].append(candidate["advantage"])
        asked, useless = sides["question", True], sides["question", False]
        right, wrong = sides["answer", True], sides["answer", False]
        compared = {
            "question": [(asked, useless)],
            "answer": [(right, wrong)],
            "across": [(asked, wrong), (right, useless)],
        }
        for name, pairs in compared.items():
            found = [area_under_curve(good, bad) for good, bad in pairs if good and bad]
            if found:
                areas[name].append(sum(found) / len(found))
    result = {}
    for name, found in areas.items():
        mean = sum(found) / len(found) if found else None
        result[name] = {"auc": mean, "states": len(found)}
    return result


def agreement_with_monte_carlo(states):
    """Does a larger advantage mean a larger value? Pairs of candidates of one state whose values, means over the
    rewards of dialogues played on from them, differ by more than two standard errors: the share that the critic
    orders alike.

    states: {"candidates": [{"advantage", "returns": rewards}]}. Returns {"accuracy", "pairs"}.
    """
    right, pairs = 0.0, 0
    for state in states:
        for one, other in itertools.combinations(state["candidates"], 2):
            value, variance = value_of(one["returns"])
            other_value, other_variance = value_of(other["returns"])
            if abs(value - other_value) <= 2 * (variance + other_variance) ** 0.5:
                continue  # not measured well enough to say which is better
            pairs += 1
            if one["advantage"] == other["advantage"]:
                right += 0.5
            else:
                right += (one["advantage"] > other["advantage"]) == (value > other_value)
    return {"accuracy": right / pairs if pairs else None, "pairs": pairs}


def value_of(returns):
    """Mean of some rewards, and its variance. One success and one failure more keep the variance of "always" and
    "never" from being 0."""
    returns = torch.tensor(returns, dtype=torch.float64)
    smoothed = (returns.sum() + 1) / (len(returns) + 2)
    variance = smoothed * (1 - smoothed) / len(returns)
    return returns.mean().item(), variance.item()
