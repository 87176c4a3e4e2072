"""What a record of each kind holds: one schema a kind, for every reader of files.

A schema is written like the JSON that it describes. An object is a dict of its fields (a name that ends in "?" may be
absent or null; fields that are not named are allowed); a list is a list of one schema, which holds for every item; a
single value is a `Rule`. A tuple means that several schemas hold, one after the other; a function gives the schema
for a value. `read_records` reads a file of such records; the first fault is an InputError, one line that names file,
line and field, and what was expected.

Place in the data flow: between the files and everybody who reads them (env.py, actor.py, sweet.py, report.py).
Exercised by `python -m pytest tests/test_records.py`.
"""
from dataclasses import dataclass
from typing import Callable

from machinery.files import InputError, read_jsonl


@dataclass(frozen=True)
class Rule:
    """What is said of a value of which `holds` is not true."""
    fault: str
    holds: Callable


def check(value, schema, where):
    """InputError unless the value keeps to the schema. where: file, line and field, for the message."""
    if isinstance(schema, Rule):
        if not schema.holds(value):
            raise InputError(f"{where} {schema.fault}; it is {value!r:.60}")
    elif isinstance(schema, tuple):
        for part in schema:
            check(value, part, where)
    elif callable(schema):
        check(value, schema(value), where)
    elif isinstance(schema, list):
        check(value, LIST, where)
        for number, item in enumerate(value, 1):
            check(item, schema[0], f"{where}: item {number}")
    else:
        check(value, OBJECT, where)
        check_fields(value, schema, where)


def check_fields(record, schema, where):
    for name, part in schema.items():
        field = name.removesuffix("?")
        if field != name and record.get(field) is None:
            continue
        if field not in record:
            raise InputError(f"{where}: field '{field}' is missing; found {sorted(record)[:8]}")
        check(record[field], part, f"{where}: field '{field}'")


def read_records(path, schema, name=None):
    """Yield (where, record) of a file of JSON lines, each kept to the schema. where: file and line, for messages about
    the record. name: what a record is called, if a file without any is refused."""
    empty = True
    for number, record in read_jsonl(path):
        where, empty = f"{path}, line {number}", False
        check_fields(record, schema, where)
        yield where, record
    if empty and name:
        raise InputError(f"{path}: holds no {name}; expected one JSON object a line, with {', '.join(schema)}")


# ------------------------------------------------------------------ single values

def is_number(value):
    return type(value) in (int, float)  # not True, which is an int to Python


def fold(messages):
    """Messages without a system message in front: its text is the field `system` of the user's first message, so that
    all turns have the same places with one and without. Trajectories, pairs, evaluations and plays hold the message in
    their files; samples.jsonl, candidates.jsonl and credit.jsonl hold the field."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [{**first, "system": system["content"]}, *rest]


def unfold(messages):
    """The same with the system message in front, as files for others hold it."""
    first, *rest = messages
    if not first.get("system"):
        return messages
    first = dict(first)
    return [{"role": "system", "content": first.pop("system")}, first, *rest]


def in_turn(messages):
    """Whether user and assistant take turns, the user first."""
    return all(message["role"] == ("user", "assistant")[i % 2] for i, message in enumerate(messages))


TURN = Rule("should be a string, or an object with 'content'", lambda value: isinstance(value, dict))
OBJECT = Rule("should be an object", lambda value: isinstance(value, dict))
LIST = Rule("should be a list", lambda value: isinstance(value, list))
STRING = Rule("should be a string", lambda value: isinstance(value, str))
FILLED = Rule("is empty", lambda value: bool(value.strip() if isinstance(value, str) else value))
TEXT = (STRING, FILLED)
NUMBER = Rule("should be a number", is_number)
REWARD = Rule("should be a number from 0 to 1",  # a cosine of 1 may be a little more by rounding
              lambda value: is_number(value) and -1e-6 <= value <= 1 + 1e-6)
COUNT = Rule("should be a whole number from 1 to 1000", lambda value: type(value) is int and 1 <= value <= 1000)
CALLS = Rule("should be an object of names and calls, both strings",
             lambda value: isinstance(value, dict) and all(isinstance(call, str) for call in value.values()))
DIALOGUE = Rule("should be two or more messages, of user and assistant in turn, or these behind a system message",
                lambda messages: len(fold(messages)) >= 2 and in_turn(fold(messages)))
PROMPT = Rule("should be messages of user and assistant in turn, the user's first and last, or these behind a system "
              "message", lambda messages: len(fold(messages)) % 2 == 1 and in_turn(fold(messages)))


def token_ids(known):
    """The rule for token ids. known: the ids that the tokenizer has; None: any."""
    def holds(ids):
        if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
            return False
        return min(ids, default=0) >= 0 and (known is None or known.issuperset(ids))
    return Rule("should be a list of token ids" + (" that the model's tokenizer has" if known else ""), holds)


# ------------------------------------------------------------------ records

def task(optional=("test_cases",)):
    """ColBench's task. optional: whether test_cases may be absent or empty."""
    tests = {"test_cases?": CALLS} if "test_cases" in optional else {"test_cases": (CALLS, FILLED)}
    return {"problem_description": TEXT, "ground_truth": TEXT, **tests, "hidden_information?": STRING,
            "system?": STRING}


def task_key(record):
    """What tells the tasks of records apart: the same request may hide different solutions."""
    return record["task"]["problem_description"], record["task"]["ground_truth"]


def message(known=None):
    return {"role": STRING, "content": STRING, "system?": STRING, "output_ids?": token_ids(known)}


def trajectory(known=None):
    """A graded dialogue."""
    return {"task": task(), "dialogue_history": ([message(known)], DIALOGUE), "reward": REWARD}


def state(*scores):
    """A dialogue that waits for the agent, with candidates for its turn. scores: the numbers that each of them has."""
    candidate = {"content": STRING, "output_ids": token_ids(None), "count?": NUMBER, **dict.fromkeys(scores, NUMBER)}
    return {"task": task(), "messages": ([message()], PROMPT), "candidates": [candidate]}


def outside_state(known=None):
    """The same from elsewhere: a candidate may be a mere text, ids and counts may be missing."""
    candidate = {"content": STRING, "output_ids?": token_ids(known), "count?": COUNT}

    def text_or_more(value):
        return STRING if isinstance(value, str) else (TURN, candidate)
    return {
        "task": task(),
        "messages": ([message(known)], PROMPT),
        "candidates": ([text_or_more], FILLED),
    }


def pair():
    """Two turns after one prompt."""
    turn = ([message()], FILLED)
    return {"prompt": ([message()], PROMPT), "chosen": turn, "rejected": turn}


def evaluation():
    """A graded dialogue of a method, at a way of decoding."""
    return {"method": STRING, "top_p": NUMBER, **trajectory(), "answer?": STRING}
