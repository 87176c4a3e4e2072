"""Tasks from functions with doctests: what comes along, what is left out and why, and a model's words."""
import json
from textwrap import dedent

import pytest
from conftest import Proxy

import machinery.server
from env import load_tasks
from worlds import make

pytestmark = pytest.mark.slow

LESSON = '''
import math
import random
import time
from functools import lru_cache as cached

RATE = 0.19


def rounded(x):
    return math.floor(100 * x + 0.5) / 100


def gross(net, *, extra: float = 0):
    """Adds the tax to a price.

    Half a cent is rounded up.

    >>> gross(100)
    119.0
    >>> gross(9.99)
    11.89
    >>> gross(
    ...     -1, extra=2)   # doctest: +ELLIPSIS
    0.8...
    >>> gross("a")
    Traceback (most recent call last):
        ...
    TypeError: can't
    """
    return rounded(net * (1 + RATE) + extra)


@cached
def fib(n):
    """Gives a number of Fibonacci's.

    >>> [fib(n) for n in range(5)]
    [0, 1, 1, 2, 3]
    >>> fib(7)
    13
    >>> fib(2)
    1
    """
    return n if n < 2 else fib(n - 1) + fib(n - 2)


def roll(n):
    """Rolls dice.

    >>> roll(3)  # doctest: +ELLIPSIS
    [...]
    >>> roll(2)  # doctest: +ELLIPSIS
    [...]
    >>> roll(1)  # doctest: +ELLIPSIS
    [...]
    """
    return [random.random() for _ in range(n)]


def later(n):
    """Tells the time.

    >>> later(3)  # doctest: +ELLIPSIS
    1...
    >>> later(4)  # doctest: +ELLIPSIS
    1...
    >>> later(5)  # doctest: +ELLIPSIS
    1...
    """
    return time.time() + n


def mistaken(n):
    """Doubles.

    >>> mistaken(3)
    6
    >>> mistaken(0)
    0
    >>> mistaken(4)
    8
    """
    return n + 3


def few(n):
    """Doubles.

    >>> few(3)
    6
    >>> few(4)
    8
    """
    return 2 * n


def same(n):
    """Is it?

    >>> same(3)
    True
    >>> same(4)
    True
    >>> same(5)
    True
    """
    return n > 0


def copied(values):
    """Copies.

    >>> copied([1])
    [1]
    >>> copied([2])
    [2]
    >>> copied([])
    []
    """
    return list(values)


def prepared(n):
    """Needs a name that only the examples have.

    >>> x = 3
    >>> prepared(x)
    6
    """
    return 2 * n


def wordless(n):
    """>>> wordless(3)
    6
    """
    return 2 * n


if __name__ == "__main__":
    n = 3
    print(fib(n))
'''
REASONS = {
    "roll": "roll(3) has another value each time, or with another random seed",
    "later": "later(3) has another value each time, or with another random seed",
    "mistaken": "mistaken(0) is not 0, as the docstring says",
    "few": "examples that call it and have a value: 2, different values: 2; expected at least 3 and 2",
    "same": "examples that call it and have a value: 3, different values: 1; expected at least 3 and 2",
    "copied": "an answer that returns its first argument passes every test",
    "prepared": "prepared(x) fails: NameError: name 'x' is not defined",
    "wordless": "its docstring begins with an example; expected a line that says what it is for",
}


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    file = tmp_path_factory.mktemp("lesson") / "lesson.py"
    file.write_text(LESSON, encoding="utf-8")
    return file


def test_functions_become_tasks_and_the_others_say_why_not(lesson, capsys, tmp_path):
    make.main(["backend", "--from", str(lesson), "--out", str(tmp_path / "tasks.jsonl")])
    out, err = capsys.readouterr()
    gross, fib = load_tasks(tmp_path / "tasks.jsonl")
    assert "tasks.jsonl: 2 tasks" in out
    assert gross.problem_description == ("Adds the tax to a price. The signature of the function is: "
                                         "def gross(net, *, extra: float=0)")
    assert list(gross.test_cases.values()) == ["gross(100)", "gross(9.99)", "gross(-1, extra=2)"]
    for task, values in ((gross, [119.0, 11.89, 0.81]), (fib, [[0, 1, 1, 2, 3], 13, 1])):
        space = {}
        exec(task.ground_truth, space)  # Python itself, with all that the function needs
        assert [eval(call, space) for call in task.test_cases.values()] == values
    assert "random" not in gross.ground_truth and "@cached" in fib.ground_truth and "print" not in fib.ground_truth
    lines = LESSON.splitlines()
    for name, why in REASONS.items():
        number = lines.index(next(line for line in lines if line.startswith(f"def {name}("))) + 1
        assert f"{lesson}, line {number}: {name}: left out: {why}\n" in err
    assert err.count("left out") == len(REASONS) and "broken task" not in err


def test_a_model_words_the_requests(lesson, tmp_path, monkeypatch, capsys):
    asked = []

    def answer(_, body):
        if not body:
            return {"data": [{"id": "m"}]}
        prompt = json.loads(body)["messages"][0]["content"]
        asked.append(prompt)
        said = "I want `return rounded(net * (1 + RATE) + extra)`." if "gross" in prompt else "Some numbers, please."
        return {"choices": [{"message": {"role": "assistant", "content": said}}]}
    monkeypatch.setattr(machinery.server, "PAUSE", 0.01)
    proxy = Proxy("http://127.0.0.1:9/v1", answer)
    told = tmp_path / "told.txt"
    told.write_text("Ask for this:\n{solution}")
    try:
        make.main(["--from", str(lesson), "--out", str(tmp_path / "tasks.jsonl"), "--human", proxy.url,
                   "--human-prompt", str(told)])
    finally:
        proxy.close()
    fib, = load_tasks(tmp_path / "tasks.jsonl")
    assert fib.problem_description == "Some numbers, please. The signature of the function is: def fib(n)"
    assert f"Ask for this:\n{fib.ground_truth}" in asked and len(asked) == 3  # code is asked for once more
    assert "gross: left out: the model's request is empty, or shows code" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    ([], "--from: expected a file"),
    (["--from", "nowhere.py"], "--from nowhere.py: No such file or directory; expected a Python file"),
    (["--from", "broken.py"], "--from broken.py: invalid syntax (broken.py, line 1); expected a Python file"),
    (["--from", "bare.py"], "--from bare.py: holds no function with examples"),
    (["--from", "poor.py"], "--from poor.py: none of its functions makes a task"),
    (["--from", "poor.py", "--human-model", "m"], "--human-...: expected --human URL"),
    (["--from", "poor.py", "--human", "http://127.0.0.1:9/v1"], "none of its functions"),
    (["frontend", "--from", "bare.py"], "STAGE frontend: expected backend"),
    (["--form", "bare.py"], "--form bare.py: not known; perhaps --from; --help-all shows every flag"),
])
def test_bad_input_is_one_line(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "bare.py").write_text("def f(x):\n    return x\n")
    (tmp_path / "poor.py").write_text(dedent('''
        def f(x):
            """Doubles.

            >>> f(1)
            2
            """
            return 2 * x
        '''))
    with pytest.raises(SystemExit) as stop:
        make.main(words)
    assert said in str(stop.value) and "\n" not in str(stop.value)
