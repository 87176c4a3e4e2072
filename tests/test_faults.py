"""Departures from the paper's protocol (an answer without its marker, a last turn that is announced), and what went
wrong in dialogues, counted: against texts and dialogues that were written by hand."""
import json

import pytest
from conftest import CHAT, byte_tokenizer, save_model, tiny_llama

import actor
import report
import sweet as program
from env import ANSWER_MARKER, LAST_TURN, DialogueEnv, Grader, Task, answers_in_code, end_of_turn
from machinery import sandbox
from machinery.answers import programs
from machinery.files import InputError
from machinery.train import check_context
from simulator import ScriptedHuman
from studies import faults
from worlds.backend import Backend

REFERENCE = "import math\n\ndef area(r, unit=None):\n    return round(math.pi * r * r)"
TASK = Task("circles, please", REFERENCE, {"a": "area(2)", "b": "area(abs(-1))"})
RIGHT = "```python\n" + REFERENCE + "\n```"
TEXTS = {  # what a text holds, and whether it is an answer without a marker
    f"Sure! Here it is:\n\n{RIGHT}\n\nDoes it fit?": "function",
    REFERENCE: "function",
    "area = lambda r: 3": "function",
    "def area(r):\n    raise ValueError": "function",  # wrong, but there
    "```python\ndef aria(r):\n    return 3\n```": "program",
    "```python\nprint(area(2))\n```": "program",
    "area = 3": "program",
    "```python\ndef area(r):\n    return (3 +\n```": "",  # cut off
    "Should area(r) return a whole number?": "",
    "": "",
}


def test_what_a_text_holds():
    assert programs(list(TEXTS), [TASK] * len(TEXTS)) == list(TEXTS.values())


@pytest.mark.parametrize("on", [True, False])
def test_a_turn_with_the_function_is_an_answer_where_that_is_asked_for(on):
    envs = [DialogueEnv(4, answer_on_code=on) for _ in TEXTS]
    for env in envs:
        env.reset(TASK)
    found = answers_in_code(envs, list(TEXTS))
    assert found == [on and kind == "function" for kind in TEXTS.values()]
    for env, text, answers in zip(envs, TEXTS, found):
        assert env.step(text, answers) is answers
        assert env.answer == (text.strip() if answers else None)


def test_a_text_is_run_once_for_all_that_say_it(monkeypatch):
    run, jobs = sandbox.run, []

    def counting(asked, *limits):
        jobs.extend(asked)
        return run(asked, *limits)
    monkeypatch.setattr(sandbox, "run", counting)
    texts = [REFERENCE, "I cannot", REFERENCE, REFERENCE]
    assert programs(texts, [TASK] * 4) == ["function", "", "function", "function"]
    assert len(jobs) == 2


def test_what_the_grader_has_seen_run_is_not_run_again(monkeypatch):
    texts = ["def area(r):\n    return 4", "def area(r):\n    raise ValueError", "I cannot"]
    grader = Grader()
    rewards = grader(texts, [TASK] * 3)
    assert rewards == [0, 0, 0] and [faults.ran(grader, text, TASK) for text in texts] == [True, False, False]
    assert not faults.ran(Grader(), texts[0], TASK)  # another one knows nothing of it

    asked = []

    def counting(texts, tasks, call_seconds):
        asked.extend(texts)
        return programs(texts, tasks, call_seconds)
    monkeypatch.setattr(faults, "programs", counting)
    history = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "output_ids": [1]}]

    def found(grade):
        records = [{"task": TASK.to_record(), "dialogue_history": history, "answer": text, "reward": reward}
                   for text, reward in zip(texts, rewards)]
        faults.add_faults(records, 1, actor.Rollout(max_turns=1), grade)
        return list(map(had, records))
    assert found(grader) == found(None) == [{"no_marker": 1}, {"no_marker": 1}, {"no_marker": 1, "no_program": 1}]
    assert asked == texts[1:] + texts


def tokenizer():
    return byte_tokenizer(CHAT, ["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")


def played(monkeypatch, turns, max_turns=4, max_tokens=400, context=10 ** 6, **rules):
    """A graded dialogue in which the agent says these turns. What is longer than max_tokens is cut off."""
    letters = tokenizer()
    model, left = tiny_llama(len(letters)), list(turns)
    model.config.max_position_embeddings = context

    def say(model, tokenizer, prompts, keys, *, max_tokens, **_):
        check_context(model, max(map(len, prompts)) + max_tokens, "a turn")  # as the real one does
        ids = tokenizer(left.pop(0), add_special_tokens=False).input_ids
        return [[*ids, end_of_turn(tokenizer)][:max_tokens]]
    monkeypatch.setattr(actor, "sample", say)
    cfg = actor.Rollout(max_turns=max_turns, max_tokens=max_tokens, **rules)
    human = ScriptedHuman(lambda task, dialogue, rng: f"reply {len(dialogue) // 2}")
    record, = actor.play_tasks(model, letters, [TASK], human, [0], cfg)
    return faults.add_faults([record], end_of_turn(letters), cfg)[0]


def had(record):
    """The faults that it had; a record says of each kind how often, of those that it had not, too."""
    assert list(record["faults"]) == list(faults.KINDS)
    return {kind: count for kind, count in record["faults"].items() if count}


def said(record):
    return [message["content"] for message in record["dialogue_history"][1:]]


def test_a_dialogue_ends_with_the_function(monkeypatch):
    record = played(monkeypatch, ["Which unit?", RIGHT, "more"], answer_on_code=True)
    assert (record["answer"], record["reward"]) == (RIGHT, 1.0) and said(record) == ["Which unit?", "reply 1", RIGHT]
    assert had(record) == {"no_marker": 1}
    record = played(monkeypatch, ["Which unit?", RIGHT, f"{ANSWER_MARKER} no"], answer_on_code=False)
    assert (record["answer"], record["reward"]) == ("no", 0.0)


def test_the_last_turn_is_announced_in_the_last_reply_alone(monkeypatch):
    turns = ["a?", "b?", "c?"]
    record = played(monkeypatch, turns, max_turns=3, last_turn_notice=True)
    assert said(record)[1::2] == ["reply 1", f"reply 2{LAST_TURN}"]
    assert said(played(monkeypatch, turns, max_turns=3))[1::2] == ["reply 1", "reply 2"]


def test_a_dialogue_that_outgrows_the_context_ends_on_its_last_turn(monkeypatch):
    turns = ["a?", RIGHT, "c?"]
    whole = played(monkeypatch, turns, max_turns=3)
    read = [len(tokenizer()(message["input"]).input_ids) for message in whole["dialogue_history"][1::2]]
    record = played(monkeypatch, turns, max_turns=3, context=400 + read[2] - 1)
    assert said(record) == ["a?", "reply 1", RIGHT]
    assert (record["answer"], record["reward"]) == (RIGHT, 1.0)
    assert had(record) == {"no_marker": 1, "overran": 1}
    assert "overran" not in had(whole)
    assert had(played(monkeypatch, turns, max_turns=3, context=400 + read[2])) == had(whole)
    with pytest.raises(InputError, match="are more than"):  # nothing was said yet that could be graded
        played(monkeypatch, turns, context=400 + read[0] - 1)


@pytest.mark.parametrize("turns, found", [
    ([f"{ANSWER_MARKER}\n{RIGHT}"], {}),
    ([f"{ANSWER_MARKER}\nJust multiply."], {"no_program": 1}),
    ([f"{ANSWER_MARKER}\ndef aria(r): return 3"], {"no_function": 1}),
    ([f"{ANSWER_MARKER}\ndef area(r): return -1"], {}),  # wrong, which is no fault of form
    (["a?", "b?", "c?", "d?"], {"no_marker": 1, "no_program": 1}),
    (["a" * 60, f"{ANSWER_MARKER}\n{'b' * 60}"], {"cut": 2, "no_function": 1}),  # bbb is a program
    (["a" * 49, f"{ANSWER_MARKER}\ndef area(r): pass"], {}),  # with its end, just as long as it may be
])
def test_faults_of_a_dialogue(monkeypatch, turns, found):
    most = 50 if any("a" * 49 in turn for turn in turns) else 400
    assert had(played(monkeypatch, turns, max_tokens=most)) == found


def test_replies_that_show_code_are_counted(monkeypatch):
    monkeypatch.setattr(ScriptedHuman, "reply", lambda self, tasks, _: ["It is return round(math.pi * r * r)"])
    assert played(monkeypatch, ["a?", "b?", ANSWER_MARKER])["faults"]["leaks"] == 2


# ------------------------------------------------------------------ in a run

def records(counts):
    return [{"method": method, "faults": faults} for method, faults in counts]


def test_a_line_for_each_method(capsys):
    faults.tell("eval", records([("base", {"cut": 3, "no_marker": 1}), ("SWEET", {}), ("base", {"cut": 1})]))
    assert capsys.readouterr().err.splitlines() == [
        "eval, base: 2 dialogues; 1 without the marker, 4 agent turns cut at the token limit",
        "eval, SWEET: 1 dialogues; nothing went wrong"]
    faults.tell("eval", [{"method": "base"}])  # of an older run
    assert faults.table([{"method": "base"}]) == [] and not capsys.readouterr().err


def main(capsys, *args):
    """What the program says, and the line that it ends with if that is an error."""
    try:
        program.main([*map(str, args)])
    except SystemExit as end:
        return str(end.code)
    return capsys.readouterr().out


def test_base_alone_is_evaluated(tmp_path, capsys):
    """Without training, from no more than a model; in groups of --rows; the table names what is not the protocol."""
    model, run = save_model(tmp_path / "model"), tmp_path / "run"
    words = ["eval", "--run", run, "--model", model, "--eval-tasks", 3, "--eval-methods", "base",
             "--rollout-max-turns", 2, "--rollout-max-tokens", 4, "--answer-on-code"]
    out = main(capsys, *words, "--rows", 2)
    found = [json.loads(line) for line in (run / "eval.jsonl").open(encoding="utf-8")]
    assert [(record["method"], record["top_p"]) for record in found] == [("base", 1.0)] * 3 + [("base", 0.9)] * 3
    assert {path.name for path in run.iterdir()} & {"base", "trajectories.jsonl", "critic", "actor", "rft"} == set()
    assert "Not the paper's protocol: --answer-on-code." in out
    total = faults.total(found)
    cells = ["base", "6", *(str(total[kind]) for kind in faults.KINDS)]
    row, = [line for line in out.splitlines() if line.split("|")[1:2] == [" base            "]]
    assert total["no_marker"] == 6 and [cell.strip() for cell in row.split("|")[1:-1]] == cells
    assert "rollout.answer_on_code = True, now it is False" in main(capsys, "eval", "--run", run, "--no-answer-on-code")
    assert "rollout.last_turn_notice" in main(capsys, "eval", "--run", run, "--last-turn-notice")
    assert "--eval-methods bass" in main(capsys, "eval", "--run", run, "--eval-methods", "bass")
    assert report.results_table([run], Backend()) in out


def test_pages_are_no_functions(tmp_path, capsys):
    assert "--answer-on-code" in main(capsys, "rollout", "--task", "frontend", "--run", tmp_path, "--answer-on-code")


def test_pages_are_compared_with_the_base_policys(tmp_path, capsys, monkeypatch):
    for begins in ("work", "table"):
        monkeypatch.setattr(program, begins, lambda *_: None)
    pages = ("--task", "frontend", "--run", tmp_path / "pages", "--eval-methods", "rft,actor")
    for stage in ("eval", "table"):
        assert "sweet: --eval-methods rft,actor: expected base among them" in main(capsys, stage, *pages)
    assert not main(capsys, "critic", *pages)  # evaluates nobody


def test_held_out_tasks_are_enough_for_base_alone(tmp_path, capsys):
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps(TASK.to_record()) + "\n")
    words = ["eval", "--run", tmp_path / "run", "--model", save_model(tmp_path / "model"), "--heldout", file,
             "--rollout-max-turns", 1, "--rollout-max-tokens", 4, "--eval-top-p", 1]
    assert "training tasks are missing" in main(capsys, *words)
    assert "| base" in main(capsys, *words, "--eval-methods", "base")
    assert len((tmp_path / "run/eval.jsonl").read_text().splitlines()) == 1  # top-p 1 is no second way
