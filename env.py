"""The world of SWEET-RL: tasks, the dialogue as a partially observed decision process, what a model reads, and the
reward.

An agent gets a vague request and talks with a human who knows the solution. Every turn it either asks or, by writing
`I WANT TO ANSWER:`, hands in an answer, which ends the dialogue. The reward is the share of the task's tests that pass.

    observation o_t   all messages so far (the human's request, earlier turns, replies)
    action a_t        the agent's t-th message, tokens a_t^1 .. a_t^L (the end-of-turn token is the last one)
    hidden c          the reference solution: the human answers from it, the critic reads it in training, the agent
                      never does

This file needs no torch. Place in the data flow: tasks.jsonl -> Task -> DialogueEnv -> messages -> render -> token
ids, and answers -> grade -> rewards. Differences from the paper: none in the protocol; answers run in a sandbox
(machinery/sandbox.py).
"""
import copy
import functools
import re
import sys
import textwrap
from dataclasses import dataclass, field

from jinja2 import TemplateError
from tokenizers import AddedToken

from machinery import sandbox
from machinery.files import InputError, read_jsonl

ANSWER_MARKER = "I WANT TO ANSWER:"
REFERENCE_PREFIX = "In light that the final answer is: {reference}.\n"  # how the critic reads c: a data format
INSTRUCTIONS = (
    "You are helping a person who needs a piece of work done but has described it only roughly. In each of your turns, "
    "ask one short question about what is missing, or, once you know enough, write \"" + ANSWER_MARKER + "\" followed "
    "by the complete result. You have {max_turns} turns at most, and the answer takes one of them.\n\n")


# ------------------------------------------------------------------ tasks

@dataclass(frozen=True)
class Task:
    """One ColBench task. `ground_truth` is c: Python source (backend) or an HTML page (frontend).

    test_cases: {name: a call of the function, as Python source}. extra: keys of the record that we do not know, kept.
    where: the file and line that it came from.
    """
    problem_description: str
    ground_truth: str
    test_cases: dict = field(default_factory=dict)
    extra: dict = field(default_factory=dict)
    where: str = field(default="task", compare=False)

    @property
    def hidden_information(self):
        """What the human knows (some copies of ColBench carry it; otherwise the reference itself)."""
        return self.extra.get("hidden_information", self.ground_truth)

    def to_record(self):
        return {"problem_description": self.problem_description, "ground_truth": self.ground_truth,
                "test_cases": self.test_cases, **self.extra}

    @classmethod
    def from_record(cls, record, where="task", optional=("test_cases",)):
        """Read ColBench's record. InputError, naming `where`, when a field is missing, empty or of the wrong
        kind."""
        known = {"problem_description": str, "ground_truth": str, "test_cases": dict}
        for name, kind in known.items():
            if not isinstance(record.get(name, kind()), kind):
                raise InputError(f"{where}: field '{name}' should be a {kind.__name__}, is {record[name]!r:.40}")
            if not record.get(name) and name not in optional:
                fault = "is empty" if name in record else f"is missing; found {sorted(record)[:8]}"
                raise InputError(f"{where}: field '{name}' {fault}")
        values = {name: record.get(name, kind()) for name, kind in known.items()}
        for name, call in values["test_cases"].items():
            if not isinstance(call, str):
                raise InputError(f"{where}: field 'test_cases': '{name}' should be a call as text, is {call!r:.40}")
        return cls(**values, extra={k: value for k, value in record.items() if k not in known}, where=where)


def load_tasks(path, optional=("test_cases",)):
    """Read a ColBench task file. optional: fields that the task at hand can do without (a file of web pages has no
    test_cases). InputError on a missing file or field, a broken line, or no task at all."""
    tasks = [Task.from_record(record, f"{path}, line {number}", optional) for number, record in read_jsonl(path)]
    if not tasks:
        raise InputError(f"{path}: holds no task; expected a line with problem_description and ground_truth for each")
    return tasks


def check_messages(messages, where):
    """InputError unless this is a list of {"role": text, "content": text}."""
    if not isinstance(messages, list):
        raise InputError(f"{where} should be a list of messages, is {messages!r:.40}")
    for message in messages:
        if not isinstance(message, dict) or any(not isinstance(message.get(k), str) for k in ("role", "content")):
            raise InputError(f"{where}: a message should have 'role' and 'content', both text; is {message!r:.60}")


def read_trajectories(path):
    """Yield ColBench's offline dialogues one at a time, without what this project does not read (the prompt that is
    repeated with every turn is most of such a file). InputError on what is no graded dialogue."""
    for number, record in read_jsonl(path, ("task", "dialogue_history", "reward")):
        where, history, reward = f"{path}, line {number}", record["dialogue_history"], record["reward"]
        if isinstance(reward, bool) or not isinstance(reward, (int, float)) or reward != reward:
            raise InputError(f"{where}: field 'reward' should be a number, is {reward!r:.40}")
        check_messages(history, f"{where}: field 'dialogue_history'")
        roles = [message["role"] for message in history]
        if len(roles) < 2 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
            raise InputError(f"{where}: field 'dialogue_history' should alternate user and assistant, is {roles!r:.80}")
        history = [{key: m[key] for key in ("role", "content", "output_ids") if key in m} for m in history]
        yield {"task": Task.from_record(record["task"], where).to_record(), "dialogue_history": history,
               "reward": float(reward)}


# ------------------------------------------------------------------ dialogue

class DialogueEnv:
    """One dialogue. The answer counts as a turn; a dialogue that runs out of turns is graded on its last one.

    >>> env = DialogueEnv(max_turns=10)
    >>> messages = env.reset(task)              # [{"role": "user", "content": instructions and request}]
    >>> while not env.step(agent(messages)):    # True when the agent answers or has no turn left
    ...     messages = env.observe(human(messages))
    >>> env.answer
    """

    def __init__(self, max_turns=10, instructions=INSTRUCTIONS):
        self.max_turns, self.instructions = max_turns, instructions.replace("{max_turns}", str(max_turns))

    def reset(self, task):
        self.task, self.answer, self.turns = task, None, 0
        self.messages = [{"role": "user", "content": self.instructions + task.problem_description}]
        return self.messages

    def step(self, action, **extra):
        """Append the agent's turn (extra: output_ids and the like, kept with the message). True when the dialogue is
        over."""
        if self.answer is not None or self.messages[-1]["role"] != "user":
            raise ValueError("step() needs a human's message to respond to: call reset() or observe() first")
        self.messages.append({"role": "assistant", "content": action, **extra})
        self.turns += 1
        if ANSWER_MARKER in action:
            self.answer = action.split(ANSWER_MARKER, 1)[1].strip()
        elif self.turns >= self.max_turns:
            self.answer = action.strip()
        return self.answer is not None

    def observe(self, reply):
        """Append the human's reply and return what the agent sees next."""
        self.messages.append({"role": "user", "content": reply})
        return self.messages


# ------------------------------------------------------------------ render

# Templates that write today's date write this one: the ids of a dialogue must be the same tomorrow.
FIXED_DATE = ('{% macro strftime_now(form) %}{{ form.replace("%d", "26").replace("%b", "Jul").replace("%B", "July")'
              '.replace("%m", "07").replace("%Y", "2024") }}{% endmacro %}{{ "" }}')


@functools.lru_cache(maxsize=8)
def _scaffold(tokenizer):
    """What the chat template writes around messages, as token ids: (before the first one, from the human's to the
    agent's turn, from the agent's to the human's), and the id of the end of an agent's turn.

    The template is rendered once, on two turns with a placeholder for each content, so contents can never be mistaken
    for template, nor be trimmed or stripped by it. From the human's to the agent's turn is taken at the last turn,
    because that is what the agent reads when it speaks: some templates write earlier turns in another way.
    """
    messages = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(("user", "assistant") * 2)]

    def write(n):
        text = tokenizer.apply_chat_template(messages[:n], chat_template=FIXED_DATE + tokenizer.get_chat_template(),
                                             tokenize=False, add_generation_prompt=n % 2 == 1)
        parts = re.split("\ue000(\\d+)\ue001", text)
        if parts[1::2] != [str(i) for i in range(n)]:
            raise ValueError("the chat template does not show every message once and in order")
        return parts[::2]
    try:
        (before, _, between, opening, after), prompt = write(4), write(3)[-1]
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a dialogue of user and assistant: {error}") from None
    if opening.rstrip() == prompt.rstrip():
        opening = prompt  # white space in front of a turn is for the agent to write, or not
    else:
        print(f"note: the chat template asks for a turn with {prompt!r} but writes one with {opening!r}: using this")
    parts = (before, opening, between.lstrip(), after.lstrip() or between.lstrip())
    before, opening, between, after = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    if not after or after[0] not in control:
        raise ValueError("the chat template ends an agent's turn without a control token that could stop sampling")
    if between[:1] != after[:1] and not {*between[:1]} & {*opening[:1]} & (control - {*before[:2]}):
        raise ValueError("the chat template ends an agent's earlier turns in another way than its last one")
    return before, opening, between, after[0]


@functools.lru_cache(maxsize=8)
def _text_tokenizer(tokenizer):
    """A copy that takes no text for a control token, neither for a special one nor for one like <think>."""
    plain = copy.deepcopy(tokenizer)
    plain.add_tokens([AddedToken(str(t), special=True) for t in tokenizer.added_tokens_decoder.values()], True)
    return plain


@functools.lru_cache(maxsize=8)
def known_ids(tokenizer):
    """The ids of all tokens. A vocabulary may have gaps, and a model's logits may go on behind it."""
    return frozenset(tokenizer.get_vocab().values())


@functools.lru_cache(maxsize=2 ** 16)
def encode_text(tokenizer, text):
    """Token ids of a message's text. What looks like a control token is encoded as text: nobody can forge a turn."""
    return tuple(_text_tokenizer(tokenizer)(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def end_of_turn(tokenizer):
    """The id of the token that the chat template writes right after an agent's turn."""
    return _scaffold(tokenizer)[-1]


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer):
    """The ids of all special tokens but the end of a turn: they have no place in a turn."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted((added | set(tokenizer.all_special_ids)) - {end_of_turn(tokenizer)})


def action_tokens(tokenizer, message):
    """The token ids of an agent's turn: those that were sampled (`output_ids`), as they are, or else its text and the
    end of turn."""
    ids = message.get("output_ids")
    return list(encode_text(tokenizer, message["content"])) + [end_of_turn(tokenizer)] if ids is None else list(ids)


def render(tokenizer, messages, reference=None):
    """Messages of user and assistant in turn, as a model reads them: (input_ids, turn_ids), lists of the same length.

    turn_ids is 0 on context and k on the tokens that the agent produced in its k-th turn, the end-of-turn token
    included. A turn sampled by us carries `output_ids`: exactly those tokens are used (text does not always encode to
    the tokens it came from), and where they stop without an end-of-turn token the template's own one is context, not
    the agent's. With messages that end in a user turn, the ids end where the agent's next turn begins. With a
    reference, the first message starts with `REFERENCE_PREFIX`: the critic's view; the ids of the turns do not
    change. The past is never rewritten, even by templates that would (drop its reasoning, end it in another way): what
    the agent read and wrote stays, so that the ids of a dialogue's beginning are the beginning of its ids. ValueError
    where a template cannot be used so.
    """
    before, opening, between, eot = _scaffold(tokenizer)
    input_ids, turn_ids = list(before), [0] * len(before)
    for i, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise ValueError(f"message {i + 1} is of {message['role']!r}; expected user and assistant in turn")
        if i % 2:
            ids, turn = action_tokens(tokenizer, message), i // 2 + 1
            after = [] if i == len(messages) - 1 else between[1:] if ids[-1:] == [eot] else between
        else:
            prefix = REFERENCE_PREFIX.format(reference=reference) if reference is not None and i == 0 else ""
            ids = encode_text(tokenizer, prefix) + encode_text(tokenizer, message["content"])
            after, turn = opening, 0
        input_ids += [*ids, *after]
        turn_ids += [turn] * len(ids) + [0] * len(after)
    return input_ids, turn_ids


# ------------------------------------------------------------------ reward

FENCE = re.compile(r"^ {0,3}(```+|~~~+)[ \t]*(?![ \t])([\w+-]*)(?![\w+-])[^\n`]*\n(.*?)(?:^ {0,3}\1[`~]*[ \t]*$|\Z)",
                   re.M | re.S)
_REPORTS = {}  # what each (program, calls) gave: policies repeat their answers, and every answer needs its reference


def extract_code(answer):
    """The program in an answer: its fenced Markdown blocks (those marked as Python, if some are), or all of it."""
    answer = answer.lstrip("\ufeff").replace("\r\n", "\n")
    blocks = [(kind.lower(), textwrap.dedent(body) if body.lstrip("\n")[0] in " \t" else body)  # dedent changes strings
              for _, kind, body in FENCE.findall(answer) if body.strip()]
    python = [body for kind, body in blocks if kind in ("python", "py", "python3", "py3", "ipython", "code")]
    code = "\n".join(python or [body for kind, body in blocks if not kind])
    return code or re.sub(r"(?m)^ {0,3}(```|~~~).*$", "", answer)


def grade(answers, tasks, call_seconds=1.0, answer_seconds=10.0, workers=None):
    """The reward of each answer: the share of its task's test calls whose value equals the reference's, as Python's ==
    sees it (1 == 1.0 == True, a tuple is not a list; NaN equals NaN; None never counts). Success means 1.0.

    Each call sees fresh definitions, the same random and hash seeds for reference and answer, and an empty scratch
    folder; call_seconds and answer_seconds limit a call and an answer. What has run once is not run again.
    machinery/sandbox.py runs the programs and says what is contained and what is not: in short, with bubblewrap neither
    your files nor the network are in reach, without it both are. A reference that fails on a call is reported on
    stderr; no answer can pass that call. ValueError when there is not one task for each answer.
    """
    if len(answers) != len(tasks):
        raise ValueError(f"{len(answers)} answers to {len(tasks)} tasks: grade wants one task for each answer")

    def job(source, task):
        return source, tuple(task.test_cases.values()), call_seconds, answer_seconds
    wanted = [(job(task.ground_truth, task), job(extract_code(answer), task)) for answer, task in zip(answers, tasks)]
    new = [key for key in dict.fromkeys(key for pair in wanted for key in pair) if key not in _REPORTS]
    _REPORTS.update(zip(new, sandbox.run([key[:2] for key in new], call_seconds, answer_seconds, workers)))
    tasks_of = {reference: task for (reference, _), task in zip(wanted, tasks)}
    for reference in tasks_of.keys() & set(new):
        for (name, call), report in zip(tasks_of[reference].test_cases.items(), _REPORTS[reference]):
            if report[0] == "!":
                print(f"{tasks_of[reference].where}: broken task: its reference fails on {name}, {call}: {report[1:]}",
                      file=sys.stderr)
    pairs = [list(zip(_REPORTS[reference], _REPORTS[answer])) for reference, answer in wanted]
    for key in [key for key in new if "!out" in str(_REPORTS[key])] + list(_REPORTS)[:-100_000]:
        _REPORTS.pop(key, None)  # what ran out of time may do better another time; and the oldest
    return [sum(a == b and a[0] != "!" for a, b in pair) / max(1, len(pair)) for pair in pairs]
