"""Several humans, and which of them replies in a dialogue: `--human A,B` and `--heldout-human`.

A human is what simulator.py says: an object with `reply(tasks, dialogues)`. Exercised by `python -m pytest
tests/test_humans.py`.
"""
import dataclasses
import random

from machinery.files import InputError, split_specs


def ask(human, tasks, dialogues):
    """The replies of a human. InputError where they are not one text, or None, for each dialogue."""
    replies = human.reply(tasks, dialogues)
    name = f"{type(human).__name__}.reply()"
    if not isinstance(replies, list) or len(replies) != len(tasks):
        raise InputError(f"{name} should return a list of {len(tasks)} texts, one for each dialogue; it returned "
                         f"{replies!r:.60}")
    for reply in replies:
        if not isinstance(reply, str | None):
            raise InputError(f"{name} should return texts; it returned {reply!r:.60}")
    return replies


class DrawnHuman:
    """One of several humans for each dialogue. humans: {SPEC: Human}. Who it is depends on the seed, the request and
    the agent's first turn, which stay while a dialogue goes on: not on the order of calls, nor on other dialogues."""

    def __init__(self, humans, seed=0):
        self.humans, self.seed = humans, seed

    def draw(self, dialogue):
        """The SPEC of the human of this dialogue."""
        first = [message["content"] for message in dialogue[:2]]
        return random.Random(f"who {self.seed} {first}").choice(list(self.humans))

    def reply(self, tasks, dialogues):
        replies, drawn = [None] * len(tasks), [self.draw(dialogue) for dialogue in dialogues]
        for spec, human in self.humans.items():
            mine = [i for i, name in enumerate(drawn) if name == spec]
            if mine:
                said = ask(human, [tasks[i] for i in mine], [dialogues[i] for i in mine])
                for i, reply in zip(mine, said):
                    replies[i] = reply
        return replies


def is_server(spec):
    return spec.startswith(("http://", "https://"))


def reads_prompt(spec):
    """Whether the human of a SPEC is a language model of ours to instruct: a server or a local one."""
    return is_server(spec) or spec not in ("scripted", "me") and ":" not in spec


def make_humans(specs, make, seed=0):
    """The human that `--human` names: make(SPEC), or one of several, SPEC,SPEC,..., for each dialogue (DrawnHuman)."""
    names = split_specs(specs)
    if len(names) == 1:
        return make(specs)
    if "" in names or len(set(names)) < len(names):
        raise InputError(f"--human {specs}: expected different humans with commas between them")
    return DrawnHuman({name: make(name) for name in names}, seed)


def humans_of(make, given, cfg, seed, held_out):
    """Who replies in offline dialogues, or in held-out ones. make(SPEC, Server): a human; given: a Given; cfg: a
    Server. Its prompt goes to those that read one; where none does, to all, and is refused there."""
    own = held_out and given.heldout_human
    everybody = [*split_specs(given.human), *split_specs(given.heldout_human)]
    silent = dataclasses.replace(cfg, prompt="") if any(map(reads_prompt, filter(None, everybody))) else cfg
    try:
        return make_humans(own or given.human, lambda spec: make(spec, cfg if reads_prompt(spec) else silent), seed)
    except InputError as error:
        raise InputError(f"--heldout-human: {error}" if own else str(error)) from None
