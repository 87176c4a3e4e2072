"""`World`, the contract between a task world and everything else: the stages, the report and `play` ask a world for
these names and no others.

A world is tasks with a hidden reference, a human who knows it, a reward, and, if it has a small model of its own, a
demonstrator that this model imitates. `--task backend`, `frontend` and `blind` name those in this folder; `--task
yourmodule:YourWorld` names yours, made by `YourWorld()`. What a world does not say has a default, which fits ColBench's
backend: the answer is a Python function, and the reward is the share of its tests that pass.

Exercised by `python -m pytest tests/test_worlds.py`, which runs a world of one's own from start to end;
docs/your-own.md shows that one.

A dialogue is a list of messages {"role": "user" or "assistant", "content"}; a record is an evaluated trajectory.
"""
import dataclasses
from difflib import SequenceMatcher
from html import escape
from itertools import zip_longest

import env
from machinery.files import InputError
from machinery.optional import find
from simulator import NO_PREFERENCE, make_human
from worlds import tiny

KNOWN_WORLDS = {
    "backend": "worlds.backend:Backend",
    "frontend": "worlds.frontend:Frontend",
    "blind": "worlds.blind:Blind",
}


def find_world(spec):
    """The world that `--task` names: backend | frontend | blind | module:Class. InputError where there is none."""
    world = find(spec, KNOWN_WORLDS, "--task")
    if not isinstance(world, World):
        raise InputError(f"--task {spec}: expected a subclass of worlds.World")
    return world


class World:
    """Tasks, a human, a reward, a demonstrator, and what a report says of them."""

    # ------------------------------------------------------------------ what every run needs

    INSTRUCTIONS = env.INSTRUCTIONS  # what the agent reads before the request; {max_turns} is filled in
    DEFAULTS = {}                    # its hyper-parameters {group: {name: value}}, see `python sweet.py --help-all`
    OPTIONAL = ()                    # fields that a task file of yours may lack

    def make_tasks(self, n, seed, split):
        """n different tasks (env.Task) of a split, or all that there are: train, dev or test, disjoint whatever the
        seed. Called by `rollout`, `eval`, `credit` and `play` where --tasks and --heldout name no file."""
        raise InputError("this world makes no tasks: give files of them, --tasks and --heldout")

    def respond(self, task, dialogue, rng):
        """The scripted human's reply to the last message. Called for each turn of each dialogue with --human
        scripted."""
        raise InputError("this world has no scripted human: give another one, --human")

    def human(self, spec, server, machine, seed):
        """The human that a SPEC of `--human` or `--heldout-human` names (simulator.Human). Called for each SPEC by each
        stage that plays dialogues. Your own where a person sees more than text."""
        return make_human(spec, self.respond, seed, server, machine)

    def grader(self, clip, call_seconds):
        """grade(answers, tasks) -> rewards in 0..1. Called once a run, with the values of --clip (a model
        that compares pictures) and --rollout-call-seconds."""
        return env.Grader(call_seconds)

    def check_installed(self, clip):
        """InputError, before any work, where a package is missing. Called when a run starts."""

    def successes(self, trajectories):
        """The offline dialogues that RFT imitates. Called by `rft`."""
        return [trajectory for trajectory in trajectories if trajectory["reward"] == 1.0]

    # ------------------------------------------------------------------ a small model of the world's own

    def phrases(self):
        """Texts that are one token each for the small model. Called by `new_model`."""
        raise InputError("this world has no model of its own: give one, --model")

    def new_model(self, cfg, seed):
        """An untrained model and its tokenizer; cfg: a tiny.Base. Called by `base` where --model names none."""
        tokenizer = tiny.make_tokenizer(self.phrases())
        return tiny.new_model(cfg, seed, tokenizer), tokenizer

    def documents(self, n, seed):
        """n dialogues of a demonstrator: a list of (messages, reference or None). Called by `base`, which imitates
        them; those with a reference teach the model to read one, which the critic needs."""
        raise InputError("this world has no demonstrator: give a model, --model, without --base-documents")

    def documents_without_c(self, n, seed):
        """n of these dialogues that show no reference. Called by `base` where it begins with --model: what such a model
        knows of references it brings along."""
        found = [one for one in self.documents(4 * n + 16, seed) if one[1] is None]
        if len(found) < n:
            raise InputError(f"--base-documents {n}: nearly all of this world's documents show the reference; with "
                             "--model, leave it out")
        return found[:n]

    # ------------------------------------------------------------------ what the world knows of a turn

    TURN = ("turn", "good", "bad")   # what a turn before the answer is called, a good one, a bad one: ("question",...)
    KNOWN = "What matters and is known"  # the title of the report's chart of `known_share`

    def judge(self, task, dialogue, action):
        """(kind, good) of a turn: kind is question, answer or other; good is True or False. Called for each candidate
        at held-out states, to see whether the critic is right, and by `--critic oracle`, which ranks by it. Here an
        answer is good if it is the reference."""
        if env.ANSWER_MARKER not in action:
            return "other", False
        answer = action.split(env.ANSWER_MARKER, 1)[1]
        return "answer", answer.strip() == task.ground_truth.strip()

    def known_share(self, task, dialogue):
        """The share of what matters that the human has said so far, None where nobody can tell. Called by the
        report."""
        return None

    # ------------------------------------------------------------------ in the report

    REWARD = "Tests passed"
    PAPER = {}                       # the paper's figures {method: text}, beside ours
    PAIRED = False                   # True: the second figure of `figures` is against the base policy
    LEGEND = "Underlined: a line that reference or answer lacks."

    def headers(self, settings):
        """What the two figures of `figures` are called."""
        return "success", "tests passed"

    def figures(self, record, base):
        """Two figures of an evaluated dialogue, in %. base: the base policy's on the same task."""
        return 100 * (record["reward"] == 1), 100 * record["reward"]

    def verdict(self, record):
        """How a dialogue ended, in a word or two."""
        return "success" if record["reward"] == 1 else "failure"

    def brief(self, text):
        """A message as a dialogue shows it."""
        return text

    def tests(self, record, grade):
        """[(call, whether the answer passes it)], each test graded as a task of its own. grade: the run's, which
        `grader` has made."""
        task = env.Task.from_record(record["task"])
        calls = task.test_cases.values()
        single = [dataclasses.replace(task, test_cases={"test": call}) for call in calls]
        rewards = grade([record["answer"]] * len(single), single)
        return [(call, reward == 1) for call, reward in zip(calls, rewards)]

    def evidence(self, record, grade, unfolded=False):
        """Reference, answer, and which tests the answer passes, as HTML. unfolded: the tests are in sight at once."""
        reference, answer = record["task"]["ground_truth"], record["answer"]
        found = self.tests(record, grade)
        passed = sum(ok for _, ok in found)
        rows = [f"<li>{'✓' if ok else '✗'} {escape(call)}" for call, ok in found]
        opened = " open" if unfolded else ""
        return (marked("reference", reference, answer) + marked("answer", answer, reference)
                + f"<details{opened}><summary>passes {passed} of {len(found)} tests</summary>"
                + f"<ul>{''.join(rows)}</ul></details>")

    # ------------------------------------------------------------------ in play

    OFFERS = (NO_PREFERENCE,)        # replies that anybody can give
    LAST_WORDS = ""                  # what the scripted human adds to the last reply

    def drawn(self, text):
        """A message as a picture (HTML), "" where there is none."""
        return ""

    def summary(self, record, grade):
        """The same as `evidence` for a terminal, as lines."""
        calls = [f"{'passed' if ok else 'failed'}  {call}" for call, ok in self.tests(record, grade)]
        rows = beside(record["task"]["ground_truth"], record["answer"])
        return [*calls, "", "The reference, and the answer beside it:", *rows]


def marked(title, text, other):
    """A program under a title as HTML, the lines that the other one lacks marked."""
    theirs = {line.strip() for line in other.splitlines()}
    rows = []
    for line in text.splitlines():
        row = escape(line)
        rows.append(row if line.strip() in theirs else f"<mark>{row}</mark>")
    return f"<h4>{title}</h4><pre>{'<br>'.join(rows)}</pre>"


def beside(reference, answer):
    """Lines of two programs side by side, as sdiff shows them: "|" between different ones, "<" where the answer lacks
    a line, ">" where it has one more."""
    left, right = reference.splitlines(), answer.splitlines()
    width = max(map(len, left), default=0)
    rows = []
    for kind, a, b, c, d in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        for ours, theirs in zip_longest(left[a:b], right[c:d]):
            mark = " " if kind == "equal" else "|"
            if theirs is None:
                mark = "<"
            if ours is None:
                mark = ">"
            rows.append(f"{ours or '':{width}} {mark} {theirs or ''}".rstrip())
    return rows
