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
import itertools
import re
from dataclasses import dataclass, field

from jinja2 import TemplateError
from tokenizers import AddedToken

from machinery import sandbox, schema
from machinery.files import InputError as InputError
from machinery.files import clean, note
from machinery.program import extract_code as extract_code

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
        known = self.extra.get("hidden_information") or ""
        return known if known.strip() else self.ground_truth

    def to_record(self):
        return {
            "problem_description": self.problem_description,
            "ground_truth": self.ground_truth,
            "test_cases": self.test_cases,
            **self.extra,
        }

    @classmethod
    def from_record(cls, record, where="task", optional=("test_cases",)):
        """Read ColBench's record. InputError, naming `where`, when a field is missing, empty or of the wrong
        kind."""
        schema.check(record, schema.task(optional), where)
        extra = dict(record)
        request = extra.pop("problem_description")
        reference = extra.pop("ground_truth")
        test_cases = extra.pop("test_cases", None) or {}
        return cls(request, reference, test_cases, extra, where)


def load_tasks(path, optional=("test_cases",)):
    """Read a ColBench task file. optional: fields that the task at hand can do without (a file of web pages has no
    test_cases). InputError on a missing file or field, a broken line, or no task at all."""
    records = schema.read_records(path, schema.task(optional), "task")
    return [Task.from_record(record, where, optional) for where, record in records]


def read_trajectories(path, tokenizer=None):
    """Yield ColBench's offline dialogues one at a time, without what this project does not read (the prompt that is
    repeated with every turn is most of such a file). InputError on what is no graded dialogue, or whose ids are not
    the tokenizer's."""
    known = None if tokenizer is None else known_ids(tokenizer)
    for where, record in schema.read_records(path, schema.trajectory(known), "dialogue"):
        history = []
        for message in record["dialogue_history"]:
            read = ("role", "content", "output_ids")
            history.append({key: message[key] for key in read if message.get(key) is not None})
        yield {
            "task": Task.from_record(record["task"], where).to_record(),
            "dialogue_history": history,
            "reward": float(record["reward"]),
            "where": where,
        }


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
        self.max_turns = max_turns
        self.instructions = instructions.replace("{max_turns}", str(max_turns))

    def reset(self, task):
        self.task = task
        self.answer = None
        self.turns = 0
        request = clean(self.instructions + task.problem_description)
        self.messages = [{"role": "user", "content": request}]
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
        self.messages.append({"role": "user", "content": clean(reply)})
        return self.messages


# ------------------------------------------------------------------ render

# Templates that write today's date write this one: the ids of a dialogue must be the same tomorrow.
FIXED_DATE = ('{% macro strftime_now(form) %}{{ form.replace("%d", "26").replace("%b", "Jul").replace("%B", "July")'
              '.replace("%m", "07").replace("%Y", "2024") }}{% endmacro %}{{ "" }}')


@functools.lru_cache(maxsize=8)
def _scaffold(tokenizer):
    """What the chat template writes around messages: before the first one (token ids, text), from the human's to the
    agent's turn (text, token ids), from the agent's to the human's (token ids, text), and the id of the end of an
    agent's turn. The texts stand next to the human's message, up to a control token, and are encoded with it.

    The template is rendered once, on two turns with a placeholder for each content, so contents can never be mistaken
    for template, nor be trimmed or stripped by it. From the human's to the agent's turn is taken at the last turn,
    because that is what the agent reads when it speaks: some templates write earlier turns in another way.
    """
    messages = []
    for i in range(4):
        messages.append({"role": ("user", "assistant")[i % 2], "content": f"\ue000{i}\ue001"})

    def pieces(n_messages):
        """What the template writes before, between and after the first messages."""
        text = tokenizer.apply_chat_template(
            messages[:n_messages],
            chat_template=FIXED_DATE + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=n_messages % 2 == 1)
        parts = re.split("\ue000(\\d+)\ue001", text)
        found, placeholders = parts[::2], parts[1::2]
        if placeholders != [str(i) for i in range(n_messages)]:
            raise ValueError("the chat template does not show every message once and in order")
        return found
    try:
        before, _, between, opening, after = pieces(4)
        prompt = pieces(3)[-1]
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a dialogue of user and assistant: {error}") from None
    if opening.rstrip() == prompt.rstrip():
        opening = prompt  # white space in front of a turn is for the agent to write, or not
    else:
        note(f"note: the chat template asks for a turn with {prompt!r} but writes one with {opening!r}: using this")
    between = between.lstrip()
    after = after.lstrip() or between

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)
    _check_ends(tokenizer, encode(before), encode(opening), encode(between), encode(after))
    _, end = _control_span(tokenizer, before)
    before = encode(before[:end]), before[end:]
    start, _ = _control_span(tokenizer, opening)
    opening = opening[:start], encode(opening[start:])
    _, end = _control_span(tokenizer, between)
    between = encode(between[:end]), between[end:]
    return before, opening, between, encode(after)[0]


def _check_ends(tokenizer, before, opening, between, after):
    """ValueError unless the template's pieces, as token ids, say where the agent's turns end."""
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    if not after or after[0] not in control:
        raise ValueError("the chat template ends an agent's turn without a control token that could stop sampling")
    if between[:1] == after[:1]:  # earlier turns end as the last one does
        return
    # or they have no end of their own, and the control token that begins every message ends them
    begins_a_message = between and between[:1] == opening[:1] and between[0] in control
    if not begins_a_message or between[0] in before[:2]:
        raise ValueError("the chat template ends an agent's earlier turns in another way than its last one")


def _control_span(tokenizer, piece):
    """Where the first control token of a piece begins and the last one ends; without one, (its length, 0). White space
    that a control token takes in belongs to it."""
    patterns = []
    for token in sorted(tokenizer.added_tokens_decoder.values(), key=lambda token: -len(token.content)):
        pattern = re.escape(token.content)
        if token.lstrip:
            pattern = r"\s*" + pattern
        if token.rstrip:
            pattern += r"\s*"
        patterns.append(pattern)
    spans = [match.span() for match in re.finditer("|".join(patterns), piece) if match[0]]
    if not spans:
        return len(piece), 0
    return spans[0][0], spans[-1][1]


@functools.lru_cache(maxsize=8)
def _text_tokenizer(tokenizer):
    """A copy that takes no text for a control token, neither for a special one nor for one like <think>."""
    plain = copy.deepcopy(tokenizer)
    control = [AddedToken(str(token), special=True) for token in tokenizer.added_tokens_decoder.values()]
    plain.add_tokens(control, special_tokens=True)
    return plain


@functools.lru_cache(maxsize=8)
def known_ids(tokenizer):
    """The ids of all tokens. A vocabulary may have gaps, and a model's logits may go on behind it."""
    return frozenset(tokenizer.get_vocab().values())


@functools.lru_cache(maxsize=2 ** 16)
def encode_text(tokenizer, text):
    """Token ids of a message's text. What looks like a control token is encoded as text: nobody can forge a turn."""
    encoded = _text_tokenizer(tokenizer)(clean(text), add_special_tokens=False, split_special_tokens=True)
    return tuple(encoded.input_ids)


def end_of_turn(tokenizer):
    """The id of the token that the chat template writes right after an agent's turn."""
    return _scaffold(tokenizer)[-1]


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer):
    """The ids of all special tokens but the end of a turn: they have no place in a turn."""
    control = set(tokenizer.all_special_ids)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            control.add(token_id)
    return sorted(control - {end_of_turn(tokenizer)})


def action_tokens(tokenizer, message):
    """The token ids of an agent's turn: those that were sampled (`output_ids`), as they are, or else its text and the
    end of turn."""
    sampled = message.get("output_ids")
    if sampled is not None:
        return list(sampled)
    return [*encode_text(tokenizer, message["content"]), end_of_turn(tokenizer)]


def render(tokenizer, messages, reference=None):
    """Messages of user and assistant in turn, as a model reads them: (input_ids, turn_ids), lists of the same length.

    turn_ids is 0 on context and k on the tokens that the agent produced in its k-th turn, the end-of-turn token
    included. A turn sampled by us carries `output_ids`: exactly those tokens are used (text does not always encode to
    the tokens it came from), and where they stop without an end-of-turn token the template's own one is context, not
    the agent's. With messages that end in a user turn, the ids end where the agent's next turn begins. With a
    reference, the first message starts with `REFERENCE_PREFIX`: the critic's view; the ids of the turns do not
    change.

    A human's message is encoded as one text with what the template writes next to it: a tokenizer may have one token
    for the template's line break and those that the message begins with. So the ids up to the agent's turn are those
    of the whole text. In front of the agent's turn a token always ends, because sampling begins there.

    The past is never rewritten, even by templates that would (drop its reasoning, end it in another way): what the
    agent read and wrote stays, so that the ids of a dialogue's beginning are the beginning of its ids. ValueError
    where a template cannot be used so.
    """
    before, (back, opening), between, end = _scaffold(tokenizer)
    input_ids, turn_ids = [], []
    ended = False  # did the agent end its turn?
    for i, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise ValueError(f"message {i + 1} is of {message['role']!r}; expected user and assistant in turn")
        if message["role"] == "assistant":
            ids = action_tokens(tokenizer, message)
            turn = i // 2 + 1
            ended = ids[-1:] == [end]
        else:
            head, front = before if i == 0 else between
            if ended:
                head = head[1:]  # without the template's own end of turn
            if i == 0 and reference is not None:
                front += REFERENCE_PREFIX.format(reference=reference)
            ids = [*head, *encode_text(tokenizer, front + message["content"] + back), *opening]
            turn = 0
        input_ids += ids
        turn_ids += [turn] * len(ids)
    return input_ids, turn_ids


# ------------------------------------------------------------------ reward

_REPORTS = {}  # what each (program, calls) gave: policies repeat their answers, and every answer needs its reference


def grade(answers, tasks, call_seconds=1.0, answer_seconds=10.0, workers=None):
    """The reward of each answer: the share of its task's test calls whose value equals the reference's, as Python's ==
    sees it (1 == 1.0 == True, a tuple is not a list; NaN equals NaN; None never counts). Success means 1.0.

    The program in an answer is found as a person would find it (machinery/program.py): fences, prose and drafts cost
    nothing. A statement at its top level that fails or does not end (an example, a wait for input) is left out, except
    for a `raise`.

    Each call sees fresh definitions, the same random and hash seeds for reference and answer, and an empty scratch
    folder; call_seconds and answer_seconds limit a call and an answer. What has run once is not run again.
    machinery/sandbox.py runs the programs and says what is contained and what is not: in short, with bubblewrap neither
    your files nor the network are in reach, without it both are. A reference that fails on a call is reported on
    stderr; no answer can pass that call. ValueError when there is not one task for each answer.
    """
    if len(answers) != len(tasks):
        raise ValueError(f"{len(answers)} answers to {len(tasks)} tasks: grade wants one task for each answer")

    # 1. the programs: each answer and its reference, on the task's calls
    def to_run(source, task):
        return source, tuple(task.test_cases.values()), call_seconds, answer_seconds
    pairs = []
    for answer, task in zip(answers, tasks):
        pairs.append((to_run(task.ground_truth, task), to_run(answer, task)))

    # 2. run those that have not run before
    new = []
    for program in dict.fromkeys(itertools.chain.from_iterable(pairs)):
        if program not in _REPORTS:
            new.append(program)
    jobs = [(source, calls) for source, calls, _, _ in new]
    _REPORTS.update(zip(new, sandbox.run(jobs, call_seconds, answer_seconds, workers)))
    for (reference, _), task in dict(zip(pairs, tasks)).items():  # each pair once
        if reference in new:
            warn_of_failures(task, _REPORTS[reference])

    # 3. compare, call by call
    rewards = []
    for reference, answer in pairs:
        calls = list(zip(_REPORTS[reference], _REPORTS[answer]))
        passed = [wanted == found and not failed(wanted) for wanted, found in calls]
        rewards.append(sum(passed) / max(1, len(calls)))

    # 4. forget what ran out of time or memory, which may do better another time, and what is oldest
    for program in new:
        if any(report.startswith("!out") for report in _REPORTS[program]):
            del _REPORTS[program]
    for program in list(_REPORTS)[:-100_000]:
        del _REPORTS[program]
    return rewards


def failed(report):
    """Whether a call gave no value: its report is then "!" and what went wrong."""
    return report.startswith("!")


def warn_of_failures(task, reports):
    """Say on which calls a reference fails."""
    for (name, call), report in zip(task.test_cases.items(), reports):
        if failed(report):
            note(f"{task.where}: broken task: its reference fails on {name}, {call}: {report[1:]}")
