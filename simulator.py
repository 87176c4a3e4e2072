"""The human in the dialogue: knows the solution, answers questions, never shows the solution itself.

Every human is one method, `reply(tasks, dialogues) -> list of str`: many dialogues at once, so that a model or a
server can work on them together. A dialogue is a list of messages that ends with the agent's question; the task
carries what the human knows.

    ScriptedHuman   a function of the world's, deterministic given the seed        (the small world, tests)
    ConsoleHuman    you, at the terminal                                           (`python sweet.py play`)
    ModelHuman      a local causal language model, told to answer from the solution
    EndpointHuman   any OpenAI-compatible server (`pip install openai`; the key comes from OPENAI_API_KEY)
    module:Class    your own, made by `Class()`; it needs `reply` and nothing else
    DrawnHuman      several of these, one of them for each dialogue (`--human scripted,mine:Terse`)

A human who cannot reply at the moment (a server that is gone) returns None for a dialogue; what is finished is kept
then, and the same command completes the rest later (`machinery.files.write_groups`).

The paper's simulator is Llama-3.1-70B-Instruct with a prompt of its own; the words below are ours.
"""
import random
import re
import sys

from tqdm import tqdm

from env import render
from machinery.files import InputError, fill, forgive, note, read_prompt
from machinery.optional import make
from machinery.server import Endpoint, Server
from machinery.several import DrawnHuman, is_server, reads_prompt
from machinery.thoughts import spoken

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
AGAIN = "That shows code of the solution, which the assistant must not see. Say it in plain words, without any code."


def cut(text, task):
    """A reply as the official environment cuts it: 400 characters where the solution is a function, 1000 where it is a
    page."""
    return text.strip()[:1000 if task.ground_truth.lstrip().startswith("<") else 400]


def say(texts, tasks, silence=NO_PREFERENCE):
    """What a language model's texts (None: there is none) say to the agent, or `silence`: cut, without thoughts."""
    replies = [text and cut(spoken(text), task) for text, task in zip(texts, tasks)]
    if "" in replies:
        tqdm.write(f"note: {replies.count('')} replies were empty or refused, or just thoughts: {silence!r} stands in")
    return [silence if reply == "" else reply for reply in replies]


NO_CODE = re.compile(r"""(?sx) \"{3} .*? \"{3} | '{3} .*? '{3} | (?-s: \#\s.* )""")  # docstrings, comments
SIGN = re.compile(r"[=()\[\]{}<>+*/%]|:$")  # lines of plain words have none


def squeezed(text):
    """A text without white space."""
    return "".join(text.split())


def shows_code(reply, task):
    """Whether a reply holds a line of the reference's code: of 12 characters or more, with a sign that plain words do
    not have (so not `return result`), and not known from the request. White space, docstrings and comments do not
    count."""
    said, known = squeezed(reply), squeezed(task.problem_description)
    for line in map(str.strip, NO_CODE.sub("", task.ground_truth).splitlines()):
        code = squeezed(line)
        if len(line) >= 12 and SIGN.search(line) and code.rstrip(":") not in known and code in said:
            return True
    return False


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
        forgive(sys.stdin, sys.stdout)  # what the terminal cannot encode or decode ends no dialogue
        replies = []
        for dialogue in dialogues:
            print(f"\nagent: {dialogue[-1]['content']}")
            try:
                replies.append(input("you:   "))
            except EOFError:
                raise InputError("the input ended before the dialogue did") from None
        return replies


def role_of(cfg):
    """What a language model is told: ROLE, or the file that a Server's `prompt` names. InputError if that is unfit."""
    return read_prompt(cfg.prompt, "--human-prompt", ["solution", "conversation"], ["request"]) if cfg.prompt else ROLE


def prompt_for(task, dialogue, role=ROLE):
    """The one message that tells a language model to be this human."""
    names = {"user": "You", "assistant": "Assistant"}
    request = [{"role": "user", "content": task.problem_description}]
    conversation = "\n".join(f"{names[m['role']]}: {m['content']}" for m in request + dialogue[1:])
    text = fill(role, solution=task.hidden_information, conversation=conversation, request=task.problem_description)
    return [{"role": "user", "content": text}]


class SpokenHuman(Human):
    """A language model. `complete(tasks, conversations)`: its texts, None where there is none to be had now.

    A reply that shows code of the reference is asked for once more, in plain words; if that shows code, too,
    NO_PREFERENCE stands in (a Server's `leaks`: "replace"; "keep" does neither). Counted: `replies`, those that
    `leaked`, and those that did when asked again."""
    silence = NO_PREFERENCE

    def __init__(self, cfg):
        self.cfg, self.role = cfg, role_of(cfg)
        self.replies = self.leaked = self.leaked_again = 0

    def conversation(self, task, dialogue):
        """What it is told."""
        return prompt_for(task, dialogue, self.role)

    def reply(self, tasks, dialogues):
        told = [self.conversation(*pair) for pair in zip(tasks, dialogues)]
        replies = say(self.complete(tasks, told), tasks, self.silence)
        leaks = [i for i, reply in enumerate(replies) if reply and shows_code(reply, tasks[i])]
        self.replies += len(replies) - replies.count(None)
        self.leaked += len(leaks)
        if leaks and self.cfg.leaks == "replace":
            for i, reply in zip(leaks, self.asked_again(tasks, told, replies, leaks)):
                leaks_again = bool(reply) and shows_code(reply, tasks[i])
                self.leaked_again += leaks_again
                replies[i] = NO_PREFERENCE if leaks_again else reply
        return replies

    def asked_again(self, tasks, told, replies, leaks):
        """New replies in place of those that showed code."""
        asked, conversations = [], []
        for i in leaks:
            shown = {"role": "assistant", "content": replies[i]}
            conversations.append([*told[i], shown, {"role": "user", "content": AGAIN}])
            asked.append(tasks[i])
        return say(self.complete(asked, conversations), asked, self.silence)


def tell_leaks(human):
    """Say how many replies of a language model, or of each of several, showed code of the reference."""
    humans = human.humans if isinstance(human, DrawnHuman) else {"": human}
    for spec, one in humans.items():
        if isinstance(one, SpokenHuman):
            then = "kept" if one.cfg.leaks == "keep" else f"{one.leaked_again} after asking again"
            of = f"{spec}: " if spec else ""
            note(f"note: {of}replies that showed code of the reference: {one.leaked} of {one.replies} ({then})")


class ModelHuman(SpokenHuman):
    """A causal language model from a Hugging Face directory or name, or a GGUF file, that answers all dialogues side by
    side. cfg: a Server; machine: a Machine. The same seed and dialogue give the same reply, in any order of calls. What
    is too long for it to read has an empty reply."""

    def __init__(self, path, cfg=None, machine=None, seed=0):
        from machinery.speaker import Speaker
        from machinery.train import Machine, context_of, load_model
        super().__init__(cfg or Server())
        self.rows, self.seed = (machine or Machine()).rows, seed
        self.speaker = Speaker(*load_model(path, machine))
        self.room = context_of(self.speaker.model) - self.cfg.max_tokens  # tokens of a prompt at most

    def complete(self, tasks, conversations):
        texts, read = [""] * len(tasks), []
        for i, told in enumerate(conversations):
            prompt, _ = render(self.speaker.tokenizer, told)
            if len(prompt) <= self.room:
                read.append((i, tuple(prompt), (self.seed, "human", told), tasks[i].hidden_information))
        if len(read) < len(texts):
            note(f"note: {len(texts) - len(read)} dialogues are too long for the human to read: {self.silence!r}")
        for start in range(0, len(read), self.rows):
            places, *part = zip(*read[start:start + self.rows])
            said = self.speaker.complete(*part, self.cfg.temperature, self.cfg.max_tokens)
            for i, text in zip(places, said):
                texts[i] = text
        return texts


class EndpointHuman(SpokenHuman):
    """A model behind an OpenAI-compatible server (`machinery.server`); a refusal to speak counts as `silence`."""

    def __init__(self, url, cfg, seed=0):
        super().__init__(cfg)
        self.url, self.endpoint = url, Endpoint(url, cfg, seed)

    def complete(self, tasks, conversations):
        texts = self.endpoint.complete(conversations)
        if None in texts:
            note(f"note: {self.url} does not reply any more: {self.endpoint.gone}")
        return texts


def make_human(spec, respond=None, seed=0, cfg=None, machine=None):
    """The human that a SPEC names: scripted | me | URL | module:Class | a model's directory, name or GGUF file."""
    if cfg and cfg.prompt and not reads_prompt(spec):
        raise InputError(f"--human-prompt: --human {spec} reads none; expected a server or a local model")
    if spec == "scripted":
        return ScriptedHuman(respond, seed)
    if spec == "me":
        return ConsoleHuman()
    if is_server(spec):
        return EndpointHuman(spec, cfg or Server(), seed)
    if ":" in spec:
        return make(spec, "--human", "reply(tasks, dialogues)")
    return ModelHuman(spec, cfg, machine, seed)
