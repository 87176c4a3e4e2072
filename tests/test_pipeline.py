"""The command line, in miniature: every file appears, a killed run ends in the same bytes, an error is one line."""
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import report
import sweet as program
from machinery.files import InputError
from machinery.server import Server
from simulator import SpokenHuman
from worlds import World, find_world

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--base-documents", "1500", "--base-epochs", "2", "--rollout-tasks", "80", "--rollout-per-task", "8",
        "--critic-nll", "0", "--critic-epochs", "1", "--candidates-states", "160", "--candidates-n", "6",
        "--actor-epochs", "1", "--rft-epochs", "1", "--multiturn-epochs", "1", "--eval-tasks", "12",
        "--credit-states", "12", "--credit-monte-carlo-states", "2", "--credit-monte-carlo-rollouts", "4"]
FILES = ["trajectories.jsonl", "samples.jsonl", "candidates.jsonl", "pairs.jsonl", "eval.jsonl", "credit.json"]


def sweet(*args, check=True, cwd=ROOT, env=os.environ, **extra):
    env = {**env, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "sweet.py"), *map(str, args)], cwd=cwd, env=env, text=True,
                          capture_output=True, **extra)
    if check:
        assert done.returncode == 0, done.stderr[-2000:]
    return done


def complaint(done):
    """The one line that a failed command ends with."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """One miniature run of everything, and SWEET without c beside it."""
    run = tmp_path_factory.mktemp("run") / "whole"
    done = sweet("--run", run, *TINY)
    assert "SWEET" in done.stdout and "report:" in done.stdout
    sweet("--run", run, *TINY, "--critic", "without-c")
    return run


def test_every_stage_leaves_its_file(finished):
    for name in FILES:
        assert (finished / name).stat().st_size > 0
    for name in ("base", "critic", "actor", "rft", "multiturn"):
        assert (finished / name / "model.safetensors").exists()
        log = json.loads((finished / name / "log.json").read_text())
        assert len(log) > 0 and all(row["loss"] == row["loss"] for row in log)
    assert "<html" in (finished / "report.html").read_text(encoding="utf-8")
    assert not list(finished.rglob("*.partial"))
    sweet_methods = ["base", "RFT", "multi-turn DPO", "SWEET"]
    methods = [json.loads(line)["method"] for line in (finished / "eval.jsonl").open()]
    assert {name: methods.count(name) for name in set(methods)} == dict.fromkeys(sweet_methods, 24)
    assert {json.loads(line)["method"] for line in (finished / "without-c/eval.jsonl").open()} == {"SWEET without c"}


def test_formats(finished):
    trajectory = json.loads((finished / "trajectories.jsonl").open().readline())
    assert {"problem_description", "ground_truth", "test_cases"} <= set(trajectory["task"])
    first, second = trajectory["dialogue_history"][:2]
    assert first["role"] == "user" and first["content"].endswith(trajectory["task"]["problem_description"])
    assert second["role"] == "assistant" and {"content", "input", "output", "output_ids"} <= set(second)
    assert 0.0 <= trajectory["reward"] <= 1.0 and isinstance(trajectory["answer"], str)
    pairs = [json.loads(line) for line in (finished / "pairs.jsonl").open()]
    for pair in pairs:
        assert [m["role"] for m in pair["chosen"] + pair["rejected"]] == ["assistant", "assistant"]
        assert pair["prompt"][-1]["role"] == "user"
        assert pair["chosen"][0]["output_ids"] != pair["rejected"][0]["output_ids"]
        assert pair["advantages"][0] > pair["advantages"][1]


def test_before_the_first_step_every_preference_loss_is_log_2(finished):
    for name in ("critic", "actor", "multiturn"):
        row = json.loads((finished / name / "log.json").read_text())[0]
        assert abs(row["margin"]) < 1e-4, name
        if name == "critic":  # without its nll term here, so the loss is the preference loss alone
            assert abs(row["loss"] - 0.693147) < 1e-4


def test_a_killed_run_goes_on_to_the_same_bytes(finished, tmp_path):
    """kill -9 in the middle of four stages, seen by what they leave half-written: the same bytes as uninterrupted."""
    run, kills = tmp_path / "killed", 0
    shutil.copytree(finished / "base", run / "base")
    (run / "settings").mkdir()
    shutil.copy(finished / "settings/base.json", run / "settings/base.json")
    for name in ("trajectories.jsonl", "critic", "samples.jsonl", "eval.jsonl", "never"):
        process, half = subprocess.Popen([sys.executable, str(ROOT / "sweet.py"), "--run", str(run), *TINY], cwd=ROOT,
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), run / f"{name}.partial"
        while process.poll() is None and not (half.exists() and half.stat().st_size):
            time.sleep(0.01)
        kills += process.poll() is None
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
    assert kills >= 3 and process.returncode == 0  # a busy machine may miss one
    for name in FILES:
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_torn_line_is_dropped_and_done_again(finished, tmp_path):
    run = tmp_path / "torn"
    shutil.copytree(finished, run)
    whole = (run / "samples.jsonl").read_bytes()
    for name in ("samples.jsonl", "candidates.jsonl", "pairs.jsonl"):
        (run / name).unlink()
    lines = whole.split(b"\n")
    (run / "samples.jsonl.partial").write_bytes(b"\n".join(lines[:70]) + b'\n{"task": {"problem_desc')
    sweet("pairs", "--run", run, *TINY)
    for name in ("samples.jsonl", "candidates.jsonl", "pairs.jsonl"):
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_second_run_does_nothing_and_other_settings_are_refused(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.jsonl")}
    sweet("eval", "--run", finished, *TINY)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.jsonl")}
    line = complaint(sweet("--run", finished, *TINY, "--critic-lr", "0.5", check=False))
    assert "critic.lr" in line and "0.5" in line and "--run" in line
    line = complaint(sweet("--run", finished, *TINY, "--seed", "7", check=False))
    assert "seed" in line


def test_real_tasks_roll_out(finished, tmp_path):
    """ColBench's own task file, the tiny agent: dialogues, grades, no crash (success is not expected)."""
    tasks = ROOT.parent / "shared/colbench/backend.jsonl"
    if not tasks.exists():
        pytest.skip(f"needs ColBench's backend tasks at {tasks}")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(tasks.open(encoding="utf-8").readlines()[:25]), encoding="utf-8")
    run = tmp_path / "colbench"
    asked = ["rollout", "--run", run, "--model", finished / "base", "--tasks", few, "--rollout-per-task", "2",
             "--rollout-max-turns", "3", "--rollout-tasks", "20"]
    line = complaint(sweet(*asked, check=False))  # the small world's human knows nothing of them
    assert f"{few}, line " in line and "--human" in line
    (tmp_path / "human.py").write_text("class Terse:\n    def reply(self, tasks, dialogues):\n"
                                       "        return ['No preference.'] * len(tasks)\n")
    human = ["--human", "human:Terse"]
    sweet(*asked, *human, env={**os.environ, "PYTHONPATH": str(tmp_path)})  # what failed before it began binds nobody
    rows = [json.loads(line) for line in (run / "trajectories.jsonl").open(encoding="utf-8")]
    assert len(rows) == 40
    assert rows[0]["task"] == json.loads(few.open(encoding="utf-8").readline())
    assert all(0.0 <= row["reward"] <= 1.0 and len(row["dialogue_history"]) <= 6 for row in rows)


@pytest.mark.parametrize("content, words", [
    (None, ["No such file"]),
    ('{"problem_description": "a", "ground_truth": "b", "test_cases": {"t": "f()"}}\n{"problem', ["line 2", "JSON"]),
    ('{"problem_description": "a", "ground_truth": "b", "test_cases": {}}\n', ["line 1", "'test_cases' is empty"]),
    ('{"problem_description": "a"}\n', ["line 1", "ground_truth"]),
    ('{"problem_description": "a", "ground_truth": 3}\n', ["line 1", "ground_truth", "str"]),
    ('{"problem_description": "a", "ground_truth": "<html>"}', ["line 1", "test_cases"]),
    ("", ["no task"]),
])
def test_bad_task_files(finished, tmp_path, content, words):
    file = tmp_path / "tasks.jsonl"
    if content is not None:
        file.write_text(content)
    done = sweet("rollout", "--run", tmp_path / "run", "--model", finished / "base", "--tasks", file, check=False)
    line = complaint(done)
    assert str(file) in line and all(word in line for word in words), line
    assert not (tmp_path / "run/trajectories.jsonl").exists()


def test_nothing_to_learn_from(finished, tmp_path):
    run = tmp_path / "hopeless"
    shutil.copytree(finished / "base", run / "base")
    shutil.copytree(finished / "settings", run / "settings")
    rows = [{**json.loads(line), "reward": 0.0} for line in (finished / "trajectories.jsonl").open()]
    (run / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stage in ("critic", "rft", "multiturn"):
        line = complaint(sweet(stage, "--run", run, *TINY, check=False))
        assert "trajectories.jsonl" in line and "success" in line and "--rollout-per-task" in line
        assert not (run / stage).exists()


def test_unknown_flags_and_abbreviations_are_refused():
    assert "--critic-lrr" in complaint(sweet("--critic-lrr=1", check=False))
    assert "--critic-l" in complaint(sweet("--critic-l=1", check=False))
    help_text = sweet("--help-all").stdout
    for word in ("--critic-lr", "--actor-beta", "--no-checkpointing", "paper 2e-07", "(default"):
        assert word in help_text


@pytest.mark.parametrize("flag, value, words", [
    ("--rollout-temperature", "0", "above 0"), ("--rollout-temperature", "nan", "above 0"),
    ("--eval-top-p", "1.5", "at most 1"), ("--critic-nll", "-1", "at least 0"), ("--rows", "0", "above 0"),
    ("--critic", "foo", "bradley-terry or without-c"),
    ("--dtype", "float16", "float32 or bfloat16"), ("--eval-split", "train", "dev or test"),
    ("--critic-lr", "inf", "above 0"), ("--micro-batch", "-1", "at least 0"), ("--candidates-n", "0", "above 0"),
    ("--threads", "0", "above 0"), ("--jobs", "0", "above 0"), ("--seeds", "-1", "above 0")])
def test_a_value_that_is_none_is_one_line(flag, value, words, tmp_path):
    with pytest.raises(SystemExit) as end:
        program.main(["base", "--run", str(tmp_path / "run"), flag, value])
    line = str(end.value)
    assert re.search(rf"{flag} {value}(\.0)?: ", line) and words in line and "\n" not in line
    assert not (tmp_path / "run").exists()


def test_a_file_is_known_by_what_it_holds(tmp_path):
    """Another path to the same content is the same file; other content under the same name is not."""
    def claim(path):
        options = program.parser().parse_args(["--run", str(tmp_path / "run"), "--tasks", str(path)])
        program.Run(options, program.settings_of(options)).claim("rollout")
    (tmp_path / "a").mkdir()
    for folder in (tmp_path, tmp_path / "a"):
        (folder / "tasks.jsonl").write_text("one\n" * 10 ** 6)
    claim(tmp_path / "tasks.jsonl")
    (tmp_path / "run" / "trajectories.jsonl").write_text("begun")
    claim(tmp_path / "a" / "tasks.jsonl")
    (tmp_path / "tasks.jsonl").write_text("one\n" * (10 ** 6 - 1) + "two\n")
    with pytest.raises(InputError) as end:
        claim(tmp_path / "tasks.jsonl")
    digest = hashlib.sha256((tmp_path / "tasks.jsonl").read_bytes()).hexdigest()
    assert "rollout was made with tasks = 'tasks.jsonl" in str(end.value) and digest[:12] in str(end.value)


def test_zero_is_a_value_where_it_means_something():
    settings = program.settings_of(program.parser().parse_args(
        ["--critic-nll", "0", "--pairs-margin", "0", "--lora", "0", "--micro-batch", "0",
         "--credit-monte-carlo-states", "0", "--human-retries", "0"]))
    assert settings["critic"].nll == settings["pairs"].margin == settings["credit"].monte_carlo_states == 0
    assert settings["machine"].lora == settings["machine"].micro_batch == settings["human"].retries == 0


def test_every_preset_is_one_of_values_that_are_allowed():
    for preset in ("small", "paper", "one-gpu"):
        for more in ([], ["--smoke"]):
            settings = program.settings_of(program.parser().parse_args(["--preset", preset, *more]))
            assert settings["candidates"].n == (8 if more else 16)


@pytest.mark.parametrize("replies, words", [
    ("'No preference.'", "list"), ("['a']", "a list of"), ("None", "list"), ("[3] * len(tasks)", "texts")])
def test_a_human_who_does_not_reply_to_each_is_told(finished, tmp_path, monkeypatch, replies, words):
    (tmp_path / "odd.py").write_text(f"class Odd:\n    def reply(self, tasks, dialogues):\n        return {replies}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd", raising=False)
    with pytest.raises(SystemExit) as end:
        program.main(["rollout", "--run", str(tmp_path / "run"), "--model", str(finished / "base"), "--rollout-tasks",
                      "10", "--rollout-per-task", "4", "--human", "odd:Odd"])
    assert "Odd.reply()" in str(end.value) and words in str(end.value)


def test_a_mistake_binds_nobody_and_a_result_does(finished, tmp_path):
    run = ["rollout", "--run", str(tmp_path / "run"), "--rollout-tasks", "10", "--rollout-per-task", "2"]
    for more, words in ((["--model", str(tmp_path)], "tmp"), (["--human", "no:One"], "no:One")):
        with pytest.raises(SystemExit, match=words):
            program.main([*run, "--model", str(finished / "base"), *more])
    program.main([*run, "--model", str(finished / "base")])
    with pytest.raises(SystemExit, match="rollout.temperature = 1.0, now it is 0.5"):
        program.main([*run, "--model", str(finished / "base"), "--rollout-temperature", "0.5"])


def test_play_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit) as end:
        program.main(["play", "--run", str(tmp_path / "none")])
    assert "no trained actor" in str(end.value)


def test_a_full_disk_is_one_line(finished, tmp_path):
    """A file system of one megabyte: the stage stops with one line that says so and leaves no half-written result."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        model = ("--model", finished / "base", "--rollout-tasks", "250")
        line = complaint(sweet("rollout", "--run", small / "run", *model, check=False))
        assert "No space left" in line, line
        assert not (small / "run/trajectories.jsonl").exists()
    finally:
        time.sleep(0.1)
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("stage, left", [("eval", "eval.jsonl"), ("credit", "credit.json")])
def test_a_human_who_leaves_in_an_evaluation_can_come_back(finished, tmp_path, monkeypatch, stage, left):
    """One line, and what is finished is kept; when the human is back, the file is what it would have been."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    whole = [json.loads(line) for line in (run / left).read_text().splitlines()] if stage == "eval" else None
    (run / left).unlink()
    there = World.human

    class Leaving:
        """Answers the first call, and then nobody."""
        def __init__(self, world, *how):
            self.human, self.calls = there(world, *how), 0

        def reply(self, tasks, dialogues):
            self.calls += 1
            replies = self.human.reply(tasks, dialogues)
            return replies if self.calls == 1 else [None] * len(replies)
    monkeypatch.setattr(World, "human", lambda *how: Leaving(*how))
    with pytest.raises(SystemExit) as end:
        program.main([stage, "--run", str(run), *TINY])
    line = str(end.value)
    assert "\n" not in line and "same command" in line and not (run / left).exists()
    monkeypatch.setattr(World, "human", there)
    program.main([stage, "--run", str(run), *TINY])
    assert (run / left).exists()
    if whole:
        assert [json.loads(line) for line in (run / left).read_text().splitlines()] == whole


OTHERS = """
class Other:
    def reply(self, tasks, dialogues):
        return ["Whatever you like best."] * len(tasks)
"""


def humans_said(file):
    """The replies in some dialogues."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {message["content"] for record in records for message in record["dialogue_history"][2::2]}


def test_another_human_evaluates(finished, tmp_path, monkeypatch, capsys):
    """It replies in eval, and in no other dialogue; tables say so, and the run knows it."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (tmp_path / "sweet_others.py").write_text(OTHERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    (run / "eval.jsonl").unlink()
    (run / "credit.json").unlink()
    with pytest.raises(SystemExit, match="--heldout-human: --human sweet_others:Nobody"):
        program.main(["eval", "--run", str(run), *TINY, "--heldout-human", "sweet_others:Nobody"])
    program.main(["eval", "--run", str(run), *TINY, "--heldout-human", "sweet_others:Other"])
    assert humans_said(run / "eval.jsonl") == {"Whatever you like best."}
    program.main(["credit", "--run", str(run), *TINY])
    assert (run / "credit.jsonl").read_bytes() == (finished / "credit.jsonl").read_bytes()
    capsys.readouterr()
    program.main(["report", "--run", str(run)])
    line = "The human in these dialogues: sweet_others:Other, in the offline dialogues: scripted."
    assert line in capsys.readouterr().out and line in (run / "report.html").read_text()
    assert "The human" not in report.results_table([finished], find_world("backend"))
    with pytest.raises(SystemExit, match="heldout_human = 'sweet_others:Other', now it is None"):
        program.main(["eval", "--run", str(run), *TINY, "--heldout-human", ""])


def test_credit_counts_the_replies_that_show_code(finished, tmp_path, monkeypatch, capsys):
    class Model(SpokenHuman):
        def complete(self, tasks, conversations):
            return ["As you like."] * len(tasks)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "credit.json").unlink()
    monkeypatch.setattr(World, "human", lambda *how: Model(Server()))
    program.main(["credit", "--run", str(run), *TINY])
    assert re.search(r"showed code of the reference: 0 of [1-9]\d* \(0 after", capsys.readouterr().err)
