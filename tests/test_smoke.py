"""A little of everything that takes long: one run from start to end, ten programs for the grader, one page."""
import json

import pytest
from test_pages import why_not

import sweet as program
from env import Task, grade
from machinery.files import InputError
from worlds import browser

REFERENCE = "def f(x):\n    return 2 * x"
TASK = Task("double", REFERENCE, {"test1": "f(1)", "test2": "f(-3)", "test3": "f('a')", "test4": "f([])"})


def test_one_run_from_start_to_end(tmp_path, capsys):
    """In miniature: every stage leaves its file, and SWEET's pairs are of turns with different advantages."""
    run = tmp_path / "run"
    program.main(["--smoke", "--run", str(run), "--base-documents", "5500", "--rollout-tasks", "30",
                  "--candidates-states", "20", "--eval-tasks", "5", "--credit-states", "6",
                  "--credit-monte-carlo-states", "1", "--rft-epochs", "1"])
    pairs = [json.loads(line) for line in (run / "pairs.jsonl").open(encoding="utf-8")]
    assert pairs and all(pair["advantages"][0] > pair["advantages"][1] for pair in pairs)
    evaluated = [json.loads(line) for line in (run / "eval.jsonl").open(encoding="utf-8")]
    assert len(evaluated) == 4 * 2 * 5
    assert (run / "report.html").stat().st_size > 10_000
    assert "these numbers mean nothing" in capsys.readouterr().out


@pytest.mark.parametrize("answer, reward", [
    (REFERENCE, 1.0),
    ("Here it is:\n```python\ndef f(x):\n    return x + x\n```\nDone.", 1.0),
    ("def f(x):\n    return x * 2\nprint(f(3))\ninput()", 1.0),
    ("import math\ndef double(x):\n    return x + x\ndef f(x):\n    return double(x)", 1.0),
    ("def f(x):\n    return x + 1", 0.25),
    ("def f(x):\n    return [x, x]", 0.0),
    ("def f(x):\n    raise SystemExit", 0.0),
    ("def f(x):\n    while True:\n        pass", 0.0),
    ("def f(x)\n    return 2 * x", 0.0),
    ("", 0.0),
])
def test_ten_programs(answer, reward):
    assert grade([answer], [TASK], call_seconds=0.5) == [reward]


@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
def test_one_page():
    """A red bar with a word, a button below it: what a person sees of it."""
    try:
        page, = browser.Browser().render(["<body style='margin:0'><div style='background:#c00;color:#fff;height:80px'>"
                                      "Shop</div><button>Buy</button></body>"])
    except InputError as error:
        pytest.fail(str(error))
    assert [box["text"] for box in page.boxes] == ["Shop", "Buy"]
    assert page.boxes[0]["back"] == [204, 0, 0] and page.boxes[0]["rect"][3] == 80
