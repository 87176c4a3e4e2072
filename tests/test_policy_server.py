"""The policy behind a server: a real server process of token ids (id_server.py), and a proxy in front of it that spoils
requests."""
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import Proxy, free_port, save_model, three_in_ten

import actor
import machinery.policy_server as policy_server
import machinery.server
import sweet as program
from env import end_of_turn, render
from machinery.files import InputError, read_lines
from machinery.policy_server import PolicyServer, how_to_serve
from machinery.sampling import sample
from machinery.template import control_tokens, known_ids
from machinery.train import Machine, load_model
from worlds import backend as world

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder: two models that end some turns and write control tokens in others, one that is served with the other's
    weights, and tasks."""
    folder, tasks = tmp_path_factory.mktemp("policy"), world.make_tasks(4, seed=4)
    for name, seed in (("base", 3), ("run/rft", 5)):
        path = save_model(folder / name, seed=seed)
        model, tokenizer = load_model(path)
        prompt, _ = render(tokenizer, actor.begin(tasks[0], actor.Rollout()).messages)
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([prompt])).last_hidden_state[0, -1]
            for token in ("<|im_end|>", "<|im_start|>"):  # their logits: about 4
                row = tokenizer.convert_tokens_to_ids(token)
                model.get_output_embeddings().weight[row] = 4 * hidden / hidden.dot(hidden)
        model.save_pretrained(path)
    shutil.copytree(folder / "base", folder / "changed")
    with open(folder / "tasks.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(task.to_record()) + "\n" for task in tasks)
    return folder


@pytest.fixture(scope="module")
def url(material):
    """A server that has base under its path and run/rft under a relative one, and run/rft's weights as changed."""
    port, rft = free_port(), material / "run/rft"
    names = {material / "base": material / "base", os.path.relpath(rft): rft, material / "changed": rft}
    pairs = [f"{name}={folder}" for name, folder in names.items()]
    process = subprocess.Popen([sys.executable, str(ROOT / "tests/id_server.py"), str(port), *pairs],
                               env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(1200):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models"):
                break
            assert process.poll() is None
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def proxied(url, monkeypatch):
    """make(fault) -> a Proxy in front of the server that is closed after the test."""
    monkeypatch.setattr(machinery.server, "PAUSE", 0.01)
    made = []

    def make(fault, **extra):
        made.append(Proxy(url, fault, delay=1.0, **extra))
        return made[-1]
    yield make
    for proxy in made:
        proxy.close()


def asked(proxy):
    """The requests for turns."""
    return [json.loads(body) for _, body in proxy.log if body]


def cut_by_hand(ids, tokenizer):
    """A turn from all that was sampled, written with index and min."""
    end = end_of_turn(tokenizer)
    last = ids.index(end) + 1 if end in ids else len(ids)
    bad = [i for i, token in enumerate(ids) if token in control_tokens(tokenizer) or token not in known_ids(tokenizer)]
    return ids[:min([last, *bad])]


def said_again(url, requests, tokenizer):
    """What the server says to the same requests, without any code of ours: Counter of (prompt, turn)."""
    found = Counter()
    for request in requests:
        post = urllib.request.Request(f"{url}/completions", json.dumps(request).encode())
        with urllib.request.urlopen(post) as answer:
            choices = json.loads(answer.read())["choices"]
        assert len(choices) == request["n"]
        for choice in choices:
            found[tuple(request["prompt"]), tuple(cut_by_hand(choice["token_ids"], tokenizer))] += 1
    return found


def words(stage, run, material, url, *more):
    return [stage, "--run", str(run), "--model", str(material / "base"), "--tasks", str(material / "tasks.jsonl"),
            "--rollout-per-task", "2", "--rollout-max-tokens", "6", "--rollout-max-turns", "3", "--candidates-n", "3",
            "--policy-server", url, *more]


@pytest.fixture(scope="module")
def calm(url, material, tmp_path_factory):
    """(proxy, a run folder with trajectories.jsonl and samples.jsonl) without any fault."""
    run, proxy = tmp_path_factory.mktemp("calm"), Proxy(url, lambda *_: None)
    program.main(words("samples", run, material, proxy.url))
    yield proxy, run
    proxy.close()


# ------------------------------------------------------------------ a whole run

def test_what_is_kept_is_what_was_sampled(calm, url, material):
    """Token for token: the server is asked the same again, and its ids are cut by hand."""
    proxy, run = calm
    _, tokenizer = load_model(material / "base")
    first = [request for request in asked(proxy) if request["n"] == 1]
    kept, ends = Counter(), set()
    for trajectory in read_lines(run / "trajectories.jsonl"):
        history = trajectory["dialogue_history"]
        for i in range(1, len(history), 2):
            prompt, _ = render(tokenizer, history[:i])
            turn = history[i]["output_ids"]
            kept[tuple(prompt), tuple(turn)] += 1
            ends.add("end" if turn[-1:] == [end_of_turn(tokenizer)] else "full" if len(turn) == 6 else "control")
    assert kept == said_again(url, first, tokenizer) and ends == {"end", "full", "control"}
    assert {request["model"] for request in first} == {str(material / "base")}
    assert len({request["seed"] for request in first}) == len(first) == kept.total()


def test_candidates_of_a_state_are_one_request(calm, url, material):
    proxy, run = calm
    _, tokenizer = load_model(material / "base")
    requests = [request for request in asked(proxy) if request["n"] == 3]
    kept = Counter()
    states = list(read_lines(run / "samples.jsonl"))
    for state in states:
        prompt, _ = render(tokenizer, state["messages"])
        for turn in state["candidates"]:
            kept[tuple(prompt), tuple(turn["output_ids"])] += turn["count"]
    said = said_again(url, requests, tokenizer)
    assert kept == Counter({(prompt, turn): n for (prompt, turn), n in said.items() if turn})
    assert len(requests) == len(states) and len(asked(proxy)) == 2 * len(states)


@pytest.mark.parametrize("rows", ["3", "512"])
def test_with_three_faults_in_ten_requests_the_file_is_the_same(calm, material, proxied, tmp_path, rows):
    """Whatever the number of dialogues side by side."""
    proxy = proxied(three_in_ten(seed=1))
    program.main(words("rollout", tmp_path, material, proxy.url, "--rows", rows))
    assert (tmp_path / "trajectories.jsonl").read_bytes() == (calm[1] / "trajectories.jsonl").read_bytes()
    assert {kind for kind, _ in proxy.log} >= {None, "500", "429", "cut", "reset"}


def test_a_server_that_dies_for_good_and_comes_back(calm, material, proxied, tmp_path, monkeypatch):
    """Groups that are finished are kept, and nothing of them is asked again."""
    monkeypatch.setattr(policy_server, "REQUESTS", dataclasses.replace(policy_server.REQUESTS, retries=1))
    alive = []

    def mortal(number, body):
        alive.append(not (tmp_path / "trajectories.jsonl.partial").exists()
                     or (tmp_path / "trajectories.jsonl.partial").read_bytes().count(b"\n") < 4)
        return None if all(alive) else "500"
    with pytest.raises(SystemExit, match="does not answer any more: .*the same command goes on|500"):
        program.main(words("rollout", tmp_path, material, proxied(mortal).url, "--rows", "2"))
    assert len(list(read_lines(tmp_path / "trajectories.jsonl.partial"))) == 4
    again = proxied(lambda *_: None)
    program.main(words("rollout", tmp_path, material, again.url, "--rows", "2"))
    whole = list(read_lines(calm[1] / "trajectories.jsonl"))
    assert list(read_lines(tmp_path / "trajectories.jsonl")) == whole
    assert len(asked(again)) == sum(len(trajectory["dialogue_history"]) // 2 for trajectory in whole[4:])


def test_a_killed_run_goes_on_to_the_same_file(calm, material, proxied, tmp_path):
    partial = tmp_path / "trajectories.jsonl.partial"

    def stuck(handler):
        time.sleep(1000)

    def fault(*_):
        return stuck if partial.exists() and partial.stat().st_size else None
    command = [sys.executable, str(ROOT / "sweet.py"), *words("rollout", tmp_path, material, proxied(fault).url)]
    process = subprocess.Popen([*command, "--rows", "4"], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = proxied(lambda *_: None)
    program.main(words("rollout", tmp_path, material, again.url, "--rows", "4"))
    assert (tmp_path / "trajectories.jsonl").read_bytes() == (calm[1] / "trajectories.jsonl").read_bytes()
    assert 0 < len(asked(again)) < len(asked(calm[0])) / 2


def test_evaluation_waits_for_each_model(calm, material, proxied, capsys):
    """The server has base alone at first: base's dialogues are kept, and a line says what to serve."""
    run, base = material / "run", str(material / "base")
    flags = ("--trajectories", str(calm[1] / "trajectories.jsonl"), "--heldout", str(material / "tasks.jsonl"),
             "--eval-methods", "base,rft", "--rows", "4")
    few = proxied(lambda _, body: None if body else {"data": [{"id": base}]})
    with pytest.raises(SystemExit, match=f"serves {base}; expected {run}/rft.*vllm serve {run}/rft --dtype float32"):
        program.main(words("eval", run, material, few.url, *flags))
    assert {request["model"] for request in asked(few)} == {base}
    assert {request["top_p"] for request in asked(few)} == {1.0, 0.9}
    assert len(list(read_lines(run / "eval.jsonl.partial"))) == 8
    more = proxied(lambda *_: None)
    program.main(words("eval", run, material, more.url, *flags))
    assert {request["model"] for request in asked(more)} == {os.path.relpath(run / "rft")}
    assert [record["method"] for record in read_lines(run / "eval.jsonl")] == ["base"] * 8 + ["RFT"] * 8


# ------------------------------------------------------------------ the guards

def server_of(url, dtype="float32"):
    return PolicyServer(Machine(policy_server=url, dtype=dtype))


@pytest.fixture(scope="module")
def prompts(material):
    _, tokenizer = load_model(material / "base")
    return [render(tokenizer, [{"role": "user", "content": text}])[0] for text in ("a", "some words", "a")]


KEYS = [(("x", i), 0) for i in range(3)]


def test_other_weights_under_the_right_name_are_an_error(url, material, prompts):
    model, tokenizer = load_model(material / "changed")
    with pytest.raises(InputError, match="log-probs differ from those of .*changed here by .* nats a token"):
        sample(model, tokenizer, prompts, KEYS, max_tokens=10, server=server_of(url))


def test_the_tolerance_fits_the_number_format(url, material, prompts):
    """A model in bfloat16 here, in float32 there: rounding that is no fault in bfloat16 would be one in float32."""
    model, tokenizer = load_model(material / "base", Machine(dtype="bfloat16"))
    turns = sample(model, tokenizer, prompts, KEYS, max_tokens=10, server=server_of(url, "bfloat16"))
    assert len(turns) == 3
    with pytest.raises(InputError, match="at most 0.001"):
        sample(model, tokenizer, prompts, KEYS, max_tokens=10, server=server_of(url, "float32"))


def test_a_seed_depends_on_the_rows_key_alone(url, material, prompts):
    model, tokenizer = load_model(material / "base")
    together = sample(model, tokenizer, prompts, KEYS, max_tokens=10, server=server_of(url))
    for prompt, key, turn in zip(prompts, KEYS, together):
        assert sample(model, tokenizer, [prompt], [key], max_tokens=10, server=server_of(url)) == [turn]
    assert together[0] != together[2]  # one prompt, two keys


def test_the_servers_turns_are_those_of_the_model_here(url, material, prompts):
    """At a tiny temperature both take the likeliest token."""
    model, tokenizer = load_model(material / "base")
    how = {"max_tokens": 10, "temperature": 1e-4}
    assert sample(model, tokenizer, prompts, KEYS, server=server_of(url), **how) == sample(
        model, tokenizer, prompts, KEYS, **how)


def logprobs_of(model, prompt, ids):
    with torch.no_grad():
        rows = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
    return [float(row[token]) for row, token in zip(rows, ids)]


@pytest.mark.parametrize("ids, turn", [
    ("ab<|im_end|>", 3), ("abcd", 4), ("ab<|im_start|>", 2), ("<|im_start|>", 0), ("a<|im_end|>bc", 2),
    ("a<|endoftext|>b", 1), ("ab", None), ("", None)])
def test_how_turns_end(proxied, material, prompts, ids, turn):
    """With the end token, at max_tokens (4), before a control token; a server that strips the end is refused."""
    model, tokenizer = load_model(material / "base")
    ids = tokenizer.encode(ids, add_special_tokens=False)
    answer = {"choices": [{"index": 0, "finish_reason": "stop", "token_ids": ids,
                           "logprobs": {"token_logprobs": logprobs_of(model, prompts[0], ids) if ids else []}}]}
    proxy = proxied(lambda _, body: dict(answer) if body else None)

    def said():
        return sample(model, tokenizer, prompts[:1], KEYS[:1], max_tokens=4, server=server_of(proxy.url))
    if turn is None:
        with pytest.raises(InputError, match="without a token that ends one"):
            said()
    else:
        assert said() == [ids[:turn]]


@pytest.mark.parametrize("choice", [
    {"text": "words", "finish_reason": "stop"}, {"token_ids": [1], "logprobs": None}, {"logprobs": {}},
    {"token_ids": None, "logprobs": {"token_logprobs": [-1.0]}}])
def test_a_server_without_token_ids_or_log_probs_is_one_line(proxied, material, prompts, choice):
    model, tokenizer = load_model(material / "base")
    proxy = proxied(lambda _, body: {"choices": [{"index": 0, **choice}]} if body else None)
    with pytest.raises(InputError, match="expected vLLM from 0.10.2 on"):
        sample(model, tokenizer, prompts[:1], KEYS[:1], max_tokens=4, server=server_of(proxy.url))
    assert len(asked(proxy)) == 1


def test_a_server_that_does_not_count_is_one_line(proxied, material, prompts):
    model, tokenizer = load_model(material / "base")
    one = {"index": 0, "token_ids": [1] * 4, "logprobs": {"token_logprobs": [-1.0] * 4}}
    proxy = proxied(lambda _, body: {"choices": [one]} if body else None)
    with pytest.raises(InputError, match="all turns"):
        sample(model, tokenizer, prompts[:1] * 2, [(0, 0), (0, 1)], max_tokens=4, server=server_of(proxy.url))


@pytest.mark.parametrize("url, words_", [("http://127.0.0.1:9/v1", "onnection"), ("base", "should be like http")])
def test_nobody_there_is_known_before_any_work(material, tmp_path, url, words_):
    with pytest.raises(SystemExit, match=words_):
        program.main(words("rollout", tmp_path, material, url))
    assert not (tmp_path / "trajectories.jsonl.partial").exists()


# ------------------------------------------------------------------ how to serve

def test_a_stage_says_how_to_serve_its_model(calm, material, tmp_path, capsys):
    won = tmp_path / "won.jsonl"
    with open(won, "w", encoding="utf-8") as file:
        for trajectory in read_lines(calm[1] / "trajectories.jsonl"):
            file.write(json.dumps({**trajectory, "reward": 1.0}) + "\n")
    program.main(["rft", "--run", str(tmp_path / "run"), "--model", str(material / "base"), "--trajectories", str(won),
                  "--rft-epochs", "1"])
    assert f"serve it: vllm serve {tmp_path}/run/rft --dtype float32\n" in capsys.readouterr().err


def test_adapters_are_served_on_the_model_below(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model", "r": 8}')
    assert how_to_serve(tmp_path, "bfloat16") == (
        f"vllm serve some/model --dtype bfloat16 --enable-lora --lora-modules {tmp_path}={tmp_path}")
