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
import itertools
from dataclasses import dataclass, field

from machinery import sandbox, schema
from machinery.answers import answers_in_code as answers_in_code
from machinery.files import InputError as InputError
from machinery.files import clean, note
from machinery.program import extract_code as extract_code
from machinery.sandbox import failed
from machinery.template import control_tokens as control_tokens
from machinery.template import encode_text, end_of_turn, in_front_of_user, known_ids, scaffold

ANSWER_MARKER = "I WANT TO ANSWER:"
REFERENCE_PREFIX = "In light that the final answer is: {reference}.\n"  # how the critic reads c: a data format
INSTRUCTIONS = (
    "You are helping a person who needs a piece of work done but has described it only roughly. In each of your turns, "
    "ask one short question about what is missing, or, once you know enough, write \"" + ANSWER_MARKER + "\" followed "
    "by the complete result. You have {max_turns} turns at most, and the answer takes one of them.\n\n")
LAST_TURN = " This is your last turn: please send me the complete result now."


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

    @property
    def system(self):
        """The text of a system message, "" if there is none."""
        return self.extra.get("system") or ""

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
            read = ("role", "content", "system", "output_ids")
            history.append({key: message[key] for key in read if message.get(key) is not None})
        yield {
            "task": Task.from_record(record["task"], where).to_record(),
            "dialogue_history": schema.fold(history),
            "reward": float(record["reward"]),
            "where": where,
        }


# ------------------------------------------------------------------ dialogue

class DialogueEnv:
    """One dialogue. The answer counts as a turn; a dialogue that runs out of turns is graded on its last one.

    Two departures from the paper's protocol, for models that keep to it badly: answer_on_code, a turn that defines
    what the task's tests call is the answer (see `answers_in_code`); last_turn_notice, the human's last reply ends
    with LAST_TURN.

    >>> env = DialogueEnv(max_turns=10)
    >>> messages = env.reset(task)              # [{"role": "user", "content": instructions and request}]
    >>> while not env.step(agent(messages)):    # True when the agent answers or has no turn left
    ...     messages = env.observe(human(messages))
    >>> env.answer
    """

    def __init__(self, max_turns=10, instructions=INSTRUCTIONS, answer_on_code=False, last_turn_notice=False):
        self.max_turns = max_turns
        self.answer_on_code = answer_on_code
        self.last_turn_notice = last_turn_notice
        self.instructions = instructions.replace("{max_turns}", str(max_turns))

    def reset(self, task):
        self.task = task
        self.answer = None
        self.turns = 0
        request = clean(self.instructions + task.problem_description)
        self.messages = [{"role": "user", "content": request}]
        if task.system:
            self.messages[0]["system"] = clean(task.system)
        return self.messages

    def step(self, action, in_code=False, **extra):
        """Append the agent's turn (in_code: it is the answer, marker or not, and kept as such; extra: output_ids and
        the like, kept with the message). True when the dialogue is over."""
        if self.answer is not None or self.messages[-1]["role"] != "user":
            raise ValueError("step() needs a human's message to respond to: call reset() or observe() first")
        self.messages.append({"role": "assistant", "content": action, **extra})
        self.turns += 1
        self.in_code = in_code
        if ANSWER_MARKER in action or in_code or self.turns >= self.max_turns:
            self.answer = action.split(ANSWER_MARKER, 1)[-1].strip()
        return self.answer is not None

    def stop(self):
        """End where no turn fits into the model's context any more: the last one is graded."""
        self.messages.pop()  # the reply
        self.answer = self.messages[-1]["content"].strip()

    def observe(self, reply):
        """Append the human's reply and return what the agent sees next."""
        if self.last_turn_notice and self.turns == self.max_turns - 1:
            reply += LAST_TURN
        self.messages.append({"role": "user", "content": clean(reply)})
        return self.messages


# ------------------------------------------------------------------ render

def action_tokens(tokenizer, message):
    """The token ids of an agent's turn: those that were sampled (`output_ids`), as they are, or else its text and the
    end of turn."""
    sampled = message.get("output_ids")
    if sampled is not None:
        return list(sampled)
    return [*encode_text(tokenizer, message["content"]), end_of_turn(tokenizer)]


def render(tokenizer, messages, reference=None):
    """Messages of user and assistant in turn, as a model reads them: (input_ids, turn_ids), lists of the same length.
    A system message may stand in front (or be the first message's field `system`).

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
    # what the template writes: .first and .later, (control ids, text) before the human's first and each later message;
    # .opening, before the agent's turn; .end, the id that ends it
    around = scaffold(tokenizer)
    messages = schema.fold(messages)
    input_ids, turn_ids = [], []
    ended = False  # did the agent end its turn?
    for i, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise ValueError(f"message {i + 1} is of {message['role']!r}; expected user and assistant in turn")
        if message["role"] == "assistant":
            ids = action_tokens(tokenizer, message)
            turn = i // 2 + 1
            ended = ids[-1:] == [around.end]
        else:
            control, front = around.first if i == 0 else around.later
            if ended:  # the agent wrote the end token itself, and `later` begins with it
                control = control[1:]
            if i == 0 and message.get("system"):
                control, front = in_front_of_user(tokenizer, message["system"])
            if i == 0 and reference is not None:
                front += REFERENCE_PREFIX.format(reference=reference)
            text = encode_text(tokenizer, front + message["content"] + around.opening.text)
            ids = [*control, *text, *around.opening.ids]
            turn = 0
        input_ids += ids
        turn_ids += [turn] * len(ids)
    return input_ids, turn_ids


# ------------------------------------------------------------------ reward

class Grader:
    """The reward of each answer: the share of its task's test calls whose value equals the reference's, as Python's ==
    sees it (1 == 1.0 == True, a tuple is not a list; NaN equals NaN; None never counts). Success means 1.0.

    >>> grader = Grader(call_seconds=1.0)
    >>> rewards = grader(answers, tasks)    # ValueError when there is not one task for each answer

    The program in an answer is found as a person would find it (machinery/program.py): fences, prose and drafts cost
    nothing. A statement at its top level that fails or does not end (an example, a wait for input) is left out, except
    for a `raise`.

    Each call sees fresh definitions, the same random and hash seeds for reference and answer, and an empty scratch
    folder; call_seconds and answer_seconds limit a call and an answer. What a grader has run once it does not run
    again: policies repeat their answers, and every answer needs its reference. machinery/sandbox.py runs the programs
    and says what is contained and what is not: in short, with bubblewrap neither your files nor the network are in
    reach, without it both are. A reference that fails on a call is reported on stderr; no answer can pass that call.
    """

    def __init__(self, call_seconds=1.0, answer_seconds=10.0, workers=None):
        self.limits = call_seconds, answer_seconds, workers
        self.reports = {}  # what each (source, calls) gave

    def __call__(self, answers, tasks):
        if len(answers) != len(tasks):
            raise ValueError(f"{len(answers)} answers to {len(tasks)} tasks: grade wants one task for each answer")

        # 1. the programs: each answer and its reference, on the task's calls
        pairs = []
        for answer, task in zip(answers, tasks):
            calls = tuple(task.test_cases.values())
            pairs.append(((task.ground_truth, calls), (answer, calls)))

        # 2. run those that have not run before
        new = []
        for program in dict.fromkeys(itertools.chain.from_iterable(pairs)):
            if program not in self.reports:
                new.append(program)
        self.reports.update(zip(new, sandbox.run(new, *self.limits)))
        for (reference, _), task in dict(zip(pairs, tasks)).items():  # each pair once
            if reference in new:
                warn_of_failures(task, self.reports[reference])

        # 3. compare, call by call
        rewards = []
        for reference, answer in pairs:
            calls = list(zip(self.reports[reference], self.reports[answer]))
            passed = [wanted == found and not failed(wanted) for wanted, found in calls]
            rewards.append(sum(passed) / max(1, len(calls)))

        # 4. forget what ran out of time or memory, which may do better another time, and what is oldest
        for program in new:
            if any(report.startswith("!out") for report in self.reports[program]):
                del self.reports[program]
        for program in list(self.reports)[:-100_000]:
            del self.reports[program]
        return rewards


def grade(answers, tasks, **limits):
    """The rewards by a `Grader` that remembers nothing. limits: call_seconds, answer_seconds, workers."""
    return Grader(**limits)(answers, tasks)


def warn_of_failures(task, reports):
    """Say on which calls a reference fails."""
    for (name, call), report in zip(task.test_cases.items(), reports):
        if failed(report):
            note(f"{task.where}: broken task: its reference fails on {name}, {call}: {report[1:]}")
