"""The human behind a server: a real server process, and a proxy in front of it that spoils three requests in ten."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Proxy, free_port, save_model, three_in_ten

import machinery.server
from env import Task
from machinery.files import InputError, read_jsonl
from machinery.server import Server
from simulator import NO_PREFERENCE, EndpointHuman, ModelHuman, make_human, prompt_for
from worlds import backend as world

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-this-is-secret-0123456789"
TASK = Task("make a function", "def f(x):\n    return x", {"a": "f(1)"})
PAGE = Task("make a page", "<html>\n<p>hello</p></html>")


def dialogue(question="Which?"):
    return [{"role": "user", "content": "instructions"}, {"role": "assistant", "content": question}]


def said(content, **extra):
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content, **extra}}]}


@pytest.fixture
def proxied(request):
    """make(fault, target=...) -> a Proxy that is closed after the test."""
    request.getfixturevalue("monkeypatch").setattr(machinery.server, "PAUSE", 0.01)
    made = []

    def make(fault, target="http://127.0.0.1:9/v1", **extra):
        made.append(Proxy(target, fault, **extra))
        return made[-1]
    yield make
    for proxy in made:
        proxy.close()


# ------------------------------------------------------------------ one request at a time, no model behind it

def test_replies_are_cut_as_the_official_environment_cuts_them(proxied):
    proxy = proxied(lambda *_: said("  " + "x" * 5000))
    human = EndpointHuman(proxy.url, Server(model="m"))
    assert human.reply([TASK, PAGE], [dialogue()] * 2) == ["x" * 400, "x" * 1000]


@pytest.mark.parametrize("answer", [said(""), said(None), said(" \n"), said(None, refusal="I cannot help with that."), {
    "status": 400, "error": {"code": "content_filter", "message": "filtered"}}])
def test_an_empty_or_refused_reply_counts_as_no_preference(proxied, capsys, answer):
    proxy = proxied(lambda *_: dict(answer))
    assert EndpointHuman(proxy.url, Server(model="m")).reply([TASK], [dialogue()]) == [NO_PREFERENCE]
    assert "empty or refused" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [k for k in Proxy.FAULTS if k not in ("cut", "cut short")] + [
    {"choices": []}, {"choices": None}, {"choices": [{"message": None}]}, {"choices": "text"}])
def test_every_fault_that_may_pass_is_asked_again(proxied, kind):
    asked = []

    def fault(_, body):
        if not body:
            return said("a list of models?")
        asked.append(body)
        return said("later") if len(asked) > 3 else {**kind} if isinstance(kind, dict) else kind
    human = EndpointHuman(proxied(fault, delay=1.0).url, Server(model="m", timeout=0.5))
    assert human.reply([TASK], [dialogue()]) == ["later"]
    assert human.endpoint.gone is None and len(asked) == 4


def test_the_pauses_double_and_differ(proxied, monkeypatch):
    pauses = []
    proxy = proxied(lambda *_: "500")
    human = EndpointHuman(proxy.url, Server(model="m", parallel=1))
    monkeypatch.setattr(machinery.server, "PAUSE", 0.5)
    monkeypatch.setattr(machinery.server.time, "sleep", pauses.append)
    assert human.reply([TASK] * 3, [dialogue()] * 3) == [None] * 3
    assert len(pauses) == 8 and len(proxy.log) == 10  # the look at its models, one request with 8 further tries
    for k, pause in enumerate(pauses):
        assert 0.5 * min(30, 0.5 * 2 ** k) <= pause <= min(30, 0.5 * 2 ** k)
    assert len({pause / 2 ** min(k, 6) for k, pause in enumerate(pauses)}) == 8


@pytest.mark.parametrize("status", [400, 404, 422])
def test_what_cannot_pass_is_not_asked_again(proxied, status, capsys):
    proxy = proxied(lambda *_: {"status": status, "error": {"message": "no such model"}})
    human = EndpointHuman(proxy.url, Server(model="m"))
    before = len(proxy.log)
    assert human.reply([TASK] * 40, [dialogue()] * 40) == [None] * 40
    assert len(proxy.log) - before <= 16 and "no such model" in capsys.readouterr().err


def test_requests_in_flight_are_bounded_and_many(proxied):
    proxy = proxied(lambda *_: said("ok"))
    answer = proxy.answer
    proxy.answer = lambda *args: (time.sleep(0.1), answer(*args))
    human = EndpointHuman(proxy.url, Server(model="m", parallel=6))
    assert human.reply([TASK] * 30, [dialogue(str(i)) for i in range(30)]) == ["ok"] * 30
    assert proxy.busy == 6


def test_the_key_is_sent_and_never_told(proxied, monkeypatch, capsys):
    """A server that repeats the key in its errors, as some do."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    proxy = proxied(lambda *_: "401")
    with pytest.raises(InputError) as caught:
        EndpointHuman(proxy.url, Server(model="m"))
    assert "401" in str(caught.value) and "***" in str(caught.value) and KEY not in str(caught.value)
    proxy.fault = lambda number, _: said("x") if number == 1 else "500"
    human = EndpointHuman(proxy.url, Server(model="m", retries=0))
    human.endpoint.gone = None
    assert human.reply([TASK], [dialogue()]) == [None]
    printed = capsys.readouterr()
    assert KEY not in printed.out + printed.err and "***" in printed.err


def test_urls_that_cannot_work_are_one_line(proxied, monkeypatch):
    for url in (f"http://user:{KEY}@127.0.0.1:1/v1", f"http://127.0.0.1:1/v1?api_key={KEY}", "http:///v1"):
        with pytest.raises(InputError, match="OPENAI_API_KEY") as caught:
            make_human(url)
        assert KEY not in str(caught.value)
    with pytest.raises(InputError, match="127.0.0.1.*onnection"):
        make_human(f"http://127.0.0.1:{free_port()}/v1")
    names = {"object": "list", "data": [{"id": name, "object": "model"} for name in ("one", "two")]}
    with pytest.raises(InputError, match="one.*two.*--human-model"):
        make_human(proxied(lambda *_: dict(names)).url)
    only = {"object": "list", "data": [{"id": "one", "object": "model"}]}
    assert make_human(proxied(lambda *_: dict(only)).url).endpoint.model == "one"


# ------------------------------------------------------------------ a real server

def test_a_real_server_replies_as_the_same_model_does_here(server):
    """Greedy decoding in another process gives the text that the model gives when it is loaded here."""
    url, name = server
    tasks = world.make_tasks(4, seed=1)
    dialogues = [dialogue(f"What about step {i}?") for i in range(4)]
    replies = EndpointHuman(url, Server(model=name, max_tokens=12)).reply(tasks, dialogues)
    assert len(set(replies)) > 1 and all(0 < len(reply) <= 400 for reply in replies)
    here = ModelHuman(name, max_tokens=12)
    assert here.reply(tasks, dialogues) == replies
    assert tasks[0].ground_truth in prompt_for(tasks[0], dialogues[0])[0]["content"]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """An agent, and a task file: 6 tasks of the small world."""
    folder = tmp_path_factory.mktemp("material")
    with open(folder / "tasks.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(task.to_record()) + "\n" for task in world.make_tasks(6, seed=4))
    return save_model(folder / "agent", seed=3), str(folder / "tasks.jsonl")


def rollout(run, material, url, name, *extra):
    command = [sys.executable, str(ROOT / "sweet.py"), "rollout", "--run", str(run), "--model", material[0], "--tasks",
               material[1], "--rollout-per-task", "2", "--rollout-max-tokens", "10", "--rollout-max-turns", "3",
               "--human", url, "--human-model", name, "--human-max-tokens", "8", "--human-timeout", "6", *extra]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def calm(server, material, tmp_path_factory):
    """The trajectories without any fault."""
    run = tmp_path_factory.mktemp("calm")
    done = rollout(run, material, *server)
    assert done.returncode == 0, done.stderr[-2000:]
    return (run / "trajectories.jsonl").read_bytes()


def no_key_in(run, *texts):
    assert not any(KEY in text for text in texts)
    assert not any(KEY.encode() in file.read_bytes() for file in run.rglob("*") if file.is_file())


def test_with_three_faults_in_ten_requests_the_file_is_the_same(server, material, calm, proxied, tmp_path):
    proxy = proxied(three_in_ten(seed=1), server[0])
    done = rollout(tmp_path, material, proxy.url, server[1])
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "trajectories.jsonl").read_bytes() == calm
    kinds = [kind for kind, _ in proxy.log]
    assert len(kinds) >= 30 and set(kinds) == {None, *Proxy.FAULTS}
    no_key_in(tmp_path, done.stdout, done.stderr)


def test_a_server_that_dies_for_good_and_comes_back(server, material, calm, proxied, tmp_path):
    port, whole = free_port(), [json.loads(line) for line in calm.splitlines()]

    def mortal(number, _):
        if number == 16:
            proxy.close()
        return "reset" if number >= 16 else None
    proxy = proxied(mortal, server[0], port=port)
    few = ("--human-retries", "1", "--human-parallel", "2")
    done = rollout(tmp_path, material, proxy.url, server[1], *few)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    aside = json.loads((tmp_path / "trajectories.jsonl.0-12.unfinished").read_text())
    finished = [record for record in aside["records"] if record]
    assert 0 < len(finished) < 12 and len(aside["missing"]) == 12 - len(finished)
    assert [a == b for a, b in zip(aside["records"], whole)] == [record is not None for record in aside["records"]]
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("sweet: ") and all(str(tuple(item)) in line for item in aside["missing"])
    assert not (tmp_path / "trajectories.jsonl").exists()

    again = rollout(tmp_path, material, proxy.url, server[1], *few)  # still dead: known at once, nothing is lost
    assert again.returncode != 0 and "onnection" in again.stderr.strip().splitlines()[-1]
    assert json.loads((tmp_path / "trajectories.jsonl.0-12.unfinished").read_text()) == aside

    other = rollout(tmp_path, material, proxy.url, server[1], *few, "--rollout-temperature", "0.5")  # no mixture
    assert "rollout.temperature = 1.0" in other.stderr.strip().splitlines()[-1]

    alive = proxied(lambda *_: None, server[0], port=port)
    done = rollout(tmp_path, material, alive.url, server[1], *few)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "trajectories.jsonl").read_bytes() == calm
    assert not list(tmp_path.glob("*.unfinished")) and not list(tmp_path.glob("*.partial"))
    asked = [body for _, body in alive.log if body]
    wanted = sum(len(whole[2 * task + k]["dialogue_history"]) // 2 - 1 for task, k in aside["missing"])
    assert len(asked) == wanted  # of those that were finished nothing is asked again
    assert len(list(read_jsonl(tmp_path / "trajectories.jsonl"))) == 12
    no_key_in(tmp_path, done.stderr, again.stderr)
