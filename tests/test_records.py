"""Text and records on their way in and out: half characters, odd files, and one line for each fault of a record."""
import io
import json
import sys

import pytest

import actor
import report
import sweet as program
from conftest import byte_tokenizer, tiny_llama
from env import DialogueEnv, Task, known_ids, load_tasks, read_trajectories, render
from machinery import schema
from machinery.files import InputError, JsonlWriter, clean, fingerprint, read_jsonl, write_groups, write_json
from simulator import ConsoleHuman, ScriptedHuman, prompt_for

pytestmark = pytest.mark.slow

HALF, EMOJI, SIGN = "\ud83d", "\U0001f600", "\ufffd"
TASK = {"problem_description": "p", "ground_truth": "def f(): return 1", "test_cases": {"a": "f()"}}
USER, AGENT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
TRAJECTORY = {"task": TASK, "dialogue_history": [USER, AGENT], "reward": 1.0}
STATE = {"task": TASK, "messages": [USER], "candidates": ["a", {"content": "b", "count": 2}]}
PAIR = {"prompt": [USER], "chosen": [AGENT], "rejected": [AGENT]}
TURN = {"content": "a", "output_ids": [1], "ref_sum": 1, "advantage": 0.5}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def complaint(read, path):
    """The one line that reading a file gives."""
    with pytest.raises(InputError) as caught:
        list(read(path))
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(path)), text
    return text


def change(record, path, value):
    """A copy of a record with another value at a path of names and numbers; ... takes it away."""
    record = json.loads(json.dumps(record))
    inner = record
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return record


# ------------------------------------------------------------------ half of a surrogate pair

def test_halves_become_the_replacement_character_and_pairs_their_own():
    assert clean(f"{HALF}a{HALF}{HALF}\udc00b\ud83d\ude00\udfff") == f"{SIGN}a{SIGN}\U0001f400b{EMOJI}{SIGN}"
    assert clean(f"\ufeff{EMOJI}\0é\u2028") == f"\ufeff{EMOJI}\0é\u2028"
    value = {HALF: [HALF, {"n": HALF, "m": [1, None, True, 0.5]}], "k": EMOJI}
    assert clean(value) == {SIGN: [SIGN, {"n": SIGN, "m": [1, None, True, 0.5]}], "k": EMOJI}
    assert HALF in value and clean(None) is None


def test_halves_in_every_text_of_a_file(tmp_path):
    bad = f"x{HALF}y"
    task = {"problem_description": bad, "ground_truth": bad, "test_cases": {bad: bad}, "hidden_information": bad,
            bad: {"deep": [{bad: [bad]}]}, "pair": EMOJI}
    good = json.loads(json.dumps(task).replace("\\ud83dy", SIGN + "y"))  # the pair is written \ud83d\ude00: not hit
    assert good["pair"] == EMOJI and f"x{SIGN}y" in good
    assert load_tasks(write(tmp_path / "t.jsonl", task))[0].to_record() == good
    row = {"task": task, "dialogue_history": [{**USER, "content": bad}, {**AGENT, "content": bad}], "reward": 0}
    [read] = read_trajectories(write(tmp_path / "r.jsonl", row))
    assert read["task"] == good and [m["content"] for m in read["dialogue_history"]] == [f"x{SIGN}y"] * 2
    tokenizer = byte_tokenizer(PLAIN, ["<E>", "<U>"], eos="<E>")
    state = {"task": task, "messages": [{**USER, "content": bad, bad: 1}], "candidates": [bad, {"content": bad + "z"}]}
    [state] = actor.read_candidates(tokenizer, write(tmp_path / "c.jsonl", state))
    assert [c["content"] for c in state["candidates"]] == [f"x{SIGN}y", f"x{SIGN}yz"]
    assert state["messages"] == [{**USER, "content": f"x{SIGN}y", f"x{SIGN}y": 1}] and state["task"] == good


def test_halves_that_are_written_as_bytes(tmp_path):
    """As Python's "surrogatepass" writes them; two that belong together are a character."""
    file = tmp_path / "x.jsonl"
    file.write_bytes(f'{{"a": "{HALF}", "b": "{HALF}x", "c": "\ud83d\ude00"}}'.encode("utf-8", "surrogatepass"))
    assert list(read_jsonl(file)) == [(1, {"a": SIGN, "b": f"{SIGN}x", "c": EMOJI})]


def test_nothing_that_is_written_fails(tmp_path):
    writer = JsonlWriter(tmp_path / "x.jsonl")
    writer.write([{f"k{HALF}": [HALF, EMOJI]}])
    writer.close()
    write_json(tmp_path / "x.json", {HALF: HALF})
    write_groups(tmp_path / "y.jsonl", [0], 1, lambda part, i: [{"text": HALF}], "y")
    assert json.loads((tmp_path / "x.jsonl").read_text("utf-8")) == {f"k{SIGN}": [SIGN, EMOJI]}
    assert json.loads((tmp_path / "x.json").read_text("utf-8")) == {SIGN: SIGN}
    assert json.loads((tmp_path / "y.jsonl").read_text("utf-8")) == {"text": SIGN}
    file = tmp_path / "caf\udce9.jsonl"  # a name that is not UTF-8
    file.write_text("x")
    assert fingerprint(str(file)).startswith(f"caf{SIGN}.jsonl (sha256 ")


PLAIN = ("{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}<A>{% else %}{{ m.content }}<E>{% endif %}"
         "{% endfor %}")


def test_a_reply_with_half_an_emoji_harms_nobody(tmp_path):
    """Two dialogues in one group; one human sends half an emoji, each turn."""
    tokenizer = byte_tokenizer(PLAIN, ["<E>", "<U>", "<A>"], eos="<E>")
    model = tiny_llama(len(tokenizer))
    human = ScriptedHuman(lambda task, dialogue, rng: f"say {HALF}" if task.ground_truth == "odd" else "say")
    tasks = [Task(f"w{HALF}", "odd", {"a": "1"}), Task("w", "even", {"a": "1"})]
    cfg = actor.Rollout(max_turns=3, max_tokens=4)
    rows = actor.play_tasks(model, tokenizer, tasks, human, [1, 2], cfg, grade=lambda a, t: [0.0] * len(a))
    assert [m["content"] for m in rows[0]["dialogue_history"][2::2]] == [f"say {SIGN}"] * 2
    assert rows[0]["dialogue_history"][0]["content"].endswith(f"\n\nw{SIGN}")
    assert rows[1]["dialogue_history"][2]["content"] == "say"
    writer = JsonlWriter(tmp_path / "t.jsonl")
    writer.write(rows)
    writer.close()
    for row, read in zip(rows, read_trajectories(tmp_path / "t.jsonl", tokenizer), strict=True):
        assert render(tokenizer, row["dialogue_history"]) == render(tokenizer, read["dialogue_history"])


def test_a_text_that_is_rendered(tokenizer):
    for texts in (("a" + HALF, "b", "c"), ("a", "b" + HALF, "c")):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        whole = [{**m, "content": m["content"].replace(HALF, SIGN)} for m in messages]
        assert render(tokenizer, messages, HALF) == render(tokenizer, whole, SIGN)


@pytest.mark.parametrize("encoding, errors, typed, heard", [
    ("utf-8", "strict", b"caf\xe9\n", f"caf{SIGN}"), ("utf-8", "surrogateescape", b"caf\xe9\n", f"caf{SIGN}"),
    ("ascii", "strict", "é\n".encode(), SIGN * 2), ("utf-8", "strict", "é\0\n".encode(), "é\0")])
def test_what_is_typed_at_the_terminal(monkeypatch, encoding, errors, typed, heard):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed * 2), encoding, errors))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, "ascii", write_through=True))
    env = DialogueEnv()
    env.reset(Task("p", "g"))
    env.step(f"Which {EMOJI}?")
    human = ConsoleHuman()
    for _ in range(2):
        [reply] = human.reply([env.task], [env.messages])
        assert env.observe(reply)[-1]["content"] == heard
        env.step("And?")
    assert b"agent: Which ??" in screen.getvalue()


# ------------------------------------------------------------------ files

def test_lines_of_all_kinds(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8 \\u0000"}\r\n\r\n  \n\xef\xbb\xbf\n'
                     b'{"a": NaN, "b": 1e999}\n{"a": 3}')
    records = list(read_jsonl(file))
    assert [number for number, _ in records] == [1, 5, 6]
    assert records[0][1] == {"a": "\u2028 \0"} and records[2][1] == {"a": 3}
    assert records[1][1]["a"] != records[1][1]["a"] and records[1][1]["b"] == float("inf")
    [task] = load_tasks(write(tmp_path / "y.jsonl", {**TASK, "n": [1e999, float("nan")]}))
    assert task.extra["n"][0] == float("inf")


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("line, words", [
    (b'{"a": "caf\xe9"}', ["line 2", "UTF-8"]), (b"\x1f\x8b\x08\x00\x00", ["line 2", "UTF-8"]),
    ('{"a": 1}\n'.encode("utf-16"), ["line 2", "UTF-8"]), (b"\0\0\0\0", ["line 2", "JSON"]),
    (b'[{"a": 1}, {"a": 2}]', ["line 2", "expected one JSON object a line; this is one array"]),
    (b'[\n{"a": 1},', ["line 2", "expected one JSON object a line; this is one array"]),
    (b'"a"', ["line 2", "object", "str"]), (b"null", ["line 2", "object", "NoneType"]), (b"7", ["line 2", "int"]),
    (b'{"a": ' + DEEP.encode() + b"}", ["line 2", "recursion"]), (DEEP.encode(), ["line 2", "array"]),
    (b'{"a": ' + b'{"a": ' * 50_000 + b"1" + b"}" * 50_001, ["line 2", "recursion"]),
    (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", ["line 2", "100 lists and objects"]),
    (b'{"a": ' + b"1" * 5000 + b"}", ["line 2", "digits"]), (b'{"a": "\0"}', ["line 2", "JSON"]),
    (b'{"a": 1} {"a": 2}', ["line 2", "JSON"]), (b"{'a': 1}", ["line 2", "JSON"]), (b'{\n"a": 1}', ["line 2", "JSON"])])
def test_lines_that_are_no_record_are_one_line(tmp_path, line, words):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n' + line + b"\n")
    text = complaint(read_jsonl, file)
    assert all(word in text for word in words), text
    assert len(text) < 400


def test_what_is_no_file(tmp_path):
    assert "directory" in complaint(read_jsonl, tmp_path)
    assert "No such file" in complaint(read_jsonl, tmp_path / "none")
    for read, name in ((load_tasks, "task"), (read_trajectories, "dialogue")):
        for content in (b"", b"\n\n", b"\xef\xbb\xbf"):
            (tmp_path / "empty").write_bytes(content)
            assert f"holds no {name}" in complaint(read, tmp_path / "empty")


def test_deep_but_not_too_deep_passes_through_everything(tmp_path):
    """What is read can also be copied and written."""
    deep = json.loads("[" * 98 + "]" * 98)
    [task] = load_tasks(write(tmp_path / "x.jsonl", {**TASK, "deep": deep}))
    assert task.to_record()["deep"] == deep


# ------------------------------------------------------------------ one schema for each kind of record

WRONG_TASKS = [
    (("problem_description",), ..., "'problem_description' is missing"), (("ground_truth",), ..., "is missing"),
    (("problem_description",), "", "is empty"), (("problem_description",), " \n\t\u2003", "is empty"),
    (("ground_truth",), "\n", "is empty"), (("ground_truth",), None, "string"), (("ground_truth",), 3, "string"),
    (("problem_description",), ["p"], "string"), (("problem_description",), True, "string"),
    (("test_cases",), ["f()"], "calls"), (("test_cases",), "f()", "calls"), (("test_cases",), {"a": 5}, "calls"),
    (("test_cases",), {"a": None}, "calls"), (("test_cases",), False, "calls"), (("test_cases",), 0, "calls"),
    (("hidden_information",), ["h"], "string"), (("hidden_information",), 0, "string"),
    (("hidden_information",), {"a": "h"}, "string"), (("hidden_information",), False, "string")]
WRONG_REWARDS = [None, "1", True, False, float("nan"), float("inf"), -float("inf"), 10 ** 400, -10 ** 400, 2, -0.5,
                 1.01, [1.0], {}]
WRONG_IDS = [[-1], [1.5], [True], ["1"], [None], "12", 3, {"0": 1}, [[1]], [1.0], [10 ** 400], [300], [99], True]
WRONG_HISTORIES = [
    None, [], {}, "ua", [USER], [AGENT, USER], [USER, USER], [USER, AGENT, AGENT], [USER, "a"], [USER, None],
    [{"role": "system", "content": "s"}, USER], [USER, {"role": "assistant"}], [[USER, AGENT]],
    [USER, {"role": "assistant", "content": None}], [USER, {"role": "assistant", "content": ["a"]}],
    [USER, {"content": "a"}], [USER, {"role": 1, "content": "a"}], [USER, {"role": "Assistant", "content": "a"}]]
WRONG_PROMPTS = [None, [], {}, "u", [USER, AGENT], [AGENT], [USER, USER], [USER, AGENT, AGENT], [None], [[USER]],
                 [{"role": "user", "content": None}], [{"role": "user"}], [{"role": "system", "content": "s"}]]
WRONG_CANDIDATES = ["a turn", None, {}, {"content": "a"}, [], 3, True]
WRONG_COUNTS = [0, -1, 1.5, True, "3", 10 ** 400, 10 ** 9, [1], float("nan")]
WRONG_CANDIDATE = [3, None, True, [], ["a"], {}, {"text": "a"}, {"content": None}, {"content": 3}, {"content": ["a"]},
                   *({"content": "a", "count": count} for count in WRONG_COUNTS),
                   *({"content": "a", "output_ids": ids} for ids in WRONG_IDS)]


def gapped_tokenizer():
    """Ids 0..255 without 99, 700, and <U>, <E>, <A> at 1000, 1001, 1002: more than its length."""
    from tokenizers import Tokenizer
    made = byte_tokenizer(PLAIN, ["<U>", "<E>", "<A>"], eos="<E>")
    core = json.loads(made.backend_tokenizer.to_str())
    for token in core["added_tokens"]:
        token["id"] += 744
        core["model"]["vocab"][token["content"]] = token["id"]
    vocabulary = core["model"]["vocab"]
    del vocabulary[next(letter for letter, i in vocabulary.items() if i == 99)]
    vocabulary["gone"] = 700
    made._tokenizer = Tokenizer.from_str(json.dumps(core))
    return made


@pytest.fixture(scope="module")
def gapped():
    return gapped_tokenizer()


def candidates(tokenizer):
    """A reader of candidates."""
    return lambda file: actor.read_candidates(tokenizer, file)


def refuses(tmp_path, read, good, path, value, *words):
    """Line 2 of the file is refused, its field named, in one line."""
    file = write(tmp_path / "f.jsonl", good, change(good, path, value))
    text = complaint(read, file)
    field = next(step for step in path if isinstance(step, str))
    assert f"{file}, line 2: field '{field}'" in text and len(text) < 500, text
    for word in words:
        assert word in text, text
    return text


@pytest.mark.parametrize("path, value, words", WRONG_TASKS)
def test_a_task_wherever_it_stands(tmp_path, gapped, path, value, words):
    refuses(tmp_path, load_tasks, TASK, path, value, words)
    name = path[0]
    refuses(tmp_path, read_trajectories, TRAJECTORY, ("task", *path), value, words, f"'{name}'")
    refuses(tmp_path, candidates(gapped), STATE, ("task", *path), value, words, f"'{name}'")


@pytest.mark.parametrize("value", [None, "t", ["t"], 3, True])
def test_a_task_that_is_no_object(tmp_path, gapped, value):
    refuses(tmp_path, read_trajectories, TRAJECTORY, ("task",), value, "object")
    refuses(tmp_path, candidates(gapped), STATE, ("task",), value, "object")


@pytest.mark.parametrize("tests", [..., {}, None])
def test_tests_are_needed_where_the_world_grades_by_them(tmp_path, tests):
    record = change(TASK, ("test_cases",), tests)
    assert load_tasks(write(tmp_path / "t.jsonl", record))[0].test_cases == {}
    assert "'test_cases'" in complaint(lambda file: load_tasks(file, ()), write(tmp_path / "t.jsonl", record))


@pytest.mark.parametrize("reward", WRONG_REWARDS, ids=lambda value: repr(value)[:12])
def test_a_reward_is_a_number_from_0_to_1(tmp_path, reward):
    refuses(tmp_path, read_trajectories, TRAJECTORY, ("reward",), reward, "number from 0 to 1")


def test_rewards_that_are_right(tmp_path):
    values = [0, 1, 0.5, 1e-300, 1.0000003]  # the last one: what rounding makes of a cosine
    rows = list(read_trajectories(write(tmp_path / "t.jsonl", *({**TRAJECTORY, "reward": value} for value in values))))
    assert [row["reward"] for row in rows] == values and all(type(row["reward"]) is float for row in rows)


@pytest.mark.parametrize("history", WRONG_HISTORIES, ids=str)
def test_a_trajectory_is_a_dialogue(tmp_path, history):
    refuses(tmp_path, read_trajectories, TRAJECTORY, ("dialogue_history",), history)


@pytest.mark.parametrize("name", ["task", "dialogue_history", "reward"])
def test_a_trajectory_lacks_nothing(tmp_path, name):
    refuses(tmp_path, read_trajectories, TRAJECTORY, (name,), ..., "is missing")


@pytest.mark.parametrize("ids", WRONG_IDS, ids=lambda value: repr(value)[:12])
def test_ids_are_those_that_the_tokenizer_has(tmp_path, gapped, ids):
    def read(file):
        return read_trajectories(file, gapped)
    refuses(tmp_path, read, TRAJECTORY, ("dialogue_history", 1, "output_ids"), ids, "item 2", "'output_ids'")
    if ids not in ([300], [99], [10 ** 400]):  # which only the tokenizer can tell
        refuses(tmp_path, read_trajectories, TRAJECTORY, ("dialogue_history", 1, "output_ids"), ids, "'output_ids'")


def test_ids_of_a_vocabulary_with_gaps_are_right(tmp_path, gapped):
    ids = [5, 700, 1001]
    assert known_ids(gapped) == {*range(256), 700, 1000, 1001, 1002} - {99} and len(gapped) < 700
    record = change(TRAJECTORY, ("dialogue_history", 1, "output_ids"), ids)
    [row] = read_trajectories(write(tmp_path / "t.jsonl", record), gapped)
    assert row["dialogue_history"][1]["output_ids"] == ids
    [state] = actor.read_candidates(gapped, write(tmp_path / "c.jsonl", change(
        STATE, ("candidates",), [{"content": "a", "output_ids": ids}])))
    assert state["candidates"][0]["output_ids"] == ids


@pytest.mark.parametrize("messages", WRONG_PROMPTS, ids=str)
def test_a_states_messages_end_with_the_humans(tmp_path, gapped, messages):
    refuses(tmp_path, candidates(gapped), STATE, ("messages",), messages)


@pytest.mark.parametrize("value", WRONG_CANDIDATES, ids=str)
def test_candidates_are_a_list(tmp_path, gapped, value):
    refuses(tmp_path, candidates(gapped), STATE, ("candidates",), value)


@pytest.mark.parametrize("candidate", WRONG_CANDIDATE, ids=lambda value: repr(value)[:40])
def test_a_candidate_is_a_turn(tmp_path, gapped, candidate):
    refuses(tmp_path, candidates(gapped), STATE, ("candidates", 1), candidate, "item 2")


def test_null_means_absent_where_a_field_may_be(tmp_path, gapped):
    """As tools write it whose rows all have the same columns."""
    nulls = {"output_ids": None, "count": None}
    [state] = actor.read_candidates(gapped, write(tmp_path / "c.jsonl", {
        **STATE, "messages": [{**USER, **nulls}], "candidates": [{"content": "ab", **nulls}]}))
    assert state["candidates"][0]["count"] == 1 and len(state["candidates"][0]["output_ids"]) == 3
    [row] = read_trajectories(write(tmp_path / "t.jsonl", {
        **TRAJECTORY, "dialogue_history": [{**USER, **nulls}, {**AGENT, **nulls}]}), gapped)
    assert row["dialogue_history"] == [USER, AGENT]


def test_unknown_fields_stay(tmp_path, gapped):
    more = {"x": [1, {"y": None}], "z": "é"}
    record = {**STATE, **more, "messages": [{**USER, **more}], "task": {**TASK, **more}}
    [state] = actor.read_candidates(gapped, write(tmp_path / "c.jsonl", record))
    assert {**state, "candidates": 0} == {**record, "candidates": 0}


@pytest.mark.parametrize("name, kind, good, path, value", [
    ("samples.jsonl", schema.state("ref_sum"), {**STATE, "candidates": [TURN]}, ("candidates", 0, "ref_sum"), "x"),
    ("candidates.jsonl", schema.state("advantage"), {**STATE, "candidates": [TURN]}, ("candidates", 0, "output_ids"),
     ...),
    ("pairs.jsonl", schema.pair(), PAIR, ("chosen",), []),
    ("pairs.jsonl", schema.pair(), PAIR, ("prompt",), [USER, AGENT])])
def test_a_runs_own_files(tmp_path, name, kind, good, path, value):
    run = program.Run(options(["--run", str(tmp_path)]), program.settings_of(options([])))
    write(tmp_path / name, good)
    assert list(run.records(name, kind)) == [good]
    write(tmp_path / name, good, change(good, path, value))
    assert f"{name}, line 2: field '{path[0]}'" in complaint(lambda _: run.records(name, kind), tmp_path / name)


def options(argv):
    return program.parser().parse_args(argv)


def test_a_system_message_in_files(tmp_path):
    """A message of its own in files, a field of the user's first message for their readers; turns keep their places."""
    system, talk = {"role": "system", "content": "Be brief."}, [
        {"role": "user", "content": "p"}, {"role": "assistant", "content": "Which?"},
        {"role": "user", "content": "Any."}, {"role": "assistant", "content": "x"}]
    folded = [{**talk[0], "system": "Be brief."}, *talk[1:]]
    record = {"task": {"problem_description": "p", "ground_truth": "x", "system": "Be brief."}, "reward": 1.0,
              "dialogue_history": [system, *talk], "method": "base", "top_p": 1.0, "answer": "x"}
    write(tmp_path / "eval.jsonl", record)
    read, = read_trajectories(tmp_path / "eval.jsonl")
    assert read["dialogue_history"] == folded
    assert schema.unfold(folded) == [system, *talk] and schema.unfold(talk) == talk
    assert report.evaluations(tmp_path)["base", 1.0][0]["dialogue_history"] == folded
    assert actor.for_files([None, {**record, "dialogue_history": folded}]) == [None, record]
    env = DialogueEnv(3, "")
    assert env.reset(Task.from_record({**record["task"], "test_cases": {"a": "x"}})) == folded[:1]
    for messages in ([system], [system, talk[1]], [talk[0], system], [system, system, *talk]):
        write(tmp_path / "broken.jsonl", {**record, "dialogue_history": messages})
        assert "in turn" in complaint(read_trajectories, tmp_path / "broken.jsonl")


def test_the_reports_reader(tmp_path):
    good = {**TRAJECTORY, "method": "SWEET", "top_p": 1.0, "answer": "a"}
    write(tmp_path / "eval.jsonl", good)
    assert report.evaluations(tmp_path) == {("SWEET", 1.0): [good]}
    for path, value in ((("reward",), "1"), (("method",), None), (("dialogue_history",), "ua"), (("task",), 3)):
        write(tmp_path / "eval.jsonl", good, change(good, path, value))
        with pytest.raises(InputError, match=f"eval.jsonl, line 2: field '{path[0]}'"):
            report.evaluations(tmp_path)


@pytest.mark.parametrize("flag, good, path, value", [
    ("--trajectories", TRAJECTORY, ("reward",), 10 ** 400), ("--candidates", STATE, ("candidates",), "a turn"),
    ("--tasks", TASK, ("hidden_information",), 3), ("--heldout", TASK, ("test_cases",), {})])
def test_a_fault_is_known_before_any_work(tmp_path, flag, good, path, value):
    file = write(tmp_path / "f.jsonl", good, change(good, path, value))
    with pytest.raises(SystemExit) as end:
        program.main(["eval", "--run", str(tmp_path / "run"), flag, str(file)])
    assert f"sweet: {file}, line 2: field '{path[0]}'" in str(end.value)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ what the human knows

@pytest.mark.parametrize("known, told", [(..., TASK["ground_truth"]), (None, TASK["ground_truth"]),
                                         ("", TASK["ground_truth"]), (" \n", TASK["ground_truth"]), (" h\n", " h\n")])
def test_hidden_information_that_is_none_is_the_reference(tmp_path, known, told):
    record = {**TASK, "hidden_information": known} if known is not ... else TASK
    [task] = load_tasks(write(tmp_path / "t.jsonl", record))
    assert task.hidden_information == told and task.to_record() == record
    [prompt] = prompt_for(task, [USER, AGENT])
    assert told in prompt["content"] and "None" not in prompt["content"]
