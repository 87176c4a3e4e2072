"""What went wrong in dialogues, counted while they are played: a method that scores low may be a model that never wrote
the marker, was cut off, or answered in prose, and each of these has another remedy.

Place in the data flow: trajectories of a stage, graded -> `add_faults` -> their field "faults" in trajectories.jsonl
and eval.jsonl -> `tell`, a line for each method, and `table`, for the report. What counts as a program is the grader's
own notion (machinery/answers.py). Exercised by `python -m pytest tests/test_faults.py`.
"""
from collections import Counter

from env import ANSWER_MARKER, Grader, Task
from machinery.answers import programs
from machinery.bars import note
from machinery.sandbox import failed
from simulator import shows_code

KINDS = {  # of dialogues, then of turns and replies in them
    "no_marker": "without the marker",
    "no_program": "no program",
    "no_function": "a program without the function",
    "overran": "ended where the context was full",
    "cut": "agent turns cut at the token limit",
    "leaks": "replies with code of the reference",
}
CAPTION = ("Counted over all ways of decoding. Dialogues: no marker at the end; no program in the answer that "
           "compiles; no function in it of the name that the tests call; overran: ended where the model's context was "
           "full. Agent turns: cut at the token limit. Replies: leaks, with code of the reference.")


def ran(grade, answer, task):
    """Whether a call of an answer gave a value when a Grader graded it; False if that is not remembered."""
    reports = grade.reports.get((answer, tuple(task.test_cases.values())), ()) if isinstance(grade, Grader) else ()
    return not all(map(failed, reports))


def add_faults(trajectories, end, cfg, grade=None):
    """Add "faults", {kind: how often}, to each trajectory. end: the id of the end of a turn; cfg: a Rollout; grade:
    what gave the rewards, and knows of most answers that their function is there, so that few run once more."""
    tasks = [Task.from_record(trajectory["task"]) for trajectory in trajectories]
    kinds = ["function"] * len(tasks)  # where a test is passed, there is one
    unknown = []
    for i, (trajectory, task) in enumerate(zip(trajectories, tasks)):
        if task.test_cases and not trajectory["reward"] and not ran(grade, trajectory["answer"], task):
            unknown.append(i)
    found = programs([trajectories[i]["answer"] for i in unknown], [tasks[i] for i in unknown], cfg.call_seconds)
    for i, kind in zip(unknown, found):
        kinds[i] = kind
    for trajectory, task, kind in zip(trajectories, tasks, kinds):
        history = trajectory["dialogue_history"]
        turns = [message["output_ids"] for message in history[1::2]]
        silent = ANSWER_MARKER not in history[-1]["content"]
        in_code = cfg.answer_on_code and kind == "function"
        faults = {
            "no_marker": silent,
            "no_program": kind == "",
            "no_function": kind == "program",
            "overran": silent and not in_code and len(turns) < cfg.max_turns,
            "cut": sum(len(ids) >= cfg.max_tokens and ids[-1] != end for ids in turns),
            "leaks": sum(shows_code(message["content"], task) for message in history[2::2]),
        }
        # all kinds in all records: a reader that takes the fields of the first ones for those of all finds no other
        trajectory["faults"] = {name: int(count) for name, count in faults.items()}
    return trajectories


def total(records):
    counts = Counter()
    for record in records:
        counts.update(record["faults"])
    return counts


def by_method(records, default=""):
    """{method: those of its records whose faults were counted}."""
    found = {}
    for record in records:
        if "faults" in record:
            found.setdefault(record.get("method", default), []).append(record)
    return found


def tell(stage, records):
    """Say what went wrong, in a line for each method."""
    for method, found in by_method(records).items():
        counts = total(found)
        said = ", ".join(f"{counts[kind]} {words}" for kind, words in KINDS.items() if counts[kind])
        name = ", ".join(filter(None, (stage, method)))
        note(f"{name}: {len(found)} dialogues; {said or 'nothing went wrong'}")


def table(records):
    """[(caption, header, rows)] of the same, none where nothing was counted."""
    rows = []
    for method, found in by_method(records).items():
        counts = total(found)
        numbers = [len(found), *(counts[kind] for kind in KINDS)]
        rows.append([method, *map(str, numbers)])
    header = ["what went wrong", "dialogues", *(kind.replace("_", " ") for kind in KINDS)]
    return [(CAPTION, header, rows)] if rows else []
