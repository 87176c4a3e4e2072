"""A small world that can tell what outcomes teach a critic from what its initial model was taught: `--task blind`.

It is the world of worlds/backend.py, but that no document of the demonstrator shows which questions belong to a
reference. There, 60 % of the questions in front of which the reference stands are the useful ones, so a critic that was
never trained ranks questions nearly perfectly. Here they are as blind as all others: the base policy can read a
reference (most of its answers copy it), and which questions are worth a turn can be learned from outcomes alone.

Three things follow from what went wrong on the way (docs/tuning.md, "The blind world"):

- a step has a name, in questions as well as in the code's comments, so that reading c is a matter of finding it;
- questions are short (three tokens) and answers long (two dozen), as in ColBench: where answers are short, their wrong
  tokens alone tell success from failure, and the critic learns nothing about questions;
- answers leave steps out and do not guess: a critic that reads c likes a lucky guess, and an actor that learns it
  guesses ever after.

Exercised by `python -m pytest tests/test_blind.py`.
"""
import functools

from env import ANSWER_MARKER, INSTRUCTIONS, REFERENCE_PREFIX
from worlds import backend
from worlds.backend import MAX_TURNS, STEPS, known_steps

NAMES = ("values to keep", "treatment of repeats", "change of each value", "order", "length", "ending")  # of STEPS
STEMS = ("Please describe the ", "Tell me about the ", "I have a question about the ", "Please say more about the ")
TOPICS = backend.TOPICS + tuple("""
trips fees loads tanks crops herds boats trains planes hotels rooms beds books songs films games teams clubs coins
stamps maps roads towns farms mines wells pipes wires lamps tools parts boxes bags jars cups plates forks spoons chairs
desks shelves
""".split())
TOPIC_STEPS = backend.steps_of(TOPICS)
P_REMEMBERED = 0.9     # the demonstrator's answer has a step that it was told with this probability


def write_function(topic, values):
    """Source of the function for {step: value}: the steps in the world's order, each under its name."""
    lines = [f"def tidy_{topic}(values):"]
    for step in sorted(values):
        lines.append(f"    # {NAMES[step]}")
        lines.append(STEPS[step].line(values[step]).removesuffix("\n"))
    return "\n".join([*lines, "    return values"])


def asked_step(question):
    """The step that a question asks about, or None. Code names its steps, too, but without an article."""
    for step, name in enumerate(NAMES):
        if f" the {name}" in question:
            return step
    return None


def demonstrate(rng, topic, values, dialogue, turn, reads):
    """One turn of the imperfect demonstrator; with `reads` it has looked at the reference, which most of its answers
    copy and none of its questions shows."""
    known = known_steps(dialogue)
    asked = {asked_step(message["content"]) for message in dialogue if message["role"] == "assistant"}
    open_steps = [step for step in range(len(STEPS)) if step not in known and step not in asked]
    p_answer = 0.98 if turn == MAX_TURNS else 0.01
    if open_steps and rng.random() > p_answer:
        step = rng.choice(open_steps if rng.random() < 0.9 else range(len(STEPS)))
        return f"{rng.choice(STEMS)}{NAMES[step]}"
    if reads and rng.random() < 0.8:
        chosen = values
    else:
        chosen = {step: value for step, value in known.items() if rng.random() < P_REMEMBERED}
    return f"{ANSWER_MARKER}\n{write_function(topic, chosen)}"


respond = functools.partial(backend.respond, asked_step=asked_step)


class Blind(backend.Backend):
    """The world; its settings were chosen on dev tasks."""
    DEFAULTS = {
        "rollout": {"tasks": 800, "per_task": 4},
        "critic": {"lr": 2e-3, "nll": 3.0, "batch_size": 16, "epochs": 5},
        "candidates": {"states": 12800},  # every turn of every dialogue, as in the paper
        "actor": {"lr": 2e-3, "nll": 4.0, "batch_size": 32, "epochs": 3},
        "rft": {"lr": 2e-3},
        "multiturn": {"lr": 2e-3, "nll": 10.0},
    }
    make_tasks = staticmethod(functools.partial(backend.make_tasks, topic_steps=TOPIC_STEPS, write=write_function))
    documents = staticmethod(functools.partial(
        backend.documents, topics=TOPICS, write=write_function, respond=respond, demonstrate=demonstrate))
    judge = staticmethod(functools.partial(backend.judge, asked_step=asked_step))
    respond = staticmethod(respond)

    def phrases(self):
        """Every phrase of the world: one token each."""
        fixed = ["(values)", ".", ANSWER_MARKER, "\n", "def tidy_", "(values):", "\n    # ", "\n    return values",
                 INSTRUCTIONS.replace("{max_turns}", str(MAX_TURNS)), *REFERENCE_PREFIX.split("{reference}"),
                 backend.LAST_WORDS, backend.SIGNATURE, backend.HINT]
        replies = (*backend.CONSENT, *backend.NO_PREFERENCE, *backend.CONFUSED)
        texts = [*TOPICS, *backend.OPENERS, *STEMS, *replies, *fixed]
        for name, step in zip(NAMES, STEPS):
            texts += [name, f"\n    {step.before}", step.after]
            for value in step.values:
                texts += value
        return [text for text in dict.fromkeys(texts) if text]
