"""Talking to the agent: whole dialogues in the terminal, and clicked through in a real browser."""
import copy
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import free_port, save_model

import actor
import critic
import play
import sweet as program
from env import ANSWER_MARKER, INSTRUCTIONS, Task, grade, read_trajectories
from machinery.files import InputError
from worlds import backend, beside, browser
from worlds.frontend import Frontend

pytestmark = pytest.mark.slow  # most need a run
ROOT = Path(__file__).resolve().parent.parent
PAGES = ["--base-documents", "600", "--base-epochs", "1", "--rollout-tasks", "16", "--rollout-per-task", "6",
         "--critic-epochs", "1", "--candidates-states", "40", "--candidates-n", "6", "--actor-epochs", "1"]
VERDICT = re.compile(r"better than \d+ % of what it could have said|it says nothing else here")
PROMPTS = ("you:", "Enter:")


def sweet(*args, **extra):
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1", **extra.pop("env", {})}
    return subprocess.Popen([sys.executable, str(ROOT / "sweet.py"), *map(str, args)], text=True, env=env, cwd=ROOT,
                            **extra)


def made(folder, *flags):
    process = sweet("actor", "--run", folder, *flags, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said, _ = process.communicate()
    assert process.returncode == 0, said[-2000:]
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A smoke run of the small world: base and SWEET."""
    return made(tmp_path_factory.mktemp("small") / "run", "--smoke")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return made(tmp_path_factory.mktemp("pages") / "run", "--task", "frontend", *PAGES)


@pytest.fixture(scope="module")
def own(small, tmp_path_factory):
    """A model with a chat template, as it is in base, critic and policy, and tasks that the small world does not
    know."""
    folder = tmp_path_factory.mktemp("own")
    for seed, name in enumerate(("model", "run/critic", "run/actor")):
        save_model(folder / name, seed=seed)
    task = {"problem_description": "Add <b>two</b> numbers & {{ '${1 + 1}' }}: def add(a, b)",
            "ground_truth": "def add(a, b):\n    return a + b",
            "test_cases": {"one": "add(1, 2)", "two": "add('a', 'b')", "broken": "add(1)"}}
    (folder / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    return ["--run", folder / "run", "--model", folder / "model", "--tasks", folder / "tasks.jsonl", "--heldout",
            folder / "tasks.jsonl", "--rollout-max-turns", "3"]


@pytest.fixture
def talk(monkeypatch, capsys):
    """talk(flags, lines) -> what the terminal shows."""
    def talk(flags, *lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        program.main(["play", *map(str, flags)])
        return capsys.readouterr().out
    return talk


def plays(folder):
    return list(read_trajectories(folder / "plays.jsonl"))


def run_of(*flags):
    options = program.parser().parse_args(["play", *map(str, flags)])
    return program.Run(options, program.settings_of(options))


def terminal(folder, *flags):
    return ["--smoke", "--run", folder, *flags]


def choices(shown):
    """The offered replies, turn by turn."""
    turns = re.findall(r"((?:^  \d  .*\n)+)", shown, re.M)
    return [re.findall(r"^  \d  (.*)$", turn, re.M) for turn in turns]


# ------------------------------------------------------------------ in the terminal

def test_a_whole_dialogue_in_the_terminal(small, talk):
    """Request, what you have in mind, offers, your own words, last words, verdicts, candidates, tests, plays.jsonl."""
    (small / "plays.jsonl").unlink(missing_ok=True)
    task = run_of(*terminal(small)).held_out()[4]
    shown = talk(terminal(small, "--play-seed", 5), "?", "!", "1", "Whatever you like.", "2", "q")
    record, = plays(small)
    history = record["dialogue_history"]
    assert record["task"] == task.to_record()
    before, _, after = shown.partition("you:   ?\n")
    assert task.problem_description in before and task.ground_truth not in before
    assert after.startswith(task.ground_truth)
    said, replies = history[1::2], history[2::2]
    assert len(VERDICT.findall(shown)) == len(said)
    for message in said:
        assert f"agent: {message['content']}\n" in shown
    offered = choices(shown)
    assert len(offered) == len(replies)
    for k, offers in enumerate(offered):
        heard = [{**message} for message in history[:2 * k + 2]]
        rng = random.Random(f"0 {[message['content'] for message in heard]}")
        last = backend.LAST_WORDS if k == backend.MAX_TURNS - 2 else ""
        assert offers == list(dict.fromkeys([backend.respond(task, heard, rng), backend.NO_PREFERENCE[0] + last]))
    assert replies[0]["content"] == offered[0][0]
    if len(replies) > 1:
        assert replies[1]["content"] == "Whatever you like."
    counts = re.findall(r"^[+-]?\d+\.\d\d +(\d+) x  ", shown.split("you:   !\n")[1].split("you:")[0], re.M)
    assert sum(map(int, counts)) == 16  # each sampled turn once, with how often it was


def test_every_test_is_passed_or_failed(small, talk):
    """Against the grader, each test alone; the reference and the answer are beside each other."""
    shown = talk(terminal(small, "--play-seed", 5), *["1"] * 3, "base", *["1"] * 3, "q")
    for record in plays(small)[-2:]:
        task = Task.from_record(record["task"])
        answer = record["dialogue_history"][-1]["content"].split("I WANT TO ANSWER:")[-1]
        passed = []
        for name, call in task.test_cases.items():
            alone = Task(task.problem_description, task.ground_truth, {name: call})
            passed += grade([answer], [alone])
            assert f"{'passed' if passed[-1] else 'failed'}  {call}\n" in shown
        assert f"Tests passed: {sum(passed) / len(passed):.0%}" in shown
        assert record["reward"] == sum(passed) / len(passed)
    assert shown.count("The reference, and the answer beside it:") == 2


def test_answer_beside_reference():
    ours, theirs = "def f(x):\n    a = 1\n    b = 2\n    return a", "def f(x):\n    a = 2\n    return a\n    c"
    assert beside(ours, theirs) == ["def f(x):      def f(x):", "    a = 1    |     a = 2", "    b = 2    <",
                                            "    return a       return a", "             >     c"]
    record = {"task": {"problem_description": "p", "ground_truth": "def f(x):\n    return x",
                       "test_cases": {"a": "f(1)", "b": "f(0)"}}, "answer": "def f(x):\n    return 0"}
    assert backend.Backend().summary(record, grade)[:2] == ["failed  f(1)", "passed  f(0)"]
    page = backend.Backend().evidence(record, grade, unfolded=True)
    assert "<mark>    return x</mark>" in page and "<mark>    return 0</mark>" in page and "<details open>" in page
    assert "✗ f(1)" in page and "✓ f(0)" in page and "passes 1 of 2 tests" in page

    def strict(answers, tasks):
        """A grader of one's own: the tests are its own, too."""
        return [0.5] * len(answers)
    assert "passes 0 of 2 tests" in backend.Backend().evidence(record, strict)


def test_without_an_answer_it_says_so(own, talk):
    """Own model, own tasks. A reference that fails on a call is noted, but never behind a prompt."""
    (own[1] / "plays.jsonl").unlink(missing_ok=True)
    shown = talk(own, "?", "1", "My own words.", "q")
    assert "It did not answer: its last turn is graded as it is. Tests passed: 0%." in shown
    assert "def add(a, b):\n    return a + b" in shown and len(VERDICT.findall(shown)) == 3
    assert shown.count("passed  ") == 0 and shown.count("failed  ") == 3
    record, = plays(own[1])
    assert [m["content"] for m in record["dialogue_history"][2::2]] == [backend.NO_PREFERENCE[0], "My own words."]
    assert "This is your last reply." in shown and "scripted human says" not in shown  # it does not know this task


def test_the_verdict_is_the_share_of_what_it_could_have_said(small):
    """Against the critic's own judgement of the whole dialogue, and a count by hand."""
    run = run_of(*terminal(small))
    dialogue = play.Dialogue(run, run.model, run.held_out(), "actor", 2)
    while dialogue.record is None:
        dialogue.reply(dialogue.offers()[0][0])
    expected = critic.judge_turns(run.model("critic"), run.model("base")[0], dialogue.record)
    assert len(expected) == len(dialogue.states)
    for state, advantage in zip(dialogue.states, expected):
        assert state["judged"]["advantage"] == pytest.approx(advantage, abs=1e-4)
        others = [c for c in state["candidates"][:-1] if c["output_ids"] != state["turn"]["output_ids"]]
        worse = sum(c["count"] * ((c["advantage"] < advantage) + (c["advantage"] == advantage) / 2) for c in others)
        if others:
            share = worse / sum(c["count"] for c in others)
            assert dialogue.verdict(state).startswith(f"better than {100 * share:.0f} % of what it could have said")
        lines = [float(line.split()[0]) for line in dialogue.candidates(state)[1:]]
        assert lines == sorted(lines, reverse=True) and len(lines) == len(state["candidates"])


class Asking(play.Dialogue):
    """With an agent that never answers."""

    def hear(self):
        self.env.step(backend.STEPS[0].ask)


def test_the_last_words_are_told_before_the_last_reply(small):
    run = run_of(*terminal(small))
    dialogue = Asking(run, None, run.held_out(), "actor", 1)
    for turn in (1, 2, 3):
        offers, hint = dialogue.offers()
        assert hint.startswith("This is your last reply. The scripted human says here: \"Now I have to go, please send "
                               "me the result.\" An agent that was trained") if turn == 3 else hint == ""
        assert len(offers) == 2
        assert [offer.endswith(" Now I have to go, please send me the result.") for offer in offers] == [turn == 3] * 2
        dialogue.reply(offers[0])


def bare_run(folder, **rollout):
    """What a Dialogue asks of a run, without one."""
    settings = {"rollout": actor.Rollout(**rollout), "eval": program.Eval(), "critic": None}
    return SimpleNamespace(root=folder, settings=settings, instructions=INSTRUCTIONS, world=backend.Backend(), seed=0,
                           grade=grade, path=None)


def test_a_reply_that_does_not_fit_is_not_said(model, tokenizer, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(play.report, "judge_states", lambda *_: None)
    small = copy.deepcopy(model)
    small.config.max_position_embeddings = 400
    run = bare_run(tmp_path, max_turns=9, max_tokens=20)
    dialogue = play.Dialogue(run, lambda name: (small, tokenizer), tasks, "actor", 1)
    before = copy.deepcopy(vars(dialogue.env))
    for _ in range(2):
        with pytest.raises(InputError, match="does not fit into the model's context; say less"):
            dialogue.reply("7" * 250)
        assert vars(dialogue.env) == before and dialogue.record is None and len(dialogue.states) == 1
    assert not (tmp_path / "plays.jsonl").exists()
    dialogue.reply("7")
    assert [message["content"] for message in dialogue.env.messages[2::2]] == ["7"] and len(dialogue.states) == 2


@pytest.mark.parametrize("last, in_code, answered", [
    ("Which unit?", False, False), ("def f(): pass", True, True), (f"{ANSWER_MARKER} 3", False, True)])
def test_a_question_is_no_answer_where_code_would_be(tasks, tmp_path, last, in_code, answered):
    class Ends(play.Dialogue):
        def hear(self):
            self.env.step(last, in_code)
            self.record = {"answer": self.env.answer, "reward": 0.0}
    run = bare_run(tmp_path, max_turns=1, answer_on_code=True)
    end, record = Ends(run, None, tasks, "actor", 1).outcome()
    assert end.startswith("It did not answer: ") is not answered
    assert bool(record["answer"]) is answered


def test_the_same_seed_is_the_same_dialogue(small, talk):
    one, two, three = (talk(terminal(small, "--play-seed", seed), *["1"] * 3, "q") for seed in (7, 7, 8))
    assert one == two != three and one.split("agent:")[0] != three.split("agent:")[0]
    again = talk(terminal(small), *["1"] * 3, "q")  # another one each time, which is shown
    seed = re.search(r"--play-seed (\d+)", again)[1]
    assert talk(terminal(small, "--play-seed", seed), *["1"] * 3, "q") == again


def test_another_policy_on_the_same_task(small, talk):
    (small / "plays.jsonl").unlink(missing_ok=True)
    shown = talk(terminal(small, "--play-seed", 9), *["1"] * 3, "base", *["1"] * 3, "nobody", "", *["1"] * 3, "q")
    assert re.findall(r"You talk with (\S+) \(--play-policy (\w+)", shown) == [("SWEET", "actor"), ("base", "base"),
                                                                              ("base", "base")]
    assert "Enter: another task. base, actor: the same task with that policy." in shown  # rft is not there
    one, two, three = plays(small)
    assert one["task"] == two["task"] != three["task"]
    raw = [json.loads(line) for line in (small / "plays.jsonl").open(encoding="utf-8")]
    assert [row["policy"] for row in raw] == ["actor", "base", "base"] and raw[0]["seed"] == raw[1]["seed"] == 9


def test_what_cannot_be_is_one_line(small, monkeypatch):
    def complaint(*flags):
        with pytest.raises(SystemExit) as end:
            program.main(["play", *map(str, terminal(small, *flags))])
        line = str(end.value)
        assert line.startswith("sweet: ") and "\n" not in line
        return line
    assert "holds no rft; expected one of base, actor" in complaint("--play-policy", "rft")
    if pytest.importorskip("gradio"):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            assert port in complaint("--web", "--port", port)
        for host in ("203.0.113.7", "no.such.host.invalid", ".."):  # not addresses of this machine
            start = time.monotonic()
            assert f"--host {host}" in complaint("--web", "--host", host) and time.monotonic() - start < 30
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "--web: needs gradio, which is not installed: pip install gradio==" in complaint("--web")


@pytest.mark.parametrize("lines", [(), ("1",), ("?", "!")])
def test_the_end_of_the_input_is_one_line(small, talk, lines):
    with pytest.raises(SystemExit) as end:
        talk(terminal(small, "--play-seed", 5), *lines)
    assert end.value.code == "sweet: the input ended before the dialogue did"


def test_the_input_may_end_after_the_dialogue(small, talk):
    assert talk(terminal(small, "--play-seed", 5), *["1"] * 3).endswith("q: the end. \n")


def test_ctrl_c_is_one_line(small):
    process = sweet("play", *terminal(small), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    shown = process.stdout.read(1)
    while not shown.endswith(("you:   ", "q: the end. ")):
        letter = process.stdout.read(1)
        assert letter, process.stderr.read()
        shown += letter
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and len(errors.split("\n")) <= 3 and "stopped by SIGINT" in errors


def test_notes_of_the_grader_do_not_land_in_the_prompt(own):
    """Everything that comes out, in the order in which it does."""
    process = sweet("play", *own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    shown, _ = process.communicate("1\nyes\nq\n")
    lines = shown.splitlines()
    assert any("broken task" in line for line in lines)
    assert [line for line in lines if line.startswith(PROMPTS)] == [
        "you:   1", "you:   yes", "Enter: another task. base, actor: the same task with that policy. q: the end. q"]


def test_pictures_of_pages_for_a_terminal(pages, talk):
    needs_browser()
    (pages / "plays.jsonl").unlink(missing_ok=True)
    shown = talk(["--task", "frontend", *PAGES, "--run", pages, "--play-seed", 1], *["1"] * 2, "q")
    assert "Similarity: " in shown and ("What still differs:" in shown or "Nothing differs." in shown)
    record, = plays(pages)
    drawn = (pages / "play.html").read_text(encoding="utf-8")
    assert drawn.count("<img") == len(record["dialogue_history"])  # two pictures for each turn of the agent's
    assert all(offers[-2:] == list(Frontend.OFFERS) for offers in choices(shown))


# ------------------------------------------------------------------ in the browser

def needs_browser():
    try:
        browser.find_browser()
    except InputError as error:
        pytest.skip(str(error))


SPY = """
import os, sys
log = open(os.environ["SPY"], "a")
def spy(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print(args[1] if event == "socket.connect" else args[0], file=log, flush=True)
sys.addaudithook(spy)
"""


class Page:
    """The page of `play --web` in Chromium: every request's host is noted."""

    def __init__(self, tab, url):
        self.tab, self.hosts = tab, Counter()
        tab.set_default_timeout(90_000)  # a busy machine
        tab.on("request", lambda request: self.hosts.update([request.url.split("/")[2]]))
        tab.goto(url)
        self.turns(1)

    def turns(self, n):
        """Wait for the n-th turn of the agent."""
        self.tab.get_by_text(VERDICT).nth(n - 1).wait_for()

    @property
    def over(self):
        return self.tab.locator("#end h3").count() > 0

    def next(self, act):
        """Do something, and wait for what the agent says then."""
        n = self.tab.get_by_text(VERDICT).count()
        act()
        self.turns(n + 1)
        self.tab.locator("#end h3").or_(self.tab.locator(".option")).first.wait_for()

    def pick(self):
        self.next(self.tab.locator(".option").first.click)

    def say(self, text):
        def act():
            self.tab.get_by_label("Your reply").fill(text)
            self.tab.get_by_label("Your reply").press("Enter")
        self.next(act)

    def overflow(self):
        return self.tab.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.fixture(scope="module")
def chromium():
    needs_browser()
    pytest.importorskip("gradio")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser.find_browser())
        yield started
        started.close()


@pytest.fixture
def served(chromium, tmp_path):
    """served(flags, width) -> the page of a process of its own."""
    processes = []

    def served(flags, width=1280):
        port, spy = free_port(), tmp_path / "connections"
        (tmp_path / "sitecustomize.py").write_text(SPY)
        process = sweet("play", "--web", "--port", port, *flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        env={"PYTHONPATH": str(tmp_path), "SPY": str(spy)})
        processes.append(process)
        assert process.stdout.readline() == f"play: http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
        tab = chromium.new_page(viewport={"width": width, "height": 900})
        page = Page(tab, f"http://127.0.0.1:{port}/")
        page.port, page.process, page.spy = port, process, spy
        return page
    yield served
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("width", [1280, 390])
def test_clicked_through_to_the_tests(small, served, width):
    """A whole dialogue; then another policy on the same task. Nobody else is asked for anything."""
    (small / "plays.jsonl").unlink(missing_ok=True)
    page = served(terminal(small, "--play-seed", 5), width)
    task = run_of(*terminal(small)).held_out()[4]
    tab = page.tab
    assert tab.get_by_text(task.problem_description).is_visible()
    mind = tab.get_by_text("return values").first
    assert not mind.is_visible()
    tab.get_by_text("What you have in mind").click()
    mind.wait_for()
    hints = 0
    while not page.over:
        hints += tab.get_by_text("Now I have to go, please send me the result.").first.is_visible()
        page.pick()
    record, = plays(small)
    assert hints == (len(record["dialogue_history"]) == 8)
    calls = [line[2:] for line in tab.locator("#end li").all_inner_texts()]
    assert calls == list(task.test_cases.values()) and tab.locator("#end li").first.is_visible()
    passed = tab.locator("#end").inner_text().count("✓")
    assert f"Tests passed: {record['reward']:.0%}" in tab.locator("#end").inner_text()
    assert record["reward"] == passed / len(calls)
    assert not tab.get_by_label("Your reply").is_visible()
    tab.get_by_text(VERDICT).first.click()  # unfolds to the candidates
    tab.get_by_text("advantage, how often it was sampled, turn").first.wait_for()
    rows = [row for row in tab.locator("li:visible").all_inner_texts() if re.match(r"[+-]?\d+\.\d\d ", row)]
    assert sum(int(found[1]) for row in rows if (found := re.match(r"\S+ +(\d+) x ", row))) == 16
    assert page.overflow() <= 0
    tab.get_by_label("base").check()
    tab.get_by_text("Talk about this task").click()
    tab.get_by_text("You want this from base").wait_for()
    assert tab.get_by_text(task.problem_description).is_visible() and not page.over
    while not page.over:
        page.pick()
    assert [row["task"] for row in plays(small)] == [task.to_record()] * 2
    assert set(page.hosts) == {f"127.0.0.1:{page.port}"}
    asked = {line for line in page.spy.read_text().split("\n") if line}
    assert all("127.0.0.1" in line or "localhost" in line or line.startswith(("/", "b'/")) for line in asked), asked
    tab.close()


def test_it_listens_on_this_machine_alone_and_ends_with_one_line(small, served):
    import psutil
    page = served(terminal(small))
    found = {tuple(c.laddr) for c in psutil.Process(page.process.pid).net_connections() if c.status == "LISTEN"}
    assert found == {("127.0.0.1", page.port)}
    page.tab.close()
    page.process.send_signal(signal.SIGINT)
    said, errors = page.process.communicate(timeout=20)
    lines = [line for line in (said + errors).split("\n") if line and not line.startswith("sweet: answers run")]
    assert page.process.returncode == 130 and len(lines) == 1 and "stopped by SIGINT" in lines[0]


def test_your_own_model_and_tasks_and_what_looks_like_html(own, served):
    (own[1] / "plays.jsonl").unlink(missing_ok=True)
    page = served(own, 390)
    reply = "<img src=x onerror=\"document.title='run'\"> {{ value }} ${1 + 1} & **so** \\n"
    assert page.tab.get_by_text("Add <b>two</b> numbers & {{ '${1 + 1}' }}: def add(a, b)").is_visible()
    page.say(reply)
    assert page.tab.get_by_text(reply).is_visible() and page.tab.title() == "sweet: play"
    page.pick()
    assert "It did not answer" in page.tab.locator("#end").inner_text()
    record, = plays(own[1])
    assert record["dialogue_history"][2]["content"] == reply and page.overflow() <= 0
    assert set(page.hosts) == {f"127.0.0.1:{page.port}"}
    page.tab.close()


def test_both_pages_are_drawn(pages, served):
    page = served(["--task", "frontend", *PAGES, "--run", pages, "--play-seed", 1])
    page.tab.get_by_text("What you have in mind").click()
    page.tab.locator("img[src^='data:image/jpeg']:visible").nth(1).wait_for()  # the wish, and the first draft
    turns = 1
    while not page.over:
        page.pick()
        turns += 1
    drawn = page.tab.locator("#end img").evaluate_all("all => all.map(image => [image.naturalWidth, image.src])")
    assert len(drawn) == 2 * turns and all(width > 100 for width, _ in drawn)
    assert len({source for _, source in drawn[1::2]}) == 1  # the reference, each time
    assert set(page.hosts) <= {f"127.0.0.1:{page.port}", ""}  # "": data:
    page.tab.close()


def test_no_file_of_yours_is_served(small, served):
    page = served(terminal(small))
    for path in (small / "trajectories.jsonl", ROOT / "README.md"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://127.0.0.1:{page.port}/gradio_api/file={path}")
    page.tab.close()
