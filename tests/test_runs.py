"""A run folder: one process at a time, stops that leave no traceback, files that cannot be read, settings, reasons."""
import dataclasses
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import save_model
from test_train import POINTS, Config, saver, small, squares, weights

import actor
import critic
import sweet as program
from machinery import files, process, sampling, seeds, settings
from machinery.files import InputError, JsonlWriter, put_text, read_json, write_groups, write_json
from machinery.reasons import why_no_pair, why_no_success, why_no_turn_pair
from machinery.train import fit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--base-documents", "300", "--base-epochs", "1", "--rollout-tasks", "30", "--rollout-per-task", "8",
        "--critic-epochs", "1", "--candidates-states", "40", "--candidates-n", "4", "--actor-epochs", "1",
        "--rft-epochs", "1", "--multiturn-epochs", "1", "--eval-tasks", "6", "--credit-states", "4",
        "--credit-monte-carlo-states", "0"]


def sweet(*args, **extra):
    return subprocess.Popen([sys.executable, str(ROOT / "sweet.py"), *map(str, args)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **extra)


def ends(running):
    """(status, stdout, the last line of stderr) of a command, which may end in an error but not in a traceback."""
    out, said = running.communicate(timeout=300)
    assert "Traceback" not in said, said[-3000:]
    return running.returncode, out, (said.strip().splitlines() or [""])[-1]


def main(*args):
    """The line that the program ends with, in this process; None where it ends well."""
    try:
        program.main([*map(str, args)])
    except SystemExit as end:
        return str(end.code)
    return None


def wait_for(condition, running=None, seconds=300.0):
    """Wait until something is so; not for ever, and no longer than a process runs that should bring it about."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or running and running.poll() is not None:
            if running:
                running.kill()
            raise AssertionError("it did not come about")
        time.sleep(0.02)


def trajectory(task, reward, answer="I WANT TO ANSWER:\nx", ids=(1, 2, 3), question="Which values?"):
    history = [{"role": "user", "content": "Tidy."}, {"role": "assistant", "content": question},
               {"role": "user", "content": "Any."},
               {"role": "assistant", "content": answer, "output_ids": list(ids)}]
    return {"task": {"problem_description": f"p{task}", "ground_truth": "def f(): return 1",
                     "test_cases": {"a": "f()"}}, "dialogue_history": history, "reward": reward}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ------------------------------------------------------------------ one process at a time

def test_a_folder_is_held_by_one_process_and_a_killed_one_lets_go(tmp_path):
    hold = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom machinery.process import alone\nimport time\n" \
           f"with alone({str(tmp_path)!r}):\n    print('held', flush=True)\n    time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, "--critic-lr", "7"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        for stage in ("all", "eval", "critic"):
            line = main(stage, "--run", tmp_path)
            assert f"process {holder.pid}" in line and "--critic-lr 7" in line and "since 2" in line
            assert "\n" not in line and not (tmp_path / "settings").exists()
        for more in (["--critic=without-c"], ["table"]):
            assert f"process {holder.pid}" in main(*more, "--run", tmp_path)
    finally:
        holder.kill()
        holder.wait()
    with process.alone(tmp_path):
        pass


def test_a_report_is_made_while_another_process_writes(tmp_path, capsys, monkeypatch):
    with process.alone(tmp_path):
        assert main("report", "--run", tmp_path) is None
    said = capsys.readouterr()
    assert "in use" in said.err and "No results yet" in said.out and (tmp_path / "report.html").exists()
    assert not (tmp_path / "base").exists()  # a report alone trains nothing there
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert main("report", "--run", tmp_path) is None and "can only be read" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()


def test_a_file_system_without_locks_is_said_once(tmp_path, capsys, monkeypatch):
    def refuses(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(fcntl, "flock", refuses)
    with process.alone(tmp_path):
        (tmp_path / "file").write_text("written")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path) in said and "no locks" in said


def test_the_lock_is_not_inherited_by_what_a_killed_process_started(tmp_path):
    hold = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom machinery.process import alone\nimport subprocess\n" \
           f"with alone({str(tmp_path)!r}):\n    child = subprocess.Popen(['sleep', '30'])\n" \
           "    print(child.pid, flush=True)\n    child.wait()"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    child = int(holder.stdout.readline())
    holder.kill()
    holder.wait()
    try:
        with process.alone(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


# ------------------------------------------------------------------ stops

@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("half", ["base.partial", "trajectories.jsonl.partial"])
def test_a_stop_is_one_line_and_the_same_command_goes_on(tmp_path, number, status, half):
    """In training steps and in sampling; `--smoke` is long enough to be met there."""
    if half != "base.partial":
        assert ends(sweet("base", "--run", tmp_path, *TINY))[0] == 0
    args = ["rollout", "--run", tmp_path, *TINY]
    if half == "base.partial":
        args += ["--base-documents", "6000"]
    running = sweet(*args)
    wait_for((tmp_path / half).exists, running)
    running.send_signal(number)
    code, _, line = ends(running)
    assert code == status and "is kept" in line and "same command" in line


def test_a_stop_while_modules_are_imported_is_one_line():
    running = sweet("--help")
    wait_for(lambda: "torch" in Path(f"/proc/{running.pid}/maps").read_text(), running)
    running.send_signal(signal.SIGINT)
    code, _, line = ends(running)
    assert code == 0 or code == 130 and "is kept" in line


def test_a_stop_that_is_raised_in_the_middle_ends_with_130(tmp_path, monkeypatch, capsys):
    def stops(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(program, "run_stage", stops)
    with pytest.raises(SystemExit) as end:
        program.main(["base", "--run", str(tmp_path)])
    assert end.value.code == 130 and "same command" in capsys.readouterr().err


def test_a_stop_while_programs_are_graded_leaves_no_process(tmp_path):
    script = tmp_path / "grades.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom machinery.process import stop_on_signals\n"
                      "stop_on_signals()\nfrom env import Task, grade\nprint('begins', flush=True)\n"
                      "task = Task('p', 'def f(): return 1', {'a': 'f()'})\n"
                      "grade(['def f():\\n    while 1: pass'] + [f'def f():\\n    return {i}' for i in range(400)], "
                      "[task] * 401, call_seconds=30.0, answer_seconds=30.0)\n")
    running = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "begins\n"

    def family(found=()):
        rows = [row.split() for row in subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True,
                                                      text=True).stdout.splitlines()]
        found = {running.pid}
        for _ in range(6):
            found |= {int(pid) for pid, parent in rows if int(parent) in found}
        return found - {running.pid}
    wait_for(lambda: len(family()) > 2, running)
    time.sleep(1.0)
    workers = family()
    running.send_signal(signal.SIGINT)
    code, _, line = ends(running)
    assert code == 130 and "is kept" in line
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), seconds=20)


def test_a_stop_reaches_the_children_of_a_table(tmp_path):
    running = sweet("table", "--run", tmp_path / "t", *TINY, "--base-documents", "9000", "--seeds", "2", "--jobs", "2",
                    "--table-critics=without-c")
    logs = [tmp_path / f"t/seed{seed}.log" for seed in (0, 1)]
    wait_for(lambda: all((tmp_path / f"t/seed{seed}/base.partial").exists() for seed in (0, 1)), running)
    running.send_signal(signal.SIGINT)  # to the table alone
    code, _, line = ends(running)
    assert code == 130 and "same command" in line
    for log in logs:
        assert "Traceback" not in log.read_text() and "stopped by SIGINT" in log.read_text()
    for seed in (0, 1):
        with process.alone(tmp_path / f"t/seed{seed}"):  # nobody is left who would hold it
            pass


# ------------------------------------------------------------------ what is not finite

@dataclasses.dataclass
class Losses:
    lr: float = 1e-2
    beta: float = 0.5
    nll: float = 0.1
    batch_size: int = 4
    epochs: int = 3


def spoils(step, what):
    """A loss whose value, or whose gradient alone, is not finite at one step."""
    seen = []

    def loss_fn(model, part, batch):
        seen.append(part)
        loss, metrics = squares(model, part)
        if len(seen) == step:
            loss = loss * math.inf if what == "loss" else loss + (sum(p.sum() for p in model.parameters()) * 0).sqrt()
        return loss, metrics
    return loss_fn


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("step, flags", [(1, ["--critic-beta", "--critic-nll", "--model"]), (6, ["--critic-lr"])])
def test_a_step_that_is_not_finite_stops_there_and_leaves_nothing(tmp_path, what, step, flags):
    model = small()
    with pytest.raises(InputError) as end:
        fit(model, POINTS, spoils(step, what), tmp_path / "critic", Losses(), 3, saver(model), label="critic",
            checkpoint_seconds=0.0)
    line = str(end.value)
    assert f"step {step} of critic: {what} not finite" in line and all(flag in line for flag in flags), line
    assert ("--critic-lr" in line) == (step > 1)
    assert not list(tmp_path.iterdir())
    again, whole = small(), small()
    log = fit(again, POINTS, squares, tmp_path / "critic", Losses(lr=0.02), 3, saver(again), label="critic")
    assert log == fit(whole, POINTS, squares, tmp_path / "whole", Losses(lr=0.02), 3, saver(whole))


def test_weights_that_are_not_finite_after_the_only_step_are_no_result(tmp_path):
    model = small()
    with pytest.raises(InputError, match="step 1 of rft: weights not finite.*--rft-lr"):
        fit(model, POINTS, squares, tmp_path / "rft", Config(lr=1e38, batch_size=18, epochs=1), 3, saver(model),
            label="rft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("logits, temperature", [
    ([[0.0, math.nan]], 1.0), ([[0.0, math.inf]], 1.0), ([[-math.inf, -math.inf]], 1.0), ([[1.0, 0.0]], 1e-44)])
def test_nothing_is_sampled_from_logits_that_are_not_finite(logits, temperature):
    for top_p in (1.0, 0.9):
        with pytest.raises(InputError, match="logits"):
            sampling.pick(torch.tensor(logits), torch.tensor([0.5]), temperature, top_p)
    assert sampling.pick(torch.tensor([[-math.inf, 0.0]]), torch.tensor([0.0])).tolist() == [1]


def test_scores_that_are_not_finite_rank_nothing(tokenizer, model, trajectories):
    import copy
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    states = [{"task": t["task"], "messages": t["dialogue_history"][:1], "candidates": [
        {"content": "a", "output_ids": [5, 6], "ref_sum": -1.0, "ref_sum_without_c": -1.0}]} for t in trajectories[:2]]
    with pytest.raises(InputError, match="not finite"):
        critic.rank(broken, tokenizer, states)
    with pytest.raises(InputError, match="not finite"):
        critic.score_reference(broken, tokenizer, states)
    critic.rank(model, tokenizer, states)


# ------------------------------------------------------------------ torn files

def half_way(folder, lr=1e-2):
    """A training that was killed after a checkpoint."""
    calls, model = [], small()

    def dies(model, part, batch):
        calls.append(part)
        if len(calls) > 7:
            raise RuntimeError("killed")
        return squares(model, part)
    with pytest.raises(RuntimeError):
        fit(model, POINTS, dies, folder, Config(lr=lr), 3, saver(model), checkpoint_seconds=0.0)
    return Path(f"{folder}.partial/checkpoint.pt")


def other_shape(path, **_):
    state = torch.load(path, weights_only=True)
    state["weights"]["0"] = torch.zeros(7, 1)
    torch.save(state, path)


def other_moments(path, **_):
    state = torch.load(path, weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2)
    torch.save(state, path)


def a_folder(path, **_):
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("x")


@pytest.mark.parametrize("tear", [
    lambda path: path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2]), lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"\0" * 5000), lambda path: path.write_bytes(b"garbage\n" * 99), a_folder,
    other_shape, other_moments, lambda path: torch.save({"log": []}, path), lambda path: torch.save([1], path),
    lambda path: torch.save({**torch.load(path, weights_only=True), "log": []}, path)],
    ids="half empty zeros garbage folder shape moments keys list log".split())
def test_a_checkpoint_that_cannot_be_read_is_set_aside(tmp_path, tear, capsys):
    """With a line; and the result is that of a training from the start, bit for bit."""
    tear(half_way(tmp_path / "out"))
    ours, whole, calls = small(), small(), []

    def counts(model, part, batch):
        calls.append(sorted(p.name for p in (tmp_path / "out.partial").iterdir()))
        return squares(model, part)
    log = fit(ours, POINTS, counts, tmp_path / "out", Config(), 3, saver(ours))
    said = capsys.readouterr().err
    assert "checkpoint.pt cannot be read" in said and said.count("sweet: note") == 1
    assert len(calls) == 15 and calls[0] == ["checkpoint.pt.unreadable"]
    assert log == fit(whole, POINTS, squares, tmp_path / "whole", Config(), 3, saver(whole))
    theirs = weights(tmp_path / "whole")
    assert all(torch.equal(value, theirs[name]) for name, value in weights(tmp_path / "out").items())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["log.json", "weights.pt"]


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """For every kind of file: fsync of what is in it, then the rename, then fsync of the folder."""
    events = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), real_sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"{a} -> {b}"), real_replace(a, b))[1])
    writer = JsonlWriter(tmp_path / "a.jsonl")
    writer.write([{"a": 1}])
    writer.close()
    write_json(tmp_path / "b.json", {})
    put_text(tmp_path / "c.md", "c")
    for name in ("a.jsonl", "b.json", "c.md"):
        at = events.index(f"{tmp_path / name}.partial -> {tmp_path / name}")
        assert events[at - 1] == f"{tmp_path / name}.partial" and events[at + 1] == str(tmp_path)
    events.clear()
    model = small()
    fit(model, POINTS, squares, tmp_path / "out", Config(), 3, saver(model), checkpoint_seconds=0.0)
    work = f"{tmp_path / 'out.partial'}"
    saves = [i for i, event in enumerate(events) if event == f"{work}/checkpoint.pt.new -> {work}/checkpoint.pt"]
    assert len(saves) == 15 and all(events[i - 1] == f"{work}/checkpoint.pt.new" for i in saves)
    end = events.index(f"{work} -> {tmp_path / 'out'}")
    assert {f"{work}/weights.pt", f"{work}/log.json", work} <= set(events[max(saves):end])


@pytest.mark.parametrize("torn", [b'{"i": 2', b'{"i": 2\n{"i": 3}\n', b"\0" * 40 + b"\n", b"[1]\n", b"\xff\xfe\n"])
def test_a_torn_line_and_what_follows_it_are_dropped(tmp_path, torn):
    (tmp_path / "a.jsonl.partial").write_bytes(b'{"i": 0}\n{"i": 1}\n' + torn)
    made = []
    write_groups(tmp_path / "a.jsonl", list(range(5)), 1, lambda part, i: made.append(i) or [{"i": part[0]}], "a")
    assert made == [2, 3, 4]
    assert [json.loads(line)["i"] for line in (tmp_path / "a.jsonl").open()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("torn", [b"", b"{", b"\0\0\0", b"null", b"[]"])
def test_json_files_that_cannot_be_read_are_set_aside(tmp_path, torn, capsys):
    (tmp_path / "seconds.json").write_bytes(torn)
    assert read_json(tmp_path / "seconds.json", {}) == {}
    assert "set aside as seconds.json.unreadable" in capsys.readouterr().err
    assert (tmp_path / "seconds.json.unreadable").read_bytes() == torn
    assert read_json(tmp_path / "seconds.json", {"a": 1}) == {"a": 1} and capsys.readouterr().err == ""
    (tmp_path / "a.jsonl.0-2.unfinished").write_bytes(torn)
    write_groups(tmp_path / "a.jsonl", [0, 1], 2, lambda part, _: [{"i": i} for i in part], "a")
    assert (tmp_path / "a.jsonl").read_text() == '{"i": 0}\n{"i": 1}\n'


# ------------------------------------------------------------------ what does not fit the model

@pytest.fixture(scope="session")
def narrow(tmp_path_factory):
    """A model whose context holds short dialogues only."""
    return save_model(tmp_path_factory.mktemp("narrow") / "model", context=600)


LONG = "x" * 700


@pytest.mark.parametrize("stage", ["critic", "rft", "multiturn", "samples"])
def test_every_stage_refuses_what_does_not_fit(narrow, tmp_path, stage):
    rows = [trajectory(i // 2, float(i % 2)) for i in range(8)]
    rows[5]["dialogue_history"][1]["content"] = LONG
    for row in rows:
        row["dialogue_history"][3].pop("output_ids")
    file = write_lines(tmp_path / "offline.jsonl", rows)
    line = main(stage, "--run", tmp_path / "run", "--model", narrow, "--trajectories", file)
    assert f"{file}, line 6" in line and "600" in line and "\n" not in line, line
    assert not list((tmp_path / "run").glob(f"{stage}*"))


def test_given_candidates_and_held_out_tasks_that_do_not_fit(narrow, tmp_path):
    states = [{"task": trajectory(i, 1.0)["task"], "messages": [{"role": "user", "content": "Tidy."}],
               "candidates": ["a", LONG if i == 2 else "b"]} for i in range(4)]
    file = write_lines(tmp_path / "candidates.jsonl", states)
    offline = write_lines(tmp_path / "offline.jsonl", [trajectory(0, 1.0)])
    given = ["--model", narrow, "--trajectories", offline, "--candidates", file]
    line = main("samples", "--run", tmp_path / "run", *given)
    assert f"{file}, state 3" in line and "600" in line
    assert not list((tmp_path / "run").glob("samples*"))


# ------------------------------------------------------------------ settings

CHANGES = [  # a flag, the first stage whose files depend on it, and the stages that do not
    (["--lora", "4"], "critic", ["base", "rollout", "samples"]),
    (["--critic-lr", "0.5"], "critic", ["base", "rollout", "samples", "rft", "multiturn"]),
    (["--pairs-per-state", "7"], "pairs", ["critic", "candidates", "rft", "multiturn", "credit"]),
    (["--pairs-margin", "0.5"], "critic", ["rollout", "samples", "rft"]),
    (["--rollout-tasks", "31"], "rollout", ["base"]),
    (["--dtype", "bfloat16"], "rollout", ["base"]),
    (["--actor-lr", "0.5"], "actor", ["critic", "pairs", "rft", "credit"]),
    (["--multiturn-per-task", "3"], "multiturn", ["actor", "rft", "credit"]),
    (["--eval-top-p", "0.5"], "eval", ["actor", "credit"]),
    (["--candidates-n", "9"], "samples", ["critic", "rft"]),
    (["--credit-states", "9"], "credit", ["eval"]),
    (["--heldout-human", "mine:Terse"], "eval", ["rollout", "actor", "credit"]),
    (["--base-lr", "0.5"], "base", []),
    (["--rows", "9", "--micro-batch", "1", "--threads", "1", "--human-timeout", "9"], None, list(program.STAGES)),
]


def run_of(folder, *flags):
    options = program.parser().parse_args(["--run", str(folder), *flags])
    return program.Run(options, program.settings_of(options))


def claimed(folder, stages=program.STAGES, *flags):
    """A folder in which these stages have left something, with their settings."""
    run = run_of(folder, *flags)
    for name in stages:
        if name != "report":
            run.claim(name)
            output = run.path(program.STAGES[name].output)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text("something")
    return run


@pytest.mark.parametrize("flags, first, free", CHANGES)
def test_only_what_depends_on_a_setting_is_refused(tmp_path, flags, first, free):
    claimed(tmp_path)
    other = run_of(tmp_path, *flags)
    for name in free:
        other.claim(name)
    for name in [] if first is None else [first, "report"]:
        with pytest.raises(InputError) as end:
            other.claim(name)
        assert f"{first} was made with " in str(end.value) and " now it is " in str(end.value)


@pytest.mark.parametrize("stage", ["eval", "credit", "best-of-n"])
def test_held_out_tasks_may_be_the_first_of_a_file(tmp_path, stage):
    """Then a stage is bound to that file, also where nothing is trained on the rest of it."""
    line = json.dumps({"problem_description": "p", "ground_truth": "def f():\n    return 1"})
    (tmp_path / "a.jsonl").write_text(f"{line}\n" * 3)
    (tmp_path / "b.jsonl").write_text(f"{line}\n" * 4)
    given = ["--trajectories", str(tmp_path / "a.jsonl"), "--eval-first", "1", "--eval-methods", "base"]
    claimed(tmp_path / "run", [stage], *given, "--tasks", str(tmp_path / "a.jsonl"))
    with pytest.raises(InputError, match=f"{stage} was made with tasks"):
        run_of(tmp_path / "run", *given, "--tasks", str(tmp_path / "b.jsonl")).claim(stage)


def test_another_critic_evaluates_its_own_actor(tmp_path):
    """Whatever methods the run itself evaluates."""
    assert run_of(tmp_path, "--eval-methods", "base").stages["eval"].after == ["base"]
    other = run_of(tmp_path, "--eval-methods", "base", "--critic", "untrained")
    assert other.stages["eval"].after == ["base", "actor"]


def test_the_message_names_all_that_has_to_go_once(tmp_path):
    claimed(tmp_path)
    claimed(tmp_path, ["critic", "candidates", "pairs", "actor", "eval"], "--critic=without-c")
    (tmp_path / "critic_of_mine").write_text("not the run's")
    (tmp_path / "multiturn").unlink()
    (tmp_path / "multiturn.partial").mkdir()
    (tmp_path / "multiturn.partial/checkpoint.pt").write_text("begun")
    for flags in (["--pairs-margin", "0.5"], ["--rollout-tasks", "31", "--seed", "0"]):
        other = run_of(tmp_path, *flags)
        with pytest.raises(InputError) as end:
            other.claim("report")
        words = shlex.split(str(end.value).split("make room: ")[1])
        assert words[:2] == ["rm", "-r"] and len(set(words)) == len(words)
        named = {str(Path(word).relative_to(tmp_path)) for word in words[2:]}
        own = {"critic", "candidates.jsonl", "pairs.jsonl", "actor", "eval.jsonl"}
        want = own | {"credit.json", "best-of-n.jsonl", "multiturn.partial"}
        if "--rollout-tasks" in flags:
            want |= {"trajectories.jsonl", "samples.jsonl", "rft"} | {f"without-c/{name}" for name in own}
        assert named - {"report.html"} == want
        if flags[0] == "--rollout-tasks":
            subprocess.run(words, check=True)
            other.claim("report")
            other.claim("rollout")
            assert (tmp_path / "critic_of_mine").exists() and (tmp_path / "base").exists()


def test_a_file_of_the_user_is_never_named_as_what_has_to_go(tmp_path):
    file = write_lines(tmp_path / "mine.jsonl", [trajectory(0, 1.0)])
    claimed(tmp_path / "run", ["base", "critic"], "--trajectories", str(file))
    with pytest.raises(InputError) as end:
        run_of(tmp_path / "run", "--trajectories", str(file), "--base-lr", "0.5").claim("critic")
    assert "mine.jsonl" not in str(end.value) and f"{tmp_path}/run/critic" in str(end.value)
    run_of(tmp_path / "run", "--trajectories", str(file), "--rollout-temperature", "0.5").claim("critic")


def test_fields_that_an_older_or_newer_run_does_not_know(tmp_path):
    claimed(tmp_path)
    for file in (tmp_path / "settings").glob("*.json"):
        old = json.loads(file.read_text())
        old.pop("critic.beta", None)
        file.write_text(json.dumps({**old, "critic.gone": 3, "lora": 0}))
    run_of(tmp_path).claim("report")
    with pytest.raises(InputError, match="critic.beta = 1.0, now it is 0.5"):
        run_of(tmp_path, "--critic-beta", "0.5").claim("report")


@pytest.mark.parametrize("flags", [["--preset", "paper"], ["--preset", "one-gpu"], ["--task", "frontend"], ["--smoke"]])
def test_an_older_run_was_made_with_the_defaults_of_its_preset(tmp_path, flags):
    claimed(tmp_path, program.STAGES, *flags)
    for file in (tmp_path / "settings").glob("*.json"):
        old = json.loads(file.read_text())
        file.write_text(json.dumps({"task": old["task"], "seed": 0}))
    run_of(tmp_path, *flags).claim("report")


def test_settings_of_what_is_not_there_bind_nobody(tmp_path):
    claimed(tmp_path, ["base", "rollout"])
    (tmp_path / "trajectories.jsonl").unlink()
    other = run_of(tmp_path, "--rollout-tasks", "31")
    other.claim("rollout")
    (tmp_path / "trajectories.jsonl.partial").write_text("{}\n")
    run_of(tmp_path, "--rollout-tasks", "31").claim("rollout")
    with pytest.raises(InputError, match="rollout.tasks = 31, now it is 120"):
        run_of(tmp_path).claim("rollout")


@pytest.mark.parametrize("torn", ["", "{", "null"])
def test_settings_that_are_torn_are_set_aside(tmp_path, torn, capsys):
    claimed(tmp_path)
    (tmp_path / "settings/critic.json").write_text(torn)
    run_of(tmp_path).claim("report")
    assert "critic.json.unreadable" in capsys.readouterr().err


# ------------------------------------------------------------------ whole runs, in miniature

@pytest.fixture(scope="session")
def done(tmp_path_factory):
    run = tmp_path_factory.mktemp("done") / "run"
    code, out, line = ends(sweet("--run", run, *TINY, "--base-documents", "1500"))
    assert code == 0 and "SWEET" in out, line
    return run


WHOLE = [*TINY, "--base-documents", "1500"]


def test_a_learning_rate_that_is_too_large_stops_and_another_goes_on(done, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(done, run)
    for name in ("critic", "candidates.jsonl", "pairs.jsonl", "actor", "eval.jsonl", "credit.json"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    line = main("pairs", "--run", run, *WHOLE, "--critic-lr", "1e30")
    assert line.startswith("sweet: critic: step ") and "--critic-lr (now 1e+30)" in line and "\n" not in line
    assert not list(run.glob("critic*")) and not list(run.glob("candidates*"))
    assert main("pairs", "--run", run, *WHOLE, "--critic-lr", "1e-3") is None
    assert (run / "pairs.jsonl").read_bytes() == (done / "pairs.jsonl").read_bytes()


def test_tasks_without_held_out_ones(done, tmp_path, capsys, monkeypatch):
    from worlds import backend
    tasks = write_lines(tmp_path / "tasks.jsonl", [task.to_record() for task in backend.make_tasks(30, 0)])
    run, given = tmp_path / "run", ["--model", done / "base", "--tasks", tasks]
    for stage in ("eval", "credit", "play", "table"):
        line = main(stage, "--run", run, *WHOLE, *given)
        assert "--heldout" in line and stage in line and "\n" not in line and not (run / "trajectories.jsonl").exists()
    assert main("--run", run, *WHOLE, *given) is None
    said = capsys.readouterr()
    assert said.err.count("held-out tasks are missing") == 1 and "eval and credit are left out" in said.err
    assert all((run / name).exists() for name in ("actor", "rft", "multiturn", "report.html"))
    assert not (run / "eval.jsonl").exists() and not (run / "credit.json").exists()
    assert "training tasks are missing" in main("--run", tmp_path / "other", "--heldout", tasks)
    assert main("rollout", "--run", run, *WHOLE, *given) is None  # done; alone it needs no held-out tasks


def reading(run, *args):
    """The program where a run can only be read: by its rights, or, for root, whom they do not bind, by a mount."""
    command = [sys.executable, str(ROOT / "sweet.py"), *map(str, args)]
    if os.getuid() == 0:
        mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", mount, str(run), *command]
        if subprocess.run([*command[:6], "true"], capture_output=True).returncode:
            pytest.skip("root needs a mount namespace to make a folder read-only")
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("locked_before", [True, False])
def test_a_finished_run_that_can_only_be_read(done, tmp_path, locked_before):
    run = tmp_path / "run"
    shutil.copytree(done, run)
    if not locked_before:
        (run / ".lock").unlink()
    for path in [run, *run.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, out, line = ends(reading(run, "eval", "--run", run, *WHOLE))
    assert code == 0 and "eval is done already" in out, line
    code, out, line = ends(reading(run, "report", "--run", run, *WHOLE))
    assert code == 0 and "| SWEET " in out and "report.html cannot be written" in line, line
    code, _, line = ends(reading(run, "critic", "--run", run, *WHOLE, "--critic-lr", "0.5"))
    assert code == 1 and "critic.lr" in line
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for path in [run, *run.rglob("*/")]:
        path.chmod(0o755)


def test_a_table_names_the_seed_that_failed_and_why(done, tmp_path):
    """Seed 1 has no dialogue that succeeds; seed 0 is made to the end; seed 2's process is killed."""
    root = tmp_path / "t"
    for seed in (0, 1):
        shutil.copytree(done, root / f"seed{seed}")
        for file in (root / f"seed{seed}/settings").glob("*.json"):
            file.write_text(json.dumps({**json.loads(file.read_text()), "seed": seed}))
    for name in ("critic", "rft", "multiturn", "actor"):
        shutil.rmtree(root / "seed1" / name)
    rows = [{**json.loads(line), "reward": 0.0} for line in (done / "trajectories.jsonl").open()]
    write_lines(root / "seed1/trajectories.jsonl", rows)
    running = sweet("table", "--run", root, *WHOLE, "--seeds", "2", "--jobs", "2", "--table-critics=without-c")
    code, out, line = ends(running)
    assert code == 1 and "1 of 2 seeds failed: seed 1: critic: " in line and "no successful dialogue" in line
    assert "seed 0" not in line and "|" not in out and not (root / "table.md").exists()
    assert (root / "seed0/without-c/eval.jsonl").exists()


def test_a_seed_whose_process_was_killed_is_named_with_its_stage(tmp_path):
    def unfinished(words):
        return f"stage of {words}" if "--seed=4" not in words else ""
    dies = [sys.executable, "-c", "import os, sys; '--critic=oracle' in sys.argv and os.kill(os.getpid(), 9)"]
    chains = {"seed3": {"seed 3": [], "seed 3, oracle": ["--critic=oracle"]}}
    with pytest.raises(InputError) as end:
        seeds.run_chains(dies, tmp_path, chains, 1, unfinished)
    assert "seed 3, oracle: stage of ['--critic=oracle']: it ended with status -9" in str(end.value)
    fine = [sys.executable, "-c", "pass"]
    seeds.run_chains(fine, tmp_path, {"seed3": {"seed 3": []}, "seed4": {"seed 4": ["--seed=4"]}}, 2, unfinished)
    seeds.run_chains(dies, tmp_path, {"seed4": {"seed 4": ["--seed=4", "--critic=oracle"]}}, 2, unfinished)  # is done


# ------------------------------------------------------------------ reasons

CFG, MARKER = actor.Rollout(per_task=8, max_turns=3, max_tokens=12), "I WANT TO ANSWER:"


@pytest.mark.parametrize("rows, margin, given, words, silent", [
    ([], 0.0, "", ["holds no dialogue"], ["--model"]),
    ([trajectory(i, float(i % 2)) for i in range(6)], 0.0, "", ["one dialogue a task", "--rollout-per-task"],
     ["--model"]),
    ([trajectory(i, float(i % 2)) for i in range(6)], 0.0, "f", ["one dialogue a task", "bring"], ["--rollout"]),
    ([trajectory(i // 2, 0.0) for i in range(6)], 0.0, "", ["among 6 on 3 tasks", "--model", "--rollout-per-task"],
     ["--rollout-max"]),
    ([trajectory(i // 2, 0.0, "And then?") for i in range(6)], 0.0, "", ["6 end without an answer",
                                                                         "--rollout-max-turns (now 3)"], ["--model"]),
    ([trajectory(i // 2, 0.0, ids=range(12)) for i in range(6)], 0.0, "", [
        "6 in a turn that is cut off", "--rollout-max-tokens (now 12)"], ["--model"]),
    ([trajectory(i // 2, i % 2 / 2) for i in range(6)], 0.0, "", ["no successful", "--pairs-margin", "0.5"], []),
    ([trajectory(i // 2, 0.0) for i in range(6)], 0.0, "f", ["no successful", "bring"], ["--rollout", "--model"]),
    ([trajectory(i // 2, 1.0) for i in range(6)], 0.0, "", ["all of the 6", "harder"], ["--model", "--rollout"]),
    ([trajectory(i // 2, i % 2 * 0.05) for i in range(6)], 0.1, "", ["0.05", "--pairs-margin (now 0.1)"], ["--model"]),
    ([trajectory(i // 2, float(i < 2)) for i in range(6)], 0.0, "", ["all the same", "--rollout-temperature"],
     ["--model"]),
    ([trajectory(i // 2, float(i < 2), question=f"{i}?") for i in range(6)], 0.0, "", [
        "2 of 6", "on each of the 3 tasks", "--rollout-per-task"], ["--model", "--rollout-temperature"])])
def test_the_reason_for_no_pair_of_dialogues(rows, margin, given, words, silent):
    import random
    assert critic.trajectory_pairs(rows, 9, margin, random.Random(0)) == []
    line = why_no_pair(rows, CFG, MARKER, given, margin)
    assert all(word in line for word in words) and not any(word in line for word in silent), line
    if not any(row["reward"] == 1.0 for row in rows):
        assert "--pairs-margin" not in why_no_success(rows, CFG, MARKER, given)


def state(*advantages, counts=None):
    counts = counts or [1] * len(advantages)
    return {"candidates": [{"content": str(i), "advantage": a, "count": n}
                           for i, (a, n) in enumerate(zip(advantages, counts))]}


@pytest.mark.parametrize("states, given, words", [
    ([], "", ["no state"]), ([state(0.1), state(0.3)], "", ["one candidate a state", "--candidates-n (now 1)"]),
    ([state(0.1, counts=[4])] * 2, "", ["all the same", "--candidates-n"]),
    ([state(0.1)] * 2, "f", ["one candidate a state", "bring"]),
    ([state(0.0, 0.0), state(0.2, 0.2), state(0.4)], "", ["same advantage", "2 states", "--critic-lr"])])
def test_the_reason_for_no_pair_of_turns(states, given, words):
    import random
    for s in states:
        turns = s["candidates"]
        assert not actor.turn_pairs([c["advantage"] for c in turns], [c["count"] for c in turns], 4, random.Random(0))
    line = why_no_turn_pair(states, 1, given)
    assert all(word in line for word in words), line


def test_one_candidate_a_state_is_said_by_the_stage_that_finds_it(done, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(done, run)
    for name in ("samples.jsonl", "candidates.jsonl", "pairs.jsonl", "actor", "eval.jsonl", "credit.json"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    line = main("actor", "--run", run, *WHOLE, "--candidates-n", "1")
    assert line.startswith("sweet: pairs: ") and "one candidate a state" in line and "--candidates-n (now 1)" in line
    assert not (run / "pairs.jsonl").exists() and files.holds_something(run / "candidates.jsonl")
    assert settings.leftovers(run / "pairs.jsonl") == []
