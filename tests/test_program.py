"""How a program is found in an answer: every way that we know to wrap it, and what must not be found."""
import json
import time
from pathlib import Path

import pytest

import env
from env import Task, grade
from machinery.program import find_program
from tests.programs import PROGRAMS, RIGHT

pytestmark = pytest.mark.slow

COLBENCH = Path(__file__).resolve().parent.parent.parent / "shared" / "colbench" / "backend.jsonl"
SQUARE = Task("p", RIGHT, {f"test{x}": f"f({x})" for x in range(4)})
WRONG = "def f(x):\n    return [x, x + x]\n"
BROKEN = "def f(x)\n    return [x, x * x]\n"


def indented(text, by):
    return "".join(by + line if line.strip() else line for line in text.splitlines(keepends=True))


def prompts(code):
    """A session of the interpreter."""
    lines = code.splitlines(keepends=True)
    return "".join((">>> " if line[:1].strip() else "... ") + line for line in lines)


WRAPS = {  # {name: an answer that holds a program, given its text, which ends in a line break}
    "bare": lambda c: c,
    "carriage returns": lambda c: f"Sure:\n```python\n{c}```\nBye!\n".replace("\n", "\r\n"),
    "fenced": lambda c: f"Sure!\n```python\n{c}```\nIt works.",
    "tildes": lambda c: f"~~~\n{c}~~~",
    "tildes and words": lambda c: f"This one:~~~ python\n{c}~~~ That is all",
    "four backticks": lambda c: f"````python\n{c}````",
    "closed by another fence": lambda c: f"Look: ```python\n{c}~~~~\nthe end of it",
    "py3": lambda c: f"```py3\n{c}```",
    "Python 3": lambda c: f"```Python 3\n{c}```",
    "pandoc": lambda c: f"```{{.python .numberLines}}\n{c}```",
    "title": lambda c: f'```python title="x.py" linenums="1"\n{c}```',
    "title behind prose": lambda c: f'Here: ```python title="x.py" linenums="1"\n{c}```\n',
    "unknown language": lambda c: f"```sage\n{c}```",
    "fence behind prose": lambda c: f"The function is: ```python\n{c}```",
    "fence behind prose, prose after": lambda c: f"The function is:```\n{c}```\nIt's what you asked for, isn't it?",
    "fence behind prose twice": lambda c: f"First: ```\npip install numpy\n```\nThen: ```python\n{c}```\nDone.",
    "closed behind the code": lambda c: f"```python\n{c.rstrip()}```",
    "closed behind the code, words": lambda c: f"```python\n{c.rstrip()}``` Hope this helps!",
    "closed with words": lambda c: f"```python\n{c}``` Hope this helps\nLet me know if it doesn't.",
    "code behind the fence": lambda c: f"```{c}```",
    "opened before the marker": lambda c: f"{c}```\nThis works because squares are products.",
    "opened before the marker, said": lambda c: f"Here is the function:\n{c}```\n\nThis works.\n\nEnjoy!",
    "opened before the marker, an example": lambda c: f"{c}```\nUse it so:\n```python\nprint('done')\n```\nBye now.",
    "opened before the marker, two": lambda c: f"{c}```\nOutput:\n```\n[1, 2]\n```\nNote:\n```\npip install it\n```",
    "never closed": lambda c: f"Sure, here you are: ```python\n{c}",
    "never closed, deep": lambda c: f"1. Do it:\n\n      ```python\n{indented(c, '      ')}",
    "an empty fence first": lambda c: f"```\n```\n```python\n{c}```",
    "an empty fence behind prose": lambda c: f"So: ```python\n```\nI mean: ```python\n{c}```",
    "in a list": lambda c: f"- so:\n  ```python\n{indented(c, '  ')}  ```\n- that's it",
    "behind a bullet": lambda c: f"- ```python\n{indented(c, '  ')}  ```\n",
    "deep in a list": lambda c: f"1. a\n   - b\n     - so:\n       ```python\n{indented(c, '       ')}       ```\n",
    "tabs": lambda c: f"*\tso:\n\n\t\t```\n{indented(c, chr(9) * 2)}\t\t```\n",
    "indented": lambda c: f"Here is what you asked for:\n\n{indented(c, '    ')}\nThat is all.",
    "quoted": lambda c: f"{indented(c, '> ')}",
    "quoted, fenced": lambda c: f"I said:\n\n{indented(f'```python{chr(10)}{c}```', '> ')}\n\nand mean it",
    "quoted twice": lambda c: indented(f"Again:\n```\n{c}```", "> > "),
    "prose around": lambda c: f"Here is the function:\n\n{c}\nThis works because `f(x)` calls it's own helper.",
    "much prose around": lambda c: (f"Sure! I'd do it like this.\n\n**Solution**:\n\n{c}\n---\n\nExplanation:\n"
                                    "- it takes `x`: a number\n1. then it squares\n\nTime complexity: O(n).\n\nEnjoy!"),
    "prose with inline code": lambda c: f"`f(x)` is what you want, with `x = 3`:\n```python\n{c}```\nSee `f(3)`?",
    "tags": lambda c: f"<answer>\n{c}</answer>",
    "more tags": lambda c: f'<p>So:</p>\n<pre><code class="language-python">{c}</code></pre>\nGood luck with it.',
    "thoughts": lambda c: f"<think>A loop, or not?\n{BROKEN}</think>\nThe function:\n{c}",
    "a session": prompts,
    "a session, fenced": lambda c: f"Try this:\n```pycon\n{prompts(c)}```",
    "other blocks": lambda c: (f"```bash\npip install squares\n```\n```json\n{{\"a\": true}}\n```\n"
                               f"so: ```python\n{c}```\n```text\nOutput: [1, 1]\n```\n```\n[2, 4]\n```"),
    "draft": lambda c: f"```python\n{BROKEN}```\nSorry:\n```python\n{c}```",
    "draft, no language": lambda c: f"```\n{BROKEN}```\nSorry:\n```\n{c}```\nBetter.",
    "two drafts": lambda c: f"```python\n{BROKEN}```\nor\n```python\ndef f(:\n```\nno:\n```python\n{c}```",
    "draft after": lambda c: f"```python\n{c}```\nnot:\n```python\n{BROKEN}```",
    "a second version": lambda c: f"```python\n{WRONG}```\nNo, rather:\n```python\n{c}```",
    "an example that does not compile": lambda c: f"```python\n{c}```\nThen:\n```python\nf(<your number>)\n```",
    "an example that fails": lambda c: f"```python\n{c}```\nThen:\n```python\nprint(f(numbers)[0])\n```",
    "an import that fails": lambda c: f"```python\n{c}```\n```python\nfrom your_module import f\nprint(f(3))\n```",
    "an import that fails first": lambda c: f"```python\nimport no_such_module\n```\n```python\n{c}```",
    "an input": lambda c: f"```python\n{c}```\n```python\nn = int(input('n: '))\nprint(f(n))\n```",
    "an input first": lambda c: f"n = int(input('n: '))\n{c}print(f(n))\n",
    "an exit": lambda c: f"import sys\n{c}\ndef main():\n    print(f(int(sys.argv[1])))\n\nsys.exit(main())\n",
    "many failures": lambda c: f"x = 1 / 0; y = z\n@wrapped\ndef g(): pass\n{c}assert 0\nprint(y)\nexit()\n[][0]\n",
    "prints": lambda c: f"```python\n{c}```\n```python\nprint('x' * 1000)\n```",
    "no-break spaces": lambda c: f"```python\n{c}```".replace("    ", "\u00a0   "),
    "what nobody sees": lambda c: f"\ufeff```python\n\u200b{c}\u200b```".replace("return", "return\u200b"),
    "a byte order mark": lambda c: f"\ufeff{c}",
}
SOURCES = {  # other ways to define what [x, x * x] comes from
    "def": RIGHT,
    "helper and class": ("import math\n\n\nclass A:\n    def __init__(self, x):\n        self.x = x\n\n"
                         "    def sq(self):\n        return int(math.pow(self.x, 2))\n\n\n"
                         "def f(x):\n    return [x, A(x).sq()]\n"),
    "lambda": "f = lambda x: [x, x * x]\n",
    "decorated": "from functools import lru_cache\n\n@lru_cache(maxsize=None)\ndef f(x):\n    return [x, x * x]\n",
    "fence in a docstring": 'def f(x):\n    """Squares, as in\n```python\nf(2)\n```\n    or\n    ```\n    f(3)\n'
                            '    ```"""\n    return [x, x * x]\n',
    "fence in a string": ('mark = "```"\ndef f(x):\n    # with ``` in front\n    y = mark + "```python"\n'
                          '    return [x, x * x][:len(y)]\n'),
    "tags in strings": 'def f(x):\n    page = "<b>bold</b>" + """\n<p>\nThis is no prose.\n</p>""" + "<td>" * 12\n'
                       "    return [x, x * x] if x <len(page) and len(page) > 30 else page\n",
    "usage below": RIGHT + "\n\nif __name__ == '__main__':\n    print(f(int(input())))\n",
}


def test_every_wrapping_of_every_program_is_right():
    names = [(wrap, source) for wrap in WRAPS for source in SOURCES]
    answers = [WRAPS[wrap](SOURCES[source]) for wrap, source in names]
    rewards = grade(answers, [SQUARE] * len(answers))
    assert [name for name, reward in zip(names, rewards) if reward != 1.0] == []


@pytest.mark.parametrize("example", [
    "while True:\n    pass\n", "import time\ntime.sleep(99)\ntime.sleep(99)\n",
    "print(f(10 ** 8), sum(n for n in iter(int, 1)))\n",
    "def ask():\n    while True:\n        try:\n            return input()\n        except:\n            pass\nask()"])
def test_an_example_that_does_not_end_is_left_out(example):
    start = time.monotonic()
    answers = [RIGHT + example, f"```python\n{RIGHT}```\nand\n```python\n{example}```", f"{example}\n{RIGHT}"]
    assert grade(answers, [SQUARE] * 3, call_seconds=0.8, workers=3) == [1.0] * 3
    assert time.monotonic() - start < 15


def test_an_example_that_does_not_end_stays_left_out_after_a_call_that_does_not_end():
    answer = "def f(x):\n    while x == 1:\n        pass\n    return [x, x * x]\nwhile True:\n    pass\n"
    assert grade([answer], [SQUARE], call_seconds=0.4) == [0.75]


def test_a_first_call_that_does_not_end_costs_only_itself():
    """And nothing of its program is left out: what builds a table, for instance."""
    answer = ("table = {}\nfor x in range(4):\n    table[x] = x * x\ndef f(x):\n    while x == 0:\n        pass\n"
              "    return [x, table[x]]\n")
    start = time.monotonic()
    answers = [answer, "import os\n" + answer]
    assert grade(answers, [SQUARE] * 2, call_seconds=0.5, workers=2) == [0.75] * 2
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("answer", [
    WRONG, f"The function is: ```python\n{WRONG}```", f"```python\n{RIGHT}```\nNo:\n```python\n{WRONG}```",
    f"Here is the function:\n\n{WRONG}\nThis works.", f"{RIGHT}f = lambda x: [x, x + x]\nprint(f(1 / 0))\n"])
def test_the_wrong_stays_wrong(answer):
    assert grade([answer], [SQUARE]) == [0.5]  # right on 0 and 2


@pytest.mark.parametrize("answer", [
    RIGHT + "raise ValueError\n", f"```python\n{RIGHT}raise SystemExit\n```", BROKEN, f"Here: ```\n{BROKEN}```", "",
    "```", "class A:\n    def f(self, x):\n        return [x, x * x]\n", RIGHT + "}\n", f"{RIGHT}def g(:\n    pass\n",
    *(f"So:\n```python\n{PROGRAMS[name][1]}```\n``` the end"
      for name in ("null_byte", "surrogate_in_source", "deep_source", "deep_parentheses", "raises_at_top"))])
def test_what_is_no_program_is_not_made_one(answer):
    assert grade([answer], [SQUARE]) == [0.0]


def test_what_the_calls_call_decides():
    """Not the first that compiles, and where nothing has all of it, what has most."""
    one, two = "```text\ng = 3\n```\n", "```text\ndef f(x):\n    return x\n\ndef h(x):\n    return x\n```\n"
    assert find_program("def f(x): return 1", ["f(1)"])[0] == "def f(x): return 1"
    source, code = find_program("See: ```a\ng = 1\n```\n```b\ndef h(): pass\n```", ["len(a.b(h(1)))"])
    assert source.split() == ["g", "=", "1", "def", "h():", "pass"]
    assert {"g", "h"} <= set(code.co_names)
    task = Task("p", "def f(x):\n    return x\ndef g(x):\n    return x\n", {"a": "f(1)", "b": "g(1)"})
    assert grade([one + two + "so\n```python\nk = 1\n```"], [task]) == [0.5]
    with pytest.raises(SyntaxError, match="line 1"):
        find_program("nothing to see here", ["f(1)"])


@pytest.mark.parametrize("text", ["```\n" * 20000, "<a>" * 20000, "a-" * 50000, "it's " * 20000,
                                  "def f(x):\n```\n" * 9000, ">" * 50000, " " * 50000 + "x y", "`" * 50000,
                                  "x\n" * 20000, "''' \n```\n" * 9000])
def test_looking_takes_no_time_to_speak_of(text):
    start = time.process_time()
    try:
        find_program(text, ["f(1)"])
    except SyntaxError:
        pass
    assert time.process_time() - start < 5


def test_a_failing_top_level_is_named_where_it_is_why_a_reference_fails(tmp_path, capfd):
    """An example that fails does not break a task."""
    file = tmp_path / "tasks.jsonl"
    records = [Task("p", source, {"a": "f(1)"}).to_record()
               for source in ("f = 1 / 0\n", "def f(x):\n    return 1\n\nf(1 / 0)\n")]
    file.write_text("\n".join(map(json.dumps, records)))
    assert grade(["def f(x):\n    return 1"] * 2, env.load_tasks(file)) == [0.0, 1.0]
    told = [line for line in capfd.readouterr().err.splitlines() if "broken" in line]
    assert told == [f"{file}, line 1: broken task: its reference fails on a, f(1): "
                    "ZeroDivisionError: division by zero (line 1)"]


def test_real_references_are_right_however_they_are_wrapped():
    """Each in one of the ways, all ways in turn."""
    if not COLBENCH.exists():
        pytest.skip(f"the real ColBench tasks are not at {COLBENCH}")
    tasks, wraps = env.load_tasks(COLBENCH), list(WRAPS.values())
    plain = grade([task.ground_truth for task in tasks], tasks)
    answers = [wraps[i % len(wraps)](task.ground_truth + "\n") for i, task in enumerate(tasks)]
    rewards = grade(answers, tasks)
    assert [i for i in range(len(tasks)) if rewards[i] != plain[i]] == []
