"""The human in the dialogue: knows the solution, answers questions, never shows the solution itself.

Every human is one method, `reply(tasks, dialogues) -> list of str`: many dialogues at once, so that a model or a
server can work on them together. A dialogue is a list of messages that ends with the agent's question; the task
carries what the human knows.

    ScriptedHuman   a function of the world's, deterministic given the seed        (the small world, tests)
    ConsoleHuman    you, at the terminal                                           (`python sweet.py play`)
    ModelHuman      a local causal language model, told to answer from the solution
    EndpointHuman   any OpenAI-compatible server (`pip install openai`; the key comes from OPENAI_API_KEY)
    module:Class    your own, made by `Class()`; it needs `reply` and nothing else

The paper's simulator is Llama-3.1-70B-Instruct with a prompt of its own; the words below are ours.
"""
import importlib
import random
from concurrent.futures import ThreadPoolExecutor

from env import InputError, render

REPLY_CHARACTERS = 400  # the official environment cuts the backend human's reply here
ROLE = """You are a person who has asked an assistant to write a function. You know exactly what you want: it is this \
solution, which the assistant cannot see:

{solution}

Answer the assistant's last question from the solution, in one or two plain sentences, as a person would. Say what the \
function should do; never write code, and never volunteer what was not asked. If the solution does not say, answer \
that you have no preference.

The conversation so far:

{conversation}

Your reply:"""


class Human:
    """What a dialogue needs of a human."""

    def reply(self, tasks, dialogues):
        """One reply to each dialogue (a list of messages, the last one the agent's). tasks[i] is what dialogues[i] is
        about."""
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
            replies.append(input("you:   "))
        return replies


def prompt_for(task, dialogue):
    """The one message that tells a language model to be this human."""
    names = {"user": "You", "assistant": "Assistant"}
    request = [{"role": "user", "content": task.problem_description}]
    conversation = "\n".join(f"{names[m['role']]}: {m['content']}" for m in request + dialogue[1:])
    return [{"role": "user", "content": ROLE.format(solution=task.hidden_information, conversation=conversation)}]


class ModelHuman(Human):
    """A causal language model from a Hugging Face directory or name, decoded greedily, one dialogue after the other."""

    def __init__(self, path, device="cpu", max_tokens=128):
        from kernels.fit import load_model
        self.model, self.tokenizer = load_model(path, device)
        self.max_tokens = max_tokens

    def reply(self, tasks, dialogues):
        import torch
        replies = []
        for task, dialogue in zip(tasks, dialogues):
            ids, _ = render(self.tokenizer, prompt_for(task, dialogue))
            with torch.no_grad():
                out = self.model.generate(torch.tensor([ids], device=self.model.device), max_new_tokens=self.max_tokens,
                                          do_sample=False)
            text = self.tokenizer.decode(out[0, len(ids):], skip_special_tokens=True)
            replies.append(text.strip()[:REPLY_CHARACTERS])
        return replies


class EndpointHuman(Human):
    """A model behind an OpenAI-compatible server; `parallel` requests at a time, retried by the client on passing
    faults."""

    def __init__(self, url, model, parallel=16, max_tokens=128, retries=5):
        from openai import OpenAI
        self.client = OpenAI(base_url=url, max_retries=retries, timeout=60.0)
        self.model, self.parallel, self.max_tokens = model, parallel, max_tokens

    def _ask(self, task, dialogue):
        answer = self.client.chat.completions.create(model=self.model, messages=prompt_for(task, dialogue),
                                                     max_tokens=self.max_tokens, temperature=0.0)
        return (answer.choices[0].message.content or "I have no preference.").strip()[:REPLY_CHARACTERS]

    def reply(self, tasks, dialogues):
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self._ask, tasks, dialogues))


def make_human(spec, respond=None, seed=0, model=None, device="cpu"):
    """The human that `--human` names: scripted | me | URL | module:Class | a model's directory or name."""
    if spec == "scripted":
        return ScriptedHuman(respond, seed)
    if spec == "me":
        return ConsoleHuman()
    if spec.startswith(("http://", "https://")):
        return EndpointHuman(spec, model)
    if ":" in spec:
        module, name = spec.split(":", 1)
        try:
            return getattr(importlib.import_module(module), name)()
        except (ImportError, AttributeError) as error:
            raise InputError(f"--human {spec}: {error}; expected module:Class, importable from here") from None
    return ModelHuman(spec, device)
