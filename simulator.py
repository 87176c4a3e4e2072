"""The human in the dialogue: knows the solution, answers questions, never shows the solution itself.

Every human is one method, `reply(tasks, dialogues) -> list of str`: many dialogues at once, so that a model or a
server can work on them together. A dialogue is a list of messages that ends with the agent's question; the task
carries what the human knows.

    ScriptedHuman   a function of the world's, deterministic given the seed        (the small world, tests)
    ConsoleHuman    you, at the terminal                                           (`python sweet.py play`)
    ModelHuman      a local causal language model, told to answer from the solution
    EndpointHuman   any OpenAI-compatible server (`pip install openai`; the key comes from OPENAI_API_KEY)
    module:Class    your own, made by `Class()`; it needs `reply` and nothing else

A human who cannot reply at the moment (a server that is gone) returns None for a dialogue; what is finished is kept
then, and the same command completes the rest later (`machinery.files.write_groups`).

The paper's simulator is Llama-3.1-70B-Instruct with a prompt of its own; the words below are ours.
"""
import importlib
import random
import sys

from env import end_of_turn, render
from machinery.files import InputError
from machinery.optional import first_line
from machinery.server import Endpoint, Server

NO_PREFERENCE = "I have no preference."  # stands in for a reply that a model left empty or refused
ROLE = """You are a person who has asked an assistant to write a function. You know exactly what you want: it is this \
solution, which the assistant cannot see:

{solution}

Answer the assistant's last question from the solution, in one or two plain sentences, as a person would. Say what the \
function should do; never write code, and never volunteer what was not asked. If the solution does not say, answer \
that you have no preference.

The conversation so far:

{conversation}

Your reply:"""


def cut(text, task):
    """A reply as the official environment cuts it: 400 characters where the solution is a function, 1000 where it is a
    page."""
    return text.strip()[:1000 if task.ground_truth.lstrip().startswith("<") else 400]


class Human:
    """What a dialogue needs of a human."""

    def reply(self, tasks, dialogues):
        """One reply to each dialogue (a list of messages, the last one the agent's), or None where there is none to be
        had now. tasks[i] is what dialogues[i] is about."""
        raise NotImplementedError


class ScriptedHuman(Human):
    """Replies by `respond(task, dialogue, rng)`; the rng depends on the seed and the dialogue, not on the order of
    calls."""

    def __init__(self, respond, seed=0):
        self.respond, self.seed = respond, seed

    def reply(self, tasks, dialogues):
        return [self.respond(task, dialogue, random.Random(f"{self.seed} {[m['content'] for m in dialogue]}"))
                for task, dialogue in zip(tasks, dialogues)]


class ConsoleHuman(Human):
    """You: shows the agent's message and reads a line."""

    def reply(self, tasks, dialogues):
        replies = []
        for dialogue in dialogues:
            print(f"\nagent: {dialogue[-1]['content']}")
            try:
                replies.append(input("you:   "))
            except EOFError:
                raise InputError("the input ended before the dialogue did") from None
        return replies


def prompt_for(task, dialogue):
    """The one message that tells a language model to be this human."""
    names = {"user": "You", "assistant": "Assistant"}
    request = [{"role": "user", "content": task.problem_description}]
    conversation = "\n".join(f"{names[m['role']]}: {m['content']}" for m in request + dialogue[1:])
    return [{"role": "user", "content": ROLE.format(solution=task.hidden_information, conversation=conversation)}]


class ModelHuman(Human):
    """A causal language model from a Hugging Face directory or name, decoded greedily, one dialogue after the other."""

    def __init__(self, path, machine=None, max_tokens=128):
        from machinery.train import load_model
        self.model, self.tokenizer = load_model(path, machine)
        self.max_tokens = max_tokens

    def reply(self, tasks, dialogues):
        import torch
        replies, eot = [], end_of_turn(self.tokenizer)  # often not the model's EOS
        for task, dialogue in zip(tasks, dialogues):
            ids, _ = render(self.tokenizer, prompt_for(task, dialogue))
            with torch.no_grad():
                out = self.model.generate(torch.tensor([ids], device=self.model.device), max_new_tokens=self.max_tokens,
                                          do_sample=False, eos_token_id=eot, pad_token_id=eot)
            text = self.tokenizer.decode(out[0, len(ids):], skip_special_tokens=True)
            replies.append(cut(text, task) or NO_PREFERENCE)
        return replies


class EndpointHuman(Human):
    """A model behind an OpenAI-compatible server (`machinery.server`); a refusal to speak counts as `silence`."""
    silence, conversation = NO_PREFERENCE, staticmethod(prompt_for)  # what it is told, of a task and a dialogue

    def __init__(self, url, cfg):
        self.url, self.endpoint = url, Endpoint(url, cfg)

    def reply(self, tasks, dialogues):
        replies = self.endpoint.complete([self.conversation(*pair) for pair in zip(tasks, dialogues)])
        if "" in replies:
            print(f"note: {replies.count('')} replies were empty or refused: {self.silence!r} stands for them")
        if None in replies:
            print(f"note: {self.url} does not reply any more: {self.endpoint.gone}", file=sys.stderr)
        return [text if text is None else cut(text, task) or self.silence for text, task in zip(replies, tasks)]


def make_human(spec, respond=None, seed=0, cfg=None, machine=None):
    """The human that `--human` names: scripted | me | URL | module:Class | a model's directory or name."""
    if spec == "scripted":
        return ScriptedHuman(respond, seed)
    if spec == "me":
        return ConsoleHuman()
    if spec.startswith(("http://", "https://")):
        return EndpointHuman(spec, cfg or Server())
    if ":" in spec:
        return own_human(spec)
    return ModelHuman(spec, machine)


def own_human(spec):
    """An object of the class that is named so: module:Class."""
    module, name = spec.split(":", 1)
    try:
        human = getattr(importlib.import_module(module), name)()
    except (Exception, SystemExit) as error:  # the user's code, which fails in its own ways
        raise InputError(f"--human {spec}: {type(error).__name__}: {first_line(error)}; expected module:Class, "
                         "importable from here and made by Class()") from None
    if not callable(getattr(human, "reply", None)):
        raise InputError(f"--human {spec}: {name} has no method reply(tasks, dialogues)")
    return human
