"""Functions with doctests become ColBench tasks: a world of your own in minutes.

    python -m worlds.make backend --from FILE.py [--out tasks.jsonl] [--human http://localhost:8000/v1]

Each function of the file that has examples in its docstring gives one task. The function is the reference c, which the
human and the critic read, with the imports and helpers that it needs. Its examples are the test calls. The agent reads
a request that leaves most of this open: the docstring's first line, or, with --human, what a model asks for when it has
read the function; and the signature behind it, as in ColBench.

A test has to tell right from wrong, each time in the same way. So a function is left out, and a line says why, where an
example fails or has another value than the docstring says, where a value is not the same in a second run with another
random seed, where there are too few examples or values, and where an answer that returns its first argument passes.
Programs run in the grader's sandbox.

Place in the data flow: FILE.py -> tasks.jsonl, for --tasks and --heldout. Exercised by `python -m pytest
tests/test_make.py`.
"""
import ast
import dataclasses
import doctest
import sys
import tokenize
from dataclasses import dataclass
from types import SimpleNamespace

from env import Grader, Task
from machinery import sandbox
from machinery.files import InputError, fill, note, read_prompt, write_lines
from machinery.flags import Flags
from machinery.optional import first_line
from machinery.process import one_line
from machinery.program import CALLED
from machinery.server import Server
from machinery.train import arg, check_values
from simulator import NO_PREFERENCE, EndpointHuman

LEAST_CALLS, LEAST_VALUES = 3, 2
CALL_SECONDS = 1.0  # as for answers
IMPORTS = (ast.Import, ast.ImportFrom)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SIGNATURE = "{request} The signature of the function is: def {name}({arguments})"
FIRST_ARGUMENT = "def {name}(*values, **named):\n    return [*values, *named.values()][0]"
AGAIN = "(__import__('random').seed(1), {call})[1]"
AS_WRITTEN = "doctest.OutputChecker().check_output({want!r}, repr({call}) + '\\n', {flags}) or None"
REQUEST = """You are a person who needs a function and cannot program. It should do exactly what this one does:

{solution}

Ask an assistant for it, in one or two plain sentences. Say roughly what it is for, as people do. Leave the rules, the \
limits and the special cases out: the assistant will ask. Never write code.

Your request:"""


@dataclass(frozen=True)
class Make:
    """Tasks of your own functions."""
    stage: str = "backend"
    """The world that the tasks are for."""
    source: str = arg("", flag="from")
    """Your file of Python functions with doctests."""
    out: str = "tasks.jsonl"
    """The tasks, one a line."""
    human: str = ""
    """URL of a server whose model words the requests; without it: the docstrings' first lines."""
    seed: int = 0
    """Sent to the server at a temperature above 0."""


@dataclass(frozen=True)
class Made:
    """A task, and for each of its calls what the docstring says of the value: (text, doctest's flags)."""
    name: str
    task: Task
    written: tuple


# ------------------------------------------------------------------ from a file to tasks

def read_module(path):
    """(source, statements at the top level) of a Python file. InputError where it is none."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        return source, ast.parse(source, path).body
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"--from {path}: {reason}; expected a Python file") from None


def names_bound(statement):
    """The names that an import, a definition or an assignment binds; of other statements none."""
    if isinstance(statement, IMPORTS):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    if isinstance(statement, DEFINITIONS):
        return {statement.name}
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    return {node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)}


def needed_by(function, statements):
    """The statements that a function needs, and what these need, in their order; the function is one of them."""
    needed = [function]
    for one in needed:  # grows on the way
        used = {node.id for node in ast.walk(one) if isinstance(node, ast.Name)}
        needed += [other for other in statements if other not in needed and used & names_bound(other)]
    return [statement for statement in statements if statement in needed]


def text_of(statement, lines):
    """The source of a statement, its decorators included."""
    first = min(node.lineno for node in [statement, *getattr(statement, "decorator_list", ())])
    return "\n".join(lines[first - 1:statement.end_lineno])


def test_call(example, name):
    """The call in a doctest example, if that is one expression that calls the function and has a value; or ""."""
    valued = example.want.strip() and example.exc_msg is None and doctest.SKIP not in example.options
    if not valued or name not in CALLED.findall(example.source):
        return ""
    try:
        return ast.unparse(ast.parse(example.source.strip(), mode="eval"))
    except SyntaxError:  # a statement
        return ""


def read_functions(path):
    """Yield a Made for each function of a file that has examples. InputError where there is none."""
    source, statements = read_module(path)
    lines, found = source.splitlines(), 0
    for function in statements:
        docstring = ast.get_docstring(function) if isinstance(function, ast.FunctionDef) else None
        if not docstring or ">>> " not in docstring:
            continue
        found += 1
        where = f"{path}, line {function.lineno}: {function.name}"
        try:
            examples = doctest.DocTestParser().get_examples(docstring)
        except ValueError as error:
            note(f"{where}: left out: {first_line(error)}")
            continue
        tests = {test_call(one, function.name): one for one in examples}
        tests.pop("", None)
        request, _, _ = docstring.partition("\n")
        if request.startswith(">>> "):
            note(f"{where}: left out: its docstring begins with an example; expected a line that says what it is for")
            continue
        yield Made(
            function.name,
            Task(
                SIGNATURE.format(request=request, name=function.name, arguments=ast.unparse(function.args)),
                "\n\n".join(text_of(statement, lines) for statement in needed_by(function, statements)),
                {f"test{number}": call for number, call in enumerate(tests, 1)},
                where=where),
            tuple((one.want, sum(flag for flag, on in one.options.items() if on)) for one in tests.values()))
    if not found:
        raise InputError(f"--from {path}: holds no function with examples (>>> f(1)) in its docstring")


# ------------------------------------------------------------------ does a test tell right from wrong?

def job(made):
    """What runs for the checks: each call as it is, with another random seed, and beside what the docstring says."""
    calls = list(made.task.test_cases.values())
    again = [AGAIN.format(call=call) for call in calls]
    as_written = []
    for call, (want, flags) in zip(calls, made.written):
        as_written.append(AS_WRITTEN.format(call=call, want=want, flags=flags))
    return made.task.ground_truth + "\n\nimport doctest, random", (*calls, *again, *as_written)


def fault(made, reports):
    """Why a function makes no task, or "". reports: of the calls of its `job`."""
    calls = list(made.task.test_cases.values())
    n = len(calls)
    values = set(reports[:n])
    for i, call in enumerate(calls):
        first, again, as_written = reports[i::n]
        if sandbox.failed(first):
            return f"{call} fails: {first[1:].removesuffix(' (line None)')}"
        if first != again:
            return f"{call} has another value each time, or with another random seed"
        if sandbox.failed(as_written):
            want, _ = made.written[i]
            return f"{call} is not {first_line(want)}, as the docstring says"
    if n < LEAST_CALLS or len(values) < LEAST_VALUES:
        return (f"examples that call it and have a value: {n}, different values: {len(values)}; expected at least "
                f"{LEAST_CALLS} and {LEAST_VALUES}")
    return ""


def checked(found):
    """The tasks of those functions that make one; for each of the others a line says why not."""
    reports = sandbox.run([job(made) for made in found], CALL_SECONDS, 30 * CALL_SECONDS)
    faults = dict(zip([made.task.where for made in found], map(fault, found, reports)))
    sound = [made for made in found if not faults[made.task.where]]
    tasks, grade = [made.task for made in sound], Grader(CALL_SECONDS)
    right = grade([task.ground_truth for task in tasks], tasks)
    wrong = grade([FIRST_ARGUMENT.format(name=made.name) for made in sound], tasks)
    for task, reference, trivial in zip(tasks, right, wrong):
        if reference < 1.0:
            faults[task.where] = f"its own function passes {reference:.0%} of its tests"
        elif trivial == 1.0:
            faults[task.where] = "an answer that returns its first argument passes every test"
    for where, why in faults.items():
        if why:
            note(f"{where}: left out: {why}")
    return [task for task in tasks if not faults[task.where]]


# ------------------------------------------------------------------ a request in a model's words

class Requester(EndpointHuman):
    """A model that has read the function and asks for it. A request that shows code is asked for once more."""

    def __init__(self, url, cfg, seed):
        super().__init__(url, dataclasses.replace(cfg, prompt=""), seed)
        self.role = read_prompt(cfg.prompt, "--human-prompt", ["solution"]) if cfg.prompt else REQUEST

    def conversation(self, task, dialogue):
        return [{"role": "user", "content": fill(self.role, solution=task.ground_truth)}]


def worded(tasks, url, cfg, seed):
    """The tasks with a model's requests; without those for which it has none. InputError where the server is gone."""
    human = Requester(url, cfg, seed)
    requests = human.reply(tasks, tasks)
    if None in requests:
        raise InputError(f"--human {url}: {human.endpoint.gone}")
    kept = []
    for task, request in zip(tasks, requests):
        if request == NO_PREFERENCE:
            note(f"{task.where}: left out: the model's request is empty, or shows code")
            continue
        _, signature = task.problem_description.rsplit(" The signature of the function is:", 1)
        description = f"{request} The signature of the function is:{signature}"
        kept.append(dataclasses.replace(task, problem_description=description))
    return kept


def main(argv=None):
    options = SimpleNamespace(run="", running="")
    with one_line(options):
        parser = Flags(__doc__, {"common": Make, "human": Server}, program="python -m worlds.make", stage=["backend"])
        options = parser.parse_args(sys.argv[1:] if argv is None else argv)
        said = [name for name in options.given if name.startswith("human.")]
        cfg = Server(**{name.removeprefix("human."): getattr(options, name) for name in said})
        check_values("human", cfg)
        if not options.source:
            raise InputError("--from: expected a file of Python functions with doctests")
        if said and not options.human:
            raise InputError("--human-...: expected --human URL beside it")
        found = list(read_functions(options.source))
        tasks = checked(found)
        if tasks and options.human:
            tasks = worded(tasks, options.human, cfg, options.seed)
        if not tasks:
            raise InputError(f"--from {options.source}: none of its functions makes a task")
        write_lines(options.out, [task.to_record() for task in tasks])
        print(f"{options.out}: {len(tasks)} tasks, of {len(found)} functions with examples")


if __name__ == "__main__":
    main()
