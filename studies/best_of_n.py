"""Best of N: the direct test of a critic, without any training of an actor (the paper's Figure 3a).

At each turn of a held-out dialogue the initial policy says N things, and the one with the largest advantage is played.
The critic reads the task's reference, the policy does not. A critic that knows good turns from bad ones makes N = 32
better than N = 1; one that guesses does not, and one that is fooled makes it worse.

The N candidates are the first N of the same stream of noise, so that a larger N adds candidates and changes none. The
first one is the policy's own turn in the stage `eval`: N = 1 is the base policy at temperature 1, dialogue by dialogue.

Place in the data flow: base/, critic/ and held-out tasks -> `play` -> best-of-n.jsonl beside the critic; those of
several critics and seeds -> `means` -> studies/study.py. Exercised by `python sweet.py study best-of-n` and `python -m
pytest tests/test_best_of_n.py`. Differences from the paper: N = 16, too, and the small world's critics.
"""
import functools
import itertools
import operator
from types import SimpleNamespace

import numpy as np

import actor
import critic
from env import answers_in_code, render
from machinery.bootstrap import interval, resample_weights
from machinery.files import InputError, read_jsonl, write_groups
from machinery.schema import unfold
from machinery.train import context_of
from simulator import tell_leaks

NUMBERS = (1, 2, 4, 8, 16, 32)


# ------------------------------------------------------------------ dialogues

class BestOfN:
    """A policy that thinks before it speaks: it says several things to itself, and the critic picks one."""

    def __init__(self, run):
        load = functools.cache(run.model)  # scored turn by turn, but loaded once
        self.run = run
        self.scorer = SimpleNamespace(model=load, path=run.path, world=run.world, grade=run.grade)
        self.model, self.tokenizer = load("base")
        self.max_tokens = run.settings["rollout"].max_tokens
        self.limit = context_of(self.model) - self.max_tokens

    def candidates(self, seats):
        """A state {"task", "messages", "candidates"} for each seat (env, n, key), in a single pass of sampling."""
        prompts, keys = [], []
        for env, n, key in seats:
            prompt, _ = render(self.tokenizer, env.messages)
            prompts += [prompt] * n
            keys.append((key, env.turns))  # as actor.play_out names it
            keys += [(key, env.turns, k) for k in range(1, n)]
        turns = iter(actor.sample(self.model, self.tokenizer, prompts, keys, max_tokens=self.max_tokens,
                                  **self.run.sampling))
        states = []
        for env, n, _ in seats:
            found = actor.distinct(self.tokenizer, list(itertools.islice(turns, n)))
            nothing = {"content": "", "output_ids": []}
            states.append({
                "task": env.task.to_record(),
                "messages": env.messages,
                "candidates": found or [nothing],
            })
        return states

    def speak(self, seats):
        """The best turn of each seat takes its dialogue on."""
        states = self.candidates(seats)
        contested = [state for state in states if len(state["candidates"]) > 1]
        if contested:  # a choice is to be made somewhere
            critic.score_reference(self.model, self.tokenizer, contested)
            self.run.critic.score(self.scorer, contested, self.run.settings["critic"])
        best = []
        for state in states:
            turns = state["candidates"]
            best.append(max(turns, key=operator.itemgetter("advantage")) if len(turns) > 1 else turns[0])
        envs = [env for env, _, _ in seats]
        in_code = answers_in_code(envs, [turn["content"] for turn in best])
        for env, turn, answers in zip(envs, best, in_code):
            env.step(turn["content"], answers, output_ids=turn["output_ids"])

    def play_out(self, seats, human):
        """Play dialogues to their end, all in lock-step; one that the human leaves stays without an answer."""
        while seats:
            actor.ask_human(human, [env for env, _, _ in seats])
            seats = [seat for seat in seats if seat[0].messages[-1]["role"] == "user"]
            seats = [seat for seat in seats if actor.next_prompt(self.tokenizer, seat[0], self.limit)]
            if seats:
                self.speak(seats)
            seats = [seat for seat in seats if seat[0].answer is None]


def file_of(run):
    """The dialogues of a run's critic."""
    return run.path("critic").parent / "best-of-n.jsonl"


def play(run, numbers=NUMBERS):
    """best-of-n.jsonl of one critic: a dialogue on each held-out task with each N, {"critic", "n"} and what a
    trajectory has. A stop loses no more than a group of dialogues."""
    if file_of(run).exists():
        return
    cfg, tasks = run.settings["rollout"], run.held_out()
    policy, human = BestOfN(run), run.human(held_out=True)
    actor.check_tasks(policy.model, policy.tokenizer, tasks, cfg, run.instructions)

    def group(part, _):
        seats = []
        for n, i in part:
            env = actor.begin(tasks[i], cfg, run.instructions)
            seats.append((env, n, (run.seed, "eval", i)))
        policy.play_out(seats, human)
        rewards = actor.graded([env for env, _, _ in seats if env.answer is not None], run.grade)
        records = []
        for env, n, _ in seats:
            record = None  # the human left
            if env.answer is not None:
                record = {
                    "critic": run.settings["critic"].kind,
                    "n": n,
                    "task": env.task.to_record(),
                    "dialogue_history": unfold(env.messages),
                    "answer": env.answer,
                    "reward": next(rewards),
                }
            records.append(record)
        return records
    todo = list(itertools.product(numbers, range(len(tasks))))
    write_groups(file_of(run), todo, max(1, run.machine.rows // 8), group, "best of n", run.track)
    tell_leaks(human)


# ------------------------------------------------------------------ figures

def successes(run, numbers=NUMBERS):
    """{N: the world's first figure of each held-out task, in %}. InputError where the file is of other tasks or N."""
    path, found = file_of(run), {}
    tasks = [task.to_record() for task in run.held_out()]
    of = {}
    for _, record in read_jsonl(path):
        figure, _ = run.world.figures(record, record)
        found.setdefault(record["n"], []).append(figure)
        of.setdefault(record["n"], []).append(record["task"])
    if of != dict.fromkeys(numbers, tasks):
        raise InputError(f"{path}: is of other held-out tasks or other N than asked for now; delete it, and the same "
                         "command plays them")
    return found


def means(runs, numbers=NUMBERS):
    """{critic: [(mean, low, high) for each N, and at last for the gain of the largest N over the smallest]}, over the
    runs (seeds) of each critic."""
    by_critic = {}
    for run in runs:
        by_critic.setdefault(run.settings["critic"].kind, []).append(successes(run, numbers))
    found = {}
    for kind, seeds in by_critic.items():
        weights_RN = resample_weights([len(seed[numbers[0]]) for seed in seeds])
        drawn = [weights_RN @ np.concatenate([seed[n] for seed in seeds]) for n in numbers]
        found[kind] = [interval(mean_R) for mean_R in (*drawn, drawn[-1] - drawn[0])]
    return found
