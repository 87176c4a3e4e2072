"""Whether a text holds the program that a task asks for: what counts as an answer without the marker, and what is said
of answers that pass no test.

The grader's own notion of a program (machinery/program.py), and its sandbox. Exercised by `python -m pytest
tests/test_faults.py`.
"""
import itertools
import re

from machinery import sandbox
from machinery.program import CALLED
from machinery.sandbox import failed


def asked_for(task):
    """The names that a task's tests call and its reference defines."""
    called = dict.fromkeys(CALLED.findall("\n".join(task.test_cases.values())))
    defined = r"(?m)\b(?:def|class)\s+(\w+)|^(\w+)\s*="
    names = set(itertools.chain(*re.findall(defined, task.ground_truth)))
    return [name for name in called if name in names]


def programs(texts, tasks, call_seconds=1.0):
    """What the grader finds in each text: "function" where its program defines all that the task asks for, "program"
    where it does not, "" where there is none that compiles. Found where answers run, in the sandbox, each text of a
    task once. call_seconds: as for the grader, which has ten times that for an answer, too."""
    jobs = []
    for text, task in zip(texts, tasks):
        defined = [f"callable({name}) or {name}()" for name in asked_for(task)]  # names what find_program looks for
        jobs.append((text, (*defined, "True")))
    distinct = list(dict.fromkeys(jobs))
    reports = dict(zip(distinct, sandbox.run(distinct, call_seconds, 10 * call_seconds)))
    found = []
    for text, job in zip(texts, jobs):
        *defined, runs = reports[job]
        kind = "program" if any(map(failed, defined)) else "function"
        found.append("" if failed(runs) or not text.strip() else kind)
    return found


def answers_in_code(envs, actions):
    """Whether each action is its dialogue's answer because it defines what the task's tests call (answer_on_code)."""
    may = []
    for i, (env, action) in enumerate(zip(envs, actions)):
        if env.answer_on_code and any(name in action for name in asked_for(env.task)):
            may.append(i)
    found = programs([actions[i] for i in may], [envs[i].task for i in may])
    yes = {i for i, kind in zip(may, found) if kind == "function"}
    return [i in yes for i in range(len(envs))]
