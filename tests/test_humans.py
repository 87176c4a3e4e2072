"""The human behind a server: a real server process, and a proxy in front of it that spoils three requests in ten."""
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import CHAT, Proxy, free_port, save_model, three_in_ten

import machinery.server
import machinery.speaker
import sweet as program
from env import Task, end_of_turn, render
from machinery.files import InputError, read_jsonl
from machinery.server import Server
from machinery.thoughts import spoken
from machinery.settings import flat
from machinery.train import Machine
from machinery.several import DrawnHuman, make_humans
from simulator import NO_PREFERENCE, EndpointHuman, ModelHuman, ScriptedHuman, make_human
from simulator import prompt_for, shows_code, tell_leaks
from worlds import backend as world

pytestmark = pytest.mark.slow

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
    "status": 400, "error": {"code": "content_filter", "message": "filtered"}}, said([]), said([{"type": "reasoning"}]),
    said(None, tool_calls=[{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
    said("", reasoning_content="SECRET"), said("<think>SECRET"), said("<think>SECRET</think> ")])
def test_an_empty_or_refused_reply_counts_as_no_preference(proxied, capsys, answer):
    proxy = proxied(lambda *_: dict(answer))
    assert EndpointHuman(proxy.url, Server(model="m")).reply([TASK], [dialogue()]) == [NO_PREFERENCE]
    assert "empty or refused" in capsys.readouterr().out


@pytest.mark.parametrize("content", [
    [{"type": "text", "text": "It "}, {"type": "text", "text": "sorts."}], [{"text": "It sorts."}], ["It ", "sorts."],
    [{"type": "reasoning", "text": "SECRET"}, {"type": "output_text", "text": "It sorts."}, {"type": "text"}],
    [{"type": "thinking", "thinking": [{"type": "text", "text": "SECRET"}]}, {"type": "text", "text": " It sorts."}],
    [{"type": "image_url", "image_url": {"url": "data:"}}, {"type": "text", "text": "It sorts."}, None],
    [{"type": "text", "text": "<think>SEC"}, {"type": "text", "text": "RET</think>It sorts."}]])
def test_content_in_parts_is_the_text_of_its_parts(proxied, content):
    proxy = proxied(lambda *_: said(content, reasoning_content="SECRET"))
    assert EndpointHuman(proxy.url, Server(model="m")).reply([TASK], [dialogue()]) == ["It sorts."]


@pytest.mark.parametrize("kind", [k for k in Proxy.FAULTS if k not in ("cut", "cut short")] + [
    {"choices": []}, {"choices": None}, {"choices": [{"message": None}]}, {"choices": "text"}, said(5),
    said(0), said({}), said({"type": "text"})])
def test_every_fault_that_may_pass_is_asked_again(proxied, kind):
    asked = []

    def fault(_, body):
        if not body:
            return said("a list of models?")
        asked.append(body)
        return said("later") if len(asked) > 3 else {**kind} if isinstance(kind, dict) else kind
    human = EndpointHuman(proxied(fault, delay=4.0).url, Server(model="m", timeout=2.0))
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


def raw(status, text, kind="text/plain"):
    """A fault: an answer whose body is this text."""
    def answer(handler):
        handler.send_response(status)
        handler.send_header("content-type", kind)
        handler.send_header("content-length", str(len(text.encode())))
        handler.end_headers()
        handler.wfile.write(text.encode())
    return answer


@pytest.mark.parametrize("status, text", [
    (400, '{"error": {"message": "WORDS", "code": 7}}'), (401, '{"error": {"message": "WORDS"}}'),
    (403, '{"error": "WORDS"}'), (404, '{"object": "error", "message": "WORDS"}'), (404, '{"detail": "WORDS"}'),
    (404, '{"error": "Not Found", "message": "WORDS"}'), (422, '{"error": null, "detail": [{"msg": "WORDS"}]}'),
    (500, '{"error": {"message": "{\\"error\\": \\"WORDS\\"}"}}'), (500, '["WORDS"]'), (503, "WORDS"), (400, "WORDS"),
    (500, "<!doctype html><html><head><title>502</title><style>p{}</style></head>\n<body><p>WORDS</p></body></html>"),
    (200, '{"error": {"message": "WORDS"}}'), (200, "WORDS"), (200, "<html><body>WORDS</body></html>")])
def test_a_servers_own_words_reach_the_user_without_the_key(proxied, monkeypatch, capsys, status, text):
    """At the start and later, shortened, with the key blotted out; of a page, what can be read."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    spoiled = raw(status, text.replace("WORDS", f"no model  m for {KEY}: " + "x" * 999))
    proxy = proxied(lambda number, _: {"data": [{"id": "m"}]} if number == 0 else spoiled)
    human = EndpointHuman(proxy.url, Server(retries=0))
    assert human.reply([TASK], [dialogue()]) == [None]
    with pytest.raises(InputError) as caught:
        EndpointHuman(proxy.url, Server())
    for told in (capsys.readouterr().err, str(caught.value)):
        assert "no model m for ***: xxx" in told and KEY not in told and len(told) < 500
        assert "p>" not in told and "p{" not in told and "x>" not in told


def test_without_a_key_no_word_is_blotted_out(proxied, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    proxy = proxied(lambda *_: raw(403, "none of your business"))
    with pytest.raises(InputError, match="none of your business"):
        EndpointHuman(proxy.url, Server())


def dribble(seconds):
    """A fault: the body, or the lines before it, arrive bit by bit; each bit long before any limit."""
    def answer(handler):
        body = json.dumps(said("late")).encode()
        text = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        for i in range(20):
            handler.wfile.write(text[len(text) * i // 20:len(text) * (i + 1) // 20])
            handler.wfile.flush()
            time.sleep(seconds / 20)
    return answer


def test_the_time_limit_is_for_the_whole_request(proxied):
    """A request over its time is lost, as one that fails, and its connection is closed; no thread is left behind."""
    ended, asked = [], []

    def slowly(handler):
        begin = time.monotonic()
        try:
            dribble(6.0)(handler)
        finally:
            ended.append(time.monotonic() - begin)

    def fault(_, body):
        asked.extend([body] * bool(body))
        return slowly if body and len(asked) == 1 else said("in time")
    human, threads = EndpointHuman(proxied(fault).url, Server(model="m", timeout=0.6)), set(threading.enumerate())
    begin = time.monotonic()
    assert human.reply([TASK], [dialogue()]) == ["in time"]
    assert 0.6 < time.monotonic() - begin < 5.0 and len(asked) == 2
    while not ended or [t for t in set(threading.enumerate()) - threads if "process_request" not in t.name]:
        assert time.monotonic() - begin < 10.0, threading.enumerate()  # the look-up of the host ends a moment later
        time.sleep(0.05)
    assert ended[0] < 5.0


@pytest.mark.parametrize("fault", [dribble(12.0), lambda handler: time.sleep(6), raw(200, "x" * 10)])
def test_a_server_that_is_always_late_is_gone(proxied, fault):
    proxy = proxied(lambda _, body: fault if body else said(""))
    human = EndpointHuman(proxy.url, Server(model="m", timeout=0.3, retries=1))
    begin = time.monotonic()
    assert human.reply([TASK] * 3, [dialogue()] * 3) == [None] * 3
    assert time.monotonic() - begin < 5.0 and ("0.3 seconds" in human.endpoint.gone or "xxxxx" in human.endpoint.gone)


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


# ------------------------------------------------------------------ thoughts

CHANNEL, FINAL = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize("before", [
    "<think>SECRET</think>", "<think>\nSECRET\n</think>\n\n", "SECRET</think>", "<THINK>SECRET</Think>", "<think/>",
    "<thinking>SECRET</thinking>", "<thought>SECRET</thought>", "<reasoning>SECRET</reasoning>", "<think></think>\n",
    '<think type="long" n=2>SECRET</think>', "< think >SECRET< / think >", "<think\n>SECRET</think\n>", "</ think>",
    "<think>a<think>SECRET</think>SECRET</think>", "<think>SECRET</think>One.<think>SECRET</think>", "<think />",
    "Well. <think>SECRET</think>", "<think>a < b </b> SECRET</think>", "[THINK]SECRET[/THINK]", "SECRET[/THINK]",
    "◁think▷SECRET◁/think▷", "<seed:think>SECRET</seed:think>", "<|START_THINKING|>SECRET<|END_THINKING|>",
    "<|begin_of_thought|>SECRET<|end_of_thought|>", "<|channel>thought\nSECRET<channel|>", CHANNEL + "SECRET" + FINAL,
    CHANNEL + "SECRET<|end|><|start|>assistant<|channel|>commentary to=f<|message|>SECRET" + FINAL, "SECRET" + FINAL,
    CHANNEL + "SECRET<|channel|>final <|constrain|>json<|message|>", "analysisWe need SECRETassistantfinal"])
def test_what_stands_behind_a_thought_counts(before):
    assert spoken(before + "It sorts.\n") == "It sorts."
    for after in ("<think>SECRET", "\n[THINK]SECRET", "<thinking>", "◁think▷SECRET", CHANNEL + "SECRET", "<|return|>"):
        assert spoken(before + "It sorts." + after) == "It sorts."
    assert spoken(before) == ""


@pytest.mark.parametrize("text", [
    "<think>SECRET", "<think>SECRET</thi", "<thinking>SECRET", "[THINK]SECRET", "◁think▷SECRET", CHANNEL + "SECRET",
    "<|START_THINKING|>SECRET", "analysisWe need SECRET", "<think>a</think><think>SECRET", "<think>a<think>SECRET"])
def test_a_thought_that_was_cut_off_says_nothing(text):
    assert spoken(text) == ""


@pytest.mark.parametrize("text", [
    "I think so.", "if a < b and c > d, think", "a < thought and b > c", "My thinking: it sorts.", "analysis of a list",
    "<html><body class='think'><h1>x</h1></body></html>", "It is <b>red</b>, I think.", "<thinker>", "List[Think]",
    "<thought-bubble>x</thought-bubble>", "It returns '[reason]' or '<reason>'.", "a<think", "<p data-x='think'>y</p>"])
def test_words_about_thinking_stay(text):
    assert spoken(text) == text


def test_hostile_text_takes_no_time():
    begin = time.monotonic()
    for text in ("<think ", "<", "< ", "_", "a:", "<think" + " " * 99, "<|channel|>final", "<think a=", "</think"):
        spoken(text * 20000)
    assert time.monotonic() - begin < 15.0


def test_a_servers_thought_is_gone_before_the_cut(proxied, capsys):
    proxy = proxied(lambda *_: said("<think>" + "SECRET " * 200 + "</think>" + "x" * 5000))
    assert EndpointHuman(proxy.url, Server(model="m")).reply([TASK, PAGE], [dialogue()] * 2) == ["x" * 400, "x" * 1000]
    assert capsys.readouterr().out == ""


OPEN = CHAT.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif").replace(
    "m['role'] + '\n' +", "m['role'] + ('\n<think>\n' if m['role'] == 'assistant' else '\n') +")


@pytest.mark.parametrize("marks", ["special", "plain", "letters"])
@pytest.mark.parametrize("template", [CHAT, OPEN])
def test_a_local_models_thoughts_are_its_own(tmp_path, monkeypatch, capsys, marks, template):
    """Whether its marks are special tokens, added ones or letters, and where the template begins the thought."""
    control = ("<|im_start|>", "<|im_end|>", "<|endoftext|>") + ("<think>", "</think>") * (marks == "special")
    human = ModelHuman(save_model(tmp_path, template=template, control=control,
                                  plain=("<think>", "</think>") * (marks == "plain")))
    texts = ["<think>SECRET</think>\nIt sorts.<|im_end|>", "SECRET</think>It sorts.<|im_end|>", "<think>SECRET",
             "<think>SECRET</think><|im_end|>", "SECRET" if template == OPEN else "It sorts.<|im_end|>"]

    def written(*_, stop, **__):
        made = [human.speaker.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [ids[:-1] if ids[-1] in stop else ids for ids in made]
    monkeypatch.setattr(machinery.speaker, "sample", written)
    last = NO_PREFERENCE if template == OPEN else "It sorts."
    agent = dialogue("Is <think> a tag?")  # of the agent's, not of this model's
    assert human.reply([TASK] * 5, [agent] * 5) == ["It sorts.", "It sorts.", NO_PREFERENCE, NO_PREFERENCE, last]
    assert "3 replies" in (out := capsys.readouterr().out) or template == CHAT and "2 replies" in out


# ------------------------------------------------------------------ greedy

@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    """(its folder, the ids of a prompt, what an own loop of argmax makes of them)"""
    folder = tmp_path_factory.mktemp("greedy")
    speaker = ModelHuman(save_model(folder, seed=11)).speaker
    prompt, _ = render(speaker.tokenizer, prompt_for(TASK, dialogue()))
    return folder, prompt, likeliest(speaker.model, prompt, 16)


def likeliest(model, prompt, n, ends=()):
    """A loop of argmax over whole sequences, one at a time, without a cache: up to n ids, or up to one of `ends`."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + n and ids[len(prompt):][-1:] not in [[end] for end in ends]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt):]


def overheard(monkeypatch):
    """A list that gets the ids of all that a local model says from now on."""
    made, plain = [], machinery.speaker.sample

    def listening(*args, **how):
        made.extend(turns := plain(*args, **how))
        return turns
    monkeypatch.setattr(machinery.speaker, "sample", listening)
    return made


@pytest.mark.parametrize("default", [
    {"repetition_penalty": 2.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 4}, {"num_beams": 3, "length_penalty": 9.0},
    {"suppress_tokens": "FIRST"}, {"begin_suppress_tokens": "FIRST"}, {"bad_words_ids": ["FIRST"]}, {"max_time": 1e-9},
    {"sequence_bias": [["FIRST", -99.0]]}, {"forced_bos_token_id": 7}, {"forced_eos_token_id": 8},
    {"exponential_decay_length_penalty": [1, 9.0]}, {"do_sample": True, "temperature": 9.0, "top_p": 0.9},
    {"return_dict_in_generate": True}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}, {"max_length": 3},
    {"stop_strings": "="}])
def test_a_local_model_takes_its_likeliest_tokens(plain_model, monkeypatch, recwarn, caplog, default):
    """Whatever its generation_config.json says: exactly the tokens of a loop of argmax, and no warning."""
    folder, prompt, ids = plain_model
    default = json.loads(json.dumps(default).replace('"FIRST"', json.dumps(ids[:1])))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 258, **default}))
    human, made = ModelHuman(str(folder), Server(max_tokens=16)), overheard(monkeypatch)
    reply, = human.reply([TASK], [dialogue()])
    assert made == [ids]
    assert reply == human.speaker.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert not recwarn.list and not caplog.records


@pytest.mark.parametrize("eos", [None, 70, [70, 71], [258]])
def test_a_local_model_stops_at_the_end_of_a_turn_and_at_its_own(plain_model, monkeypatch, eos):
    folder, prompt, ids = plain_model
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "min_new_tokens": 9}))
    human, made = ModelHuman(str(folder), Server(max_tokens=16)), overheard(monkeypatch)
    own, model, tokenizer = eos if isinstance(eos, list) else [eos], human.speaker.model, human.speaker.tokenizer
    head = model.lm_head.weight
    for stop in {end_of_turn(tokenizer), tokenizer.eos_token_id, *own} - {None}:
        with torch.no_grad():
            kept = head[stop].clone()
            head[stop] = 2 * head[ids[2]]  # from now on likelier than the third token
            wanted = likeliest(model, prompt, 16, [stop])
            human.reply([TASK], [dialogue()])
            head[stop] = kept
        assert [*made[-1], stop] == wanted and len(wanted) < 9


# ------------------------------------------------------------------ many at once

QUESTIONS = ["?", "Which one do you mean, the first or the last of them?", "Is it sorted? " * 9, "So?"]


@pytest.fixture(scope="module")
def crowd():
    """Dialogues of several tasks and lengths; three of them on one task, two of these alike."""
    tasks = [TASK, *world.make_tasks(2, seed=3), TASK, PAGE, TASK]
    dialogues = [dialogue(QUESTIONS[i % 4]) for i in range(5)] + [dialogue(QUESTIONS[0])]
    dialogues[3] += [{"role": "user", "content": "The last."}, {"role": "assistant", "content": "Of how many?"}]
    return tasks, dialogues


@pytest.mark.parametrize("rows", [1, 4, 512])
def test_many_dialogues_at_once_are_answered_as_one_by_one(tmp_path, crowd, monkeypatch, rows):
    """Against a loop of argmax: whatever is read together, and wherever the others end."""
    folder, how = save_model(tmp_path, seed=11), (Server(max_tokens=24), Machine(rows=rows))
    speaker = ModelHuman(folder, *how).speaker
    prompts = [render(speaker.tokenizer, prompt_for(*pair))[0] for pair in zip(*crowd)]
    endless = [likeliest(speaker.model, prompt, 24) for prompt in prompts]
    often = max(set(sum(endless, [])), key=lambda token: len({ids.index(token) for ids in endless if token in ids}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": often}))
    human, made = ModelHuman(folder, *how), overheard(monkeypatch)
    replies = human.reply(*crowd)
    assert made == [ids[:ids.index(often)] if often in ids else ids for ids in endless]
    assert len({len(ids) for ids in made}) > 2
    assert replies[0] == replies[5] and len(set(replies)) > 2
    assert human.reply(*[part[::-1] for part in crowd]) == replies[::-1]


def test_what_the_prompts_of_a_task_have_in_common_is_read_once(tmp_path):
    human = ModelHuman(save_model(tmp_path), Server(max_tokens=1))
    prompts = [tuple(render(human.speaker.tokenizer, prompt_for(TASK, dialogue(question)))[0])
               for question in ("Which?", "What?")]
    shared = len(os.path.commonprefix(prompts))
    seen = []
    human.speaker.model.base_model.register_forward_pre_hook(
        lambda _, args, how: seen.append(tuple(how["input_ids"].shape)), with_kwargs=True)
    human.reply([TASK] * 2, [dialogue("Which?"), dialogue("What?")])
    probe = max(rows * tokens for rows, tokens in seen[:-2] if (rows, tokens) != (1, shared))
    assert shared > 400 > probe and seen.count((1, shared)) == 1
    assert seen[-1] == (1, sum(map(len, prompts)) - 2 * shared)


def test_a_temperature_draws_and_its_seed_says_what(tmp_path, crowd):
    """Of each dialogue what its seed says, in any order and company; the frequencies are the model's."""
    folder = save_model(tmp_path, seed=11)

    def human(seed, temperature=1.0, **how):
        return ModelHuman(folder, Server(max_tokens=12, temperature=temperature), Machine(**how), seed)
    replies = human(0).reply(*crowd)
    assert human(0, rows=1).reply(*[part[::-1] for part in crowd])[::-1] == replies
    assert human(1).reply(*crowd) != replies != human(0, 0.0).reply(*crowd)
    assert human(0, 1e-4).reply(*crowd) == human(0, 0.0).reply(*crowd)


@pytest.mark.parametrize("short", [0, 1])
def test_a_dialogue_that_is_too_long_for_a_local_model_has_no_preference(tmp_path, capsys, short):
    """As an empty reply has; what just fits is read, whatever stands beside it."""
    crowd = [TASK] * 3, [dialogue("So?"), dialogue("So? " * 60), dialogue("Is it sorted?")]
    folder, cfg = save_model(tmp_path, seed=11), Server(max_tokens=8)
    speaker = ModelHuman(folder).speaker
    lengths = [len(render(speaker.tokenizer, prompt_for(*pair))[0]) for pair in zip(*crowd)]
    plain = ModelHuman(folder, cfg).reply(*crowd)
    capsys.readouterr()
    save_model(tmp_path, seed=11, context=lengths[2] + 8 - short)
    found = ModelHuman(folder, cfg).reply(*crowd)
    assert found == [plain[0], NO_PREFERENCE, NO_PREFERENCE if short else plain[2]] and NO_PREFERENCE not in plain
    assert f"note: {1 + short} dialogues are too long for the human to read" in capsys.readouterr().err


# ------------------------------------------------------------------ several humans

CROWD = """
from simulator import Human
class One(Human):
    def reply(self, tasks, dialogues):
        return [f"{type(self).__name__} {len(dialogue)}" for dialogue in dialogues]
class Two(One):
    pass
class Short(One):
    def reply(self, tasks, dialogues):
        return super().reply(tasks, dialogues)[1:]
"""


@pytest.fixture
def several(tmp_path, monkeypatch):
    (tmp_path / "sweet_crowd.py").write_text(CROWD)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("sweet_crowd", None)
    return lambda specs, seed=0: make_humans(specs, make_human, seed)


def test_one_of_several_humans_for_each_dialogue(several):
    """Drawn by the seed, the same one to the end, whatever the order and the company."""
    human = several("sweet_crowd:One,sweet_crowd:Two")
    asked = [dialogue(f"{i}?") for i in range(60)]
    replies = human.reply([TASK] * 60, asked)
    who = [reply.split()[0] for reply in replies]
    assert 15 <= who.count("One") <= 45 and who.count("One") + who.count("Two") == 60
    assert human.reply([TASK] * 60, asked[::-1]) == replies[::-1]
    assert [human.reply([TASK], [talk])[0] for talk in asked] == replies
    later = [[*talk, {"role": "user", "content": reply}, *dialogue()[1:]] for talk, reply in zip(asked, replies)]
    assert human.reply([TASK] * 60, later) == [f"{name} 4" for name in who]
    other = [[{"role": "user", "content": "another task"}, *talk[1:]] for talk in asked]
    for changed in (several("sweet_crowd:One,sweet_crowd:Two", 1).reply([TASK] * 60, asked),
                    human.reply([TASK] * 60, other)):
        assert 15 <= sum(a != b for a, b in zip(changed, replies)) <= 45


def test_several_humans_of_all_kinds(several, proxied, tmp_path, capsys):
    folder = save_model(tmp_path / "a,b", seed=11)  # a path with a comma is one
    assert isinstance(several(folder), ModelHuman)
    urls = [proxied(lambda *_, name=name: said(name)).url for name in ("first", "second")]

    def make(spec):
        return make_human(spec, lambda task, talk, rng: "scripted", 0, Server(model="m"))
    human = make_humans(",".join([*urls, "scripted", "sweet_crowd:One"]), make)
    found = human.reply([TASK] * 60, [dialogue(f"{i}?") for i in range(60)])
    assert {reply.split()[0] for reply in found} == {"first", "second", "scripted", "One"}
    capsys.readouterr()
    tell_leaks(human)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"note: {url}: replies that showed code of the reference: 0 of {found.count(name)} (0 after asking"
                     " again)" for url, name in zip(urls, ("first", "second"))]


@pytest.mark.parametrize("specs, words", [
    ("sweet_crowd:One,", "commas between"), (",sweet_crowd:One", "commas between"),
    ("me,scripted,me", "different humans"), ("sweet_crowd:One,nowhere:X", "--human nowhere:X")])
def test_several_humans_that_are_none(several, specs, words):
    with pytest.raises(InputError, match=words):
        several(specs)


def test_one_of_several_humans_has_to_return_texts(several):
    human = several("sweet_crowd:One,sweet_crowd:Short")
    with pytest.raises(InputError, match=r"Short.reply\(\) should return a list of"):
        human.reply([TASK] * 60, [dialogue(f"{i}?") for i in range(60)])


def test_rollouts_with_several_humans_go_on_after_a_stop(several, material, tmp_path, monkeypatch):
    """The file is the same, whatever the number of rows, also after a stop; every dialogue has one human."""
    def run(folder, rows, specs="sweet_crowd:One,sweet_crowd:Two"):
        program.main(["rollout", "--run", str(tmp_path / folder), "--model", material[0], "--tasks", material[1],
                      "--rollout-per-task", "2", "--rollout-max-tokens", "4", "--rollout-max-turns", "3", "--rows",
                      str(rows), "--human", specs])
        return (tmp_path / folder / "trajectories.jsonl").read_bytes()
    whole = run("whole", 512)
    assert run("rows", 5) == whole
    calls, plain = [], DrawnHuman.reply

    def stopped(*how):
        calls.append(how)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(*how)
    monkeypatch.setattr(DrawnHuman, "reply", stopped)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run("stopped", 5)
    assert (tmp_path / "stopped/trajectories.jsonl.partial").read_bytes().count(b"\n") == 5
    assert run("stopped", 5) == whole
    found = [json.loads(line) for line in whole.splitlines()]
    who = [{message["content"].split()[0] for message in record["dialogue_history"][2::2]} for record in found]
    assert {len(names) for names in who} == {1} and len(set.union(*who)) == 2
    with pytest.raises(SystemExit, match="human = 'sweet_crowd:One,sweet_crowd:Two', now it is 'sweet_crowd:Two'"):
        run("whole", 512, "sweet_crowd:Two")


def test_a_prompt_is_for_those_who_read_one(several, tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_text("{solution} {conversation}")
    flags = ["--human-prompt", str(tmp_path / "words.txt"), "--heldout-human", save_model(tmp_path / "m")]
    options = program.parser().parse_args(["--run", str(tmp_path / "run"), *flags])
    run = program.Run(options, program.settings_of(options))
    assert isinstance(run.human(), ScriptedHuman) and run.human(held_out=True).role == "{solution} {conversation}"


def test_settings_name_several_humans_by_content_and_model(tmp_path):
    (tmp_path / "a.gguf").write_text("a model")

    def named(specs):
        options = program.parser().parse_args(["--run", str(tmp_path), "--human", specs, "--human-model", "q"])
        return flat(program.settings_of(options))["human"]
    found = named(f"http://x:1/v1,{tmp_path / 'a.gguf'},mine:A")
    assert found.startswith("server: q,a.gguf (sha256 ") and found.endswith("),mine:A")
    assert named(f"http://y:2/v1,{tmp_path / 'a.gguf'},mine:A") == found
    assert (named("scripted"), named("http://x:1")) == ("scripted", "server: q")


# ------------------------------------------------------------------ other people's prompts

WORDS = "{request}|Solution {solution} {not a name} {}|{conversation}|{solution}"


def test_other_words_for_a_human(proxied, tmp_path, monkeypatch):
    """Filled in once: what a solution, a request or a turn holds in braces stays."""
    (tmp_path / "words.txt").write_text(WORDS)
    task = Task("make {solution}", "x = '{conversation} {request}'")
    talk = dialogue("{solution}?")
    wanted = ("make {solution}|Solution x = '{conversation} {request}' {not a name} {}|You: make {solution}\n"
              "Assistant: {solution}?|x = '{conversation} {request}'")
    proxy, cfg = proxied(lambda *_: said("ok")), Server(model="m", prompt=str(tmp_path / "words.txt"))
    make_human(proxy.url, cfg=cfg).reply([task], [talk])
    assert [json.loads(body)["messages"] for _, body in proxy.log if body] == [[{"role": "user", "content": wanted}]]
    human, told = make_human(save_model(tmp_path / "model"), cfg=cfg), []
    monkeypatch.setattr(human.speaker, "complete", lambda prompts, *_: told.extend(prompts) or ["ok"])
    human.reply([task], [talk])
    assert told == [tuple(render(human.speaker.tokenizer, [{"role": "user", "content": wanted}])[0])]


@pytest.mark.parametrize("text, words", [
    ("{solution}", "{conversation} is missing"), ("{conversation}", "{solution} is missing"), ("", "is missing"),
    ("{solution}{conversation}{reply}", "{reply} is not known"), (b"\xff{solution}{conversation}", "UTF-8"),
    (None, "No such file")])
def test_unfit_words_for_a_human_are_one_line(tmp_path, text, words):
    file = tmp_path / "words.txt"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    for spec in ("http://127.0.0.1:9/v1", "no-such-model"):
        with pytest.raises(InputError, match="--human-prompt") as caught:
            make_human(spec, cfg=Server(model="m", prompt=str(file)))
        assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["scripted", "me", "mine:Human"])
def test_who_reads_no_prompt_is_given_none(spec):
    with pytest.raises(InputError, match="--human-prompt.*" + spec):
        make_human(spec, cfg=Server(prompt="words.txt"))


def test_other_instructions_for_the_agent(material, tmp_path):
    words = tmp_path / "words.txt"

    def run(text, *flags):
        words.write_text(text)
        program.main(["rollout", "--run", str(tmp_path / "run"), "--model", material[0], "--tasks", material[1],
                      "--rollout-per-task", "1", "--rollout-max-tokens", "4", "--rollout-max-turns", "2",
                      "--instructions", str(words), *flags])

    def refused(*how):
        with pytest.raises(SystemExit) as end:
            run(*how)
        return str(end.value)
    assert "{turns} is not known" in (line := refused("You have {turns} turns.")) and "--instructions" in line
    assert not (tmp_path / "run" / "trajectories.jsonl.partial").exists()
    run("Ask {max_turns} times!\n")
    for _, record in read_jsonl(tmp_path / "run" / "trajectories.jsonl"):
        first = record["dialogue_history"][0]["content"]
        assert first == "Ask 2 times!\n\n" + record["task"]["problem_description"]
    assert "instructions = 'words.txt (sha256" in refused("Ask!")


# ------------------------------------------------------------------ leaks

SECRET = Task("Write def total(rows, key): sum it up.", """def total(rows, key):
    \"\"\"Adds (up) the column = key.\"\"\"
    found = [row[key] for row in rows]  # skips = none
    for row in rows:
        x = 1
    result = sum(found)
    return result
""")


@pytest.mark.parametrize("reply, leaks", [
    ("It is found = [row[key] for row in rows].", True),  # the comment behind it does not count
    ("Use `result = sum(found)`.", True), ("result=sum( found )", True), ("Do\n  result  =  sum(found)\nthen", True),
    ("for row in rows: something", True), ("def total(rows, key): adds", False), ("return result", False),
    ("x = 1", False), ("Adds (up) the column = key.", False), ("skips = none", False),
    ("The sum of the column.", False), ("Result = Sum(Found)", False), ("", False)])
def test_which_replies_show_code(reply, leaks):
    assert shows_code(reply, SECRET) == leaks


CODE = "It is result = sum(found)."
FATES = {"plain": ["The sum."], "once": [CODE, "Add it up."], "twice": [CODE, CODE], "mute": [CODE, ""]}


def tells(told):
    """What a model says that is asked so: by the word in the agent's question."""
    name, = [name for name in FATES if f"{name}?" in told[0]["content"]]
    if len(told) == 3:  # asked again, after what it said
        assert told[1] == {"role": "assistant", "content": CODE} and "code" in told[2]["content"]
    return FATES[name][len(told) // 2]


@pytest.mark.parametrize("leaks, replies, line", [
    ("replace", ["The sum.", "Add it up.", NO_PREFERENCE, NO_PREFERENCE], "3 of 4 (1 after asking again)"),
    ("keep", ["The sum.", CODE, CODE, CODE], "3 of 4 (kept)")])
def test_a_reply_that_shows_code_is_asked_for_once_more(proxied, tmp_path, monkeypatch, capsys, leaks, replies, line):
    cfg, asked = Server(model="m", leaks=leaks), ([SECRET] * 4, [dialogue(f"{name}?") for name in FATES])
    local = ModelHuman(save_model(tmp_path), cfg)
    monkeypatch.setattr(local.speaker, "complete", lambda prompts, keys, *_: [tells(told) for *_, told in keys])
    proxy = proxied(lambda _, body: said(tells(json.loads(body)["messages"]) if body else "?"))
    for human in (local, EndpointHuman(proxy.url, cfg)):
        assert human.reply(*asked) == replies
        capsys.readouterr()
        tell_leaks(human)
        assert capsys.readouterr().err == f"note: replies that showed code of the reference: {line}\n"
    assert len([body for _, body in proxy.log if body]) == 4 + 3 * (leaks == "replace")


def test_a_server_that_leaves_before_it_is_asked_again(proxied):
    """What is missing is asked for later, and no reply is made up."""
    human = EndpointHuman(proxied(lambda _, body: said(CODE)).url, Server(model="m", retries=0))
    plain = human.endpoint.complete
    human.endpoint.complete = lambda told: plain(told) if len(told[0]) == 1 else [None] * len(told)
    assert human.reply([SECRET], [dialogue()]) == [None]


def test_a_rollout_counts_the_replies_that_show_code(proxied, material, tmp_path, capsys):
    tasks = [record for _, record in read_jsonl(material[1])]
    secret = max(tasks[0]["ground_truth"].splitlines(), key=len)
    proxy = proxied(lambda _, body: said(secret if body and secret in json.loads(body)["messages"][0]["content"]
                                         else "I do not know"))

    def run(folder, *flags):
        program.main(["rollout", "--run", str(tmp_path / folder), "--model", material[0], "--tasks", material[1],
                      "--rollout-per-task", "1", "--rollout-max-tokens", "4", "--rollout-max-turns", "2", "--human",
                      proxy.url, "--human-model", "m", *flags])
        line, = [line for line in capsys.readouterr().err.splitlines() if "showed code" in line]
        return line, (tmp_path / folder / "trajectories.jsonl").read_text().count(json.dumps(secret.strip()))
    alike = sum(secret in task["ground_truth"] for task in tasks)
    assert run("replaced") == (f"note: replies that showed code of the reference: {alike} of 6 ({alike} after asking "
                               "again)", 0)
    line, shown = run("kept", "--human-leaks", "keep")
    assert line.endswith(f"{alike} of 6 (kept)") and shown == alike
    with pytest.raises(SystemExit, match="human.leaks = 'keep'"):
        run("kept", "--human-leaks", "replace")


# ------------------------------------------------------------------ a real server

def test_a_real_server_replies_as_the_same_model_does_here(server):
    """Greedy decoding in another process gives the text that the model gives when it is loaded here."""
    url, name = server
    tasks = world.make_tasks(4, seed=1)
    dialogues = [dialogue(f"What about step {i}?") for i in range(4)]
    replies = EndpointHuman(url, Server(model=name, max_tokens=12)).reply(tasks, dialogues)
    assert len(set(replies)) > 1 and all(0 < len(reply) <= 400 for reply in replies)
    here = ModelHuman(name, Server(max_tokens=12))
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
