"""The command line: flags, what a run remembers, status, --redo, bars, and what the end says."""
import dataclasses
import json
import logging
import os
import re
import shlex
import warnings
from types import SimpleNamespace

import pytest
import torch

import actor
import sweet as program
from machinery import bars, folder, process, sampling, train
from machinery.files import InputError


def main(*args):
    """The line that the program ends with, in this process; None where it ends well."""
    try:
        program.main([*map(str, args)])
    except SystemExit as end:
        return str(end.code)
    return None


def settings(*args):
    options = folder.recall(program.parser(), [*map(str, args)])
    return program.settings_of(options)


# ------------------------------------------------------------------ flags

@pytest.mark.parametrize("words, said", [
    ("--critic-lrr 1", "--critic-lrr 1: not known; perhaps --critic-lr; "),
    ("--critc_lr=1", "--critc_lr=1: not known; perhaps --critic-lr; "),
    ("--no-checkpointin", "--no-checkpointin: not known; perhaps --no-checkpointing; "),
    ("--smok", "--smok: not known; perhaps --smoke; "),
    ("--critic-l 1", "--critic-l 1: not known; perhaps --critic-lr; "),  # an abbreviation of one flag is none
    ("--heldou f", "--heldou f: not known; perhaps --heldout; "),
    ("report more", "more: not known; "),
    ("stauts", "STAGE stauts: expected all or base or "),
    ("--seed x", "--seed 'x': expected a whole number"),
    ("--seed 1.5", "--seed '1.5': expected a whole number"),
    ("--critic-lr=much", "--critic-lr 'much': expected a number"),
    ("--seed", "--seed: expected a value"),
    ("--seed --smoke", "--seed: expected a value"),
    ("--task web", "--task web: expected backend or frontend"),
    ("--preset big", "--preset big: expected small or paper or one-gpu"),
    ("--eval-split all", "--eval-split all: expected dev or test"),
])
def test_a_typo_is_one_line_with_the_nearest_flag(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = main(*words.split())
    assert line.startswith(f"sweet: {said}") and "\n" not in line and "common." not in line
    assert not list(tmp_path.iterdir())


def test_help_fits_on_a_screen(capsys):
    assert main("--help") == "None"
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 100
    for stage in program.STAGES:
        assert re.search(rf"^    (.*, )?{stage}\b", text, re.M), stage
    assert set(re.findall(r"^    (--[\w-]+)  ", text, re.M)) <= {*program.parser().flags.values(), "--help-all"}
    assert len(re.findall(r"^    --", text, re.M)) <= 14


def test_help_all_has_every_flag_with_its_default_and_the_papers_value(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main("report", "--help-all") in ("0", "None")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for group, kind in program.GROUPS.items():
        for field in dataclasses.fields(kind):
            flag = train.flag_of(group, field)
            said = f"(default {field.default!r}"
            for source, values in (("paper", train.PAPER), ("official code", train.OFFICIAL)):
                if field.name in values.get(group, {}):
                    said += f", {source} {values[group][field.name]!r}"
            said += ")"
            assert re.search(rf" {flag}[, ].*?(\(default .*)", text)[1].startswith(said), (flag, said)
    assert text.count("--critic-lr FLOAT") == 1 and "LR LR" not in text and "--seed INT, " not in text


PAPER = [
    ("critic", {"lr": 2e-7, "beta": 0.1, "nll": 0.01, "batch_size": 8, "epochs": 4,
                "kind": "bradley-terry"}),
    ("actor", {"lr": 2e-7, "beta": 0.1, "nll": 0.01, "batch_size": 8, "epochs": 1}),
    ("rft", {"lr": 2e-7, "batch_size": 32, "epochs": 4}),
    ("multiturn", {"lr": 2e-7, "beta": 0.1, "nll": 0.01, "batch_size": 8, "epochs": 4}),
    ("rollout", {"tasks": 10000, "dialogues": 15000, "max_turns": 10, "max_tokens": 1024}),
    ("eval", {"tasks": 1000, "first": 1000}), ("candidates", {"n": 16, "share": 0.1, "states": 0}),
    ("pairs", {"margin": 0.0, "per_state": 4}), ("machine", {"dtype": "float32"})]
PAPER_ON_PAGES = [
    ("critic", {"lr": 2e-7, "epochs": 8, "kind": "regression"}), ("rft", {"lr": 2e-7, "epochs": 8}),
    ("multiturn", {"beta": 0.1, "epochs": 8}), ("actor", {"lr": 2e-7, "beta": 0.1, "epochs": 1}),
    ("rollout", {"dialogues": 6000, "max_turns": 10}), ("eval", {"tasks": 500}), ("pairs", {"margin": 0.1}),
    ("machine", {"dtype": "bfloat16"})]


@pytest.mark.parametrize("group, values", PAPER)
def test_the_papers_values(group, values, tmp_path):
    made = settings("--run", tmp_path, "--preset", "paper", "--critic-epochs", "2")[group]
    expected = {**values, "epochs": 2} if group == "critic" else values
    assert {name: getattr(made, name) for name in values} == expected


@pytest.mark.parametrize("group, values", PAPER_ON_PAGES)
def test_the_papers_values_on_pages_and_on_a_gpu(group, values, tmp_path):
    made = settings("--run", tmp_path, "--preset", "paper", "--task", "frontend", "--device", "cuda:1")[group]
    assert {name: getattr(made, name) for name in values} == values
    run = run_of(tmp_path, "--preset", "paper", "--task", "frontend")
    assert run.variant == run.root  # the preset's critic is the run's own


def test_every_field_has_a_docstring_and_settings_are_frozen():
    flags = program.parser()
    assert all(len(flags.texts[name]) > 5 for name in flags.places)
    for kind in program.GROUPS.values():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(), dataclasses.fields(kind)[0].name, 1)


# ------------------------------------------------------------------ a run remembers

def run_of(folder_, *flags, stage="all"):
    """A run as a command line makes it."""
    return program.open_run([stage, f"--run={folder_}", *map(str, flags)])


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("something")


def made(root, *flags, stages=program.STAGES):
    """A run in which these stages have left something, with their settings, as a command with these flags would."""
    run = run_of(root, *flags)
    run.variant.mkdir(parents=True, exist_ok=True)
    folder.keep(run)
    for name in stages:
        if run.outputs(name):
            run.claim(name)
            touch(run.path(program.STAGES[name].output))
    return run


def names(root):
    """The files of a run that its stages left."""
    own = {"settings.json", "redo.json", ".lock"}
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} - own


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working directory with a model's folder and two files of tasks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    for name in ("train.jsonl", "held.jsonl"):
        (tmp_path / name).write_text(json.dumps({"problem_description": name, "ground_truth": "def f(): return 1",
                                                 "test_cases": {"a": "f()"}}) + "\n")
    return tmp_path


@pytest.mark.parametrize("flags", [
    [], ["--smoke"], ["--seed=3", "--preset=paper"], ["--model=m"], ["--task=frontend", "--rollout-max-turns=3"],
    ["--tasks=train.jsonl", "--heldout=held.jsonl", "--human=http://x:1", "--human-model=q"], ["--critic=without-c"],
    ["--tasks=train.jsonl"], ["--critic-beta=0.5", "--lora=4", "--checkpointing", "--dtype=bfloat16"],
    ["--preset=one-gpu", "--device=cpu"], ["--human=m,scripted", "--heldout-human=m"]])
def test_no_flag_is_needed_again(flags, files, monkeypatch):
    first = made(files / "r", *flags)
    (files / "elsewhere").mkdir()
    monkeypatch.chdir(files / "elsewhere")
    later = run_of("../r", stage="report")
    assert later.options.task == first.options.task and later.seed == first.seed
    assert later.options.preset == first.options.preset and later.options.smoke == first.options.smoke
    assert later.settings == first.settings and later.variant.resolve() == first.variant.resolve()
    for name in program.STAGES:
        later.claim(name)  # no contradiction
    humans = [spec for spec in later.given.human.split(",") if spec != "scripted" and "://" not in spec]
    given = later.given
    for path in filter(None, (given.model, given.tasks, given.heldout, given.heldout_human, *humans)):
        assert os.path.exists(path)  # from another folder, too
    without = {"settings.json", "without-c/settings.json"}
    for name in without:  # a run that is older than this file: what its stages wrote down
        (files / "r" / name).unlink(missing_ok=True)
    if "--human=http://x:1" not in flags and "--tasks=train.jsonl" not in flags:  # files it knows by name alone
        older = run_of("../r", stage="report")
        assert older.settings["critic"] == first.settings["critic"] and older.seed == first.seed
        assert older.settings["rollout"] == first.settings["rollout"] and older.options.task == first.options.task


def test_flags_given_anew_hold_for_what_is_still_to_be_made(tmp_path):
    made(tmp_path, "--critic-lr=0.5", stages=["base", "rollout", "critic"])
    folder.keep(run_of(tmp_path, "--actor-lr=0.25"))
    later = run_of(tmp_path)
    assert (later.settings["critic"].lr, later.settings["actor"].lr) == (0.5, 0.25)
    folder.keep(run_of(tmp_path, "--critic-lr=0.125", "--actor-lr=2"))  # contradicts what is there
    later = run_of(tmp_path)
    assert (later.settings["critic"].lr, later.settings["actor"].lr) == (0.5, 0.25)
    assert run_of(tmp_path, "--actor-lr=2").settings["actor"].lr == 2


def test_each_half_of_a_run_remembers_its_own(tmp_path):
    made(tmp_path, "--rollout-tasks=7")
    made(tmp_path, "--critic=without-c", "--rollout-tasks=7", "--actor-lr=0.5")
    assert run_of(tmp_path).settings["actor"].lr == 1e-3
    assert run_of(tmp_path, "--critic=without-c").settings["actor"].lr == 0.5


def test_what_a_run_remembers_may_be_spoilt(tmp_path):
    made(tmp_path)
    (tmp_path / "settings.json").write_text('{"seed": "ma')
    before = snapshot(tmp_path)
    assert main("status", "--run", tmp_path) is None and snapshot(tmp_path) == before
    (tmp_path / "settings.json").write_text(json.dumps({"seed": "many"}))
    line = main("report", "--run", tmp_path)
    assert line.startswith(f"sweet: {tmp_path}: what it remembers cannot be used: --seed 'many'")
    assert "\n" not in line


def test_a_device_that_a_report_does_not_need(tmp_path, capsys, monkeypatch):
    made(tmp_path, "--device=meta")
    seen = []
    monkeypatch.setattr(program, "report_alone", lambda run: seen.append(run.machine.device))
    assert main("report", "--run", tmp_path) is None
    assert seen == ["cpu"] and "--device meta" in capsys.readouterr().err


# ------------------------------------------------------------------ contradictions and --redo

@pytest.mark.parametrize("flag, first", [("--critic-lr=9", "critic"), ("--base-lr=9", "base"), ("--rft-lr=9", "rft"),
                                         ("--eval-top-p=0.1", "eval"), ("--candidates-n=3", "samples,credit")])
def test_redo_removes_what_the_message_names(flag, first, tmp_path):
    """One message that names what would have to go; --redo removes exactly that, and is no refusal any more."""
    made(tmp_path)
    before = names(tmp_path)
    line = main("--run", tmp_path, flag)
    assert line.count("was made with") == 1 and f"--redo {first} " in line and "\n" not in line
    named = {word.removeprefix(f"{tmp_path}/") for word in shlex.split(line.partition("rm -r ")[2])}
    run = run_of(tmp_path, flag, f"--redo={first}")
    run.record.check("report")
    with folder_made_ready(run):
        assert before - names(tmp_path) == named and named >= {"report.html"}
        run.claim("report")
    assert not (tmp_path / "redo.json").exists()


def folder_made_ready(run):
    run.todo = {"something": None}
    return folder.remembering(run)


@pytest.mark.slow
def test_redo_that_is_stopped_goes_on(tmp_path, monkeypatch):
    """Killed while it removes: what is left fits together. Killed later: what was made again is kept."""
    made(tmp_path)
    order = [name for name in program.STAGES]
    flags = ["--critic-lr=9", "--redo=critic"]

    def stop(path, removed=[]):  # noqa: B006, one list for all calls
        if len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(path)
        remove(path)
    remove = folder.remove
    monkeypatch.setattr(folder, "remove", stop)
    with pytest.raises(KeyboardInterrupt), folder_made_ready(run_of(tmp_path, *flags)):
        pass
    monkeypatch.setattr(folder, "remove", remove)
    there = [name for name in order if (tmp_path / program.STAGES[name].output).exists()]
    for name in there:  # nothing is there without what it was made from
        assert set(program.STAGES[name].after) <= set(there)
    assert run_of(tmp_path).settings["critic"].lr == 1e-3 and "report" not in there

    with pytest.raises(KeyboardInterrupt), folder_made_ready(run_of(tmp_path, *flags)):
        assert not (tmp_path / "critic").exists() and (tmp_path / "rft").exists()
        touch(tmp_path / "critic")
        raise KeyboardInterrupt
    again = run_of(tmp_path, *flags)
    assert again.redo == []  # the same command
    with folder_made_ready(again):
        assert (tmp_path / "critic").exists()
    assert run_of(tmp_path, *flags).redo == ["critic"]  # it had come to its end
    assert run_of(tmp_path).settings["critic"].lr == 9


def test_a_folder_goes_whole(tmp_path, monkeypatch):
    for name in ("a", "b"):
        touch(tmp_path / "critic" / name)
    monkeypatch.setattr(folder.shutil, "rmtree", lambda path: (path / "a").unlink())  # and is killed there
    folder.remove(tmp_path / "critic")
    assert not (tmp_path / "critic").exists()


@pytest.mark.parametrize("words, said", [
    ("--redo nothing", "--redo nothing: expected a stage that 'all' makes in this run; they are base, "),
    ("critic --redo eval", "--redo eval: expected a stage that 'critic' makes in this run; they are base, rollout, "),
    ("report --redo critic", "--redo critic: expected a stage that 'report' makes in this run; they are none"),
    ("--redo credit --rft-lr 9", "rft was made with rft.lr = 0.001, now it is 9.0")])
def test_a_redo_that_cannot_be_removes_nothing(words, said, tmp_path):
    made(tmp_path)
    before = names(tmp_path)
    line = main("--run", tmp_path, *words.split())
    assert said in line and "\n" not in line and names(tmp_path) == before


# ------------------------------------------------------------------ status

def snapshot(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [root, *root.rglob("*")]}


def test_status_says_what_is_done_and_what_comes_next(tmp_path, capsys):
    made(tmp_path, "--seed=4", stages=["base", "rollout", "critic"])
    (tmp_path / "seconds.json").write_text(json.dumps({"base": 12.0, "rollout": 200}))
    (tmp_path / "trajectories.jsonl").write_bytes(b"x" * 2_340_000)
    touch(tmp_path / "samples.jsonl.partial")
    (tmp_path / ".lock").touch()
    before = snapshot(tmp_path)
    assert main("status", "--run", tmp_path) is None
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:]}
    assert rows["base"][:3] == ["done", "12", "s"] and rows["rollout"][:5] == ["done", "3", "min", "2.3", "MB"]
    assert rows["samples"] == ["begun", str(tmp_path / "samples.jsonl.partial")] and rows["actor"] == ["to", "do"]
    assert f"next: samples (python sweet.py --run {tmp_path})" in out and "seed 4" in out
    assert "lock: free" in out and "begun: stopped on the way; what is finished is kept, the same command" in out
    with process.alone(tmp_path):
        assert main("status", "--run", tmp_path) is None
    out = capsys.readouterr().out
    assert f"lock: held by process {os.getpid()} on " in out and "begun: being made now" in out
    after = snapshot(tmp_path)
    del before[tmp_path / ".lock"], after[tmp_path / ".lock"]
    assert before == after


def test_status_of_what_is_done_and_of_what_is_not_there(tmp_path, capsys):
    made(tmp_path / "r", "--model=m", "--trajectories=t.jsonl")
    assert main("status", "--run", tmp_path / "r") is None
    out = capsys.readouterr().out
    assert "next: nothing, everything is done" in out and re.search(r"^  base +given .*m$", out, re.M)
    assert main("status", "--run", tmp_path / "none") == f"sweet: --run {tmp_path / 'none'}: there is no such run"
    assert main("report", "--run", tmp_path / "none") == f"sweet: --run {tmp_path / 'none'}: there is no such run"
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_status_has_both_halves_and_all_seeds(tmp_path, capsys):
    for seed in (0, 1):
        made(tmp_path / f"seed{seed}", f"--seed={seed}")
    made(tmp_path / "seed1", "--critic=without-c", "--seed=1", stages=["base", "rollout", "critic"])
    assert main("status", "--run", tmp_path) is None
    out = capsys.readouterr().out
    titles = re.findall(r"^(\S+): task", out, re.M)
    assert titles == [str(tmp_path / name) for name in ("seed0", "seed1", "seed1/without-c")]
    assert out.count("everything is done") == 2 and "next: samples" not in out and "next: candidates" in out


@pytest.mark.slow
def test_a_command_that_finds_everything_done_says_so(tmp_path, capsys, monkeypatch):
    made(tmp_path)
    monkeypatch.setattr(program.report, "write", lambda *_, **__: None)
    monkeypatch.setattr(program.report, "results_table", lambda *_: "TABLE")
    assert main("eval", "--run", tmp_path) is None
    assert f"eval is done already: {tmp_path / 'eval.jsonl'}" in capsys.readouterr().out
    assert main("--run", tmp_path) is None
    out = capsys.readouterr().out
    assert "everything is done already" in out and "TABLE" in out
    assert out.endswith(f"report: {tmp_path / 'report.html'}\n") and "mean nothing" not in out


# ------------------------------------------------------------------ bars, and the end

def test_the_end_says_where_the_time_went(tmp_path):
    run = made(tmp_path, "--smoke", stages=["base", "rollout"])
    (tmp_path / "seconds.json").write_text(json.dumps({"base": 300, "rollout": 41.7}))
    lines = folder.closing(run).splitlines()
    assert lines[0] == "time: base 5 min, rollout 42 s; 6 min in all"
    assert lines[1].startswith("not made yet: critic, samples, candidates, pairs, actor, rft, multiturn, eval, credit ")
    assert "--smoke" in lines[2] and "mean nothing" in lines[2] and lines[3] == f"report: {tmp_path / 'report.html'}"


def test_the_line_above_the_bars(tmp_path):
    run = made(tmp_path / "now", stages=[])
    run.todo = dict.fromkeys(["base", "rollout", "samples", "credit"])
    assert folder.place(run, "base") == "sweet: 1 of 4, base"
    (run.root / "seconds.json").write_text(json.dumps({"base": 730}))  # ten times what the default run took
    assert folder.place(run, "samples") == "sweet: 3 of 4, samples, about 17 min left"  # 10 * (35 + 65) seconds
    run.todo |= {"samples": 7.0, "credit": 5.0}
    assert folder.place(run, "samples") == "sweet: 3 of 4, samples, about 12 s left"


@pytest.mark.slow
def test_seconds_are_known_from_a_run_with_the_same_settings(tmp_path):
    for name, flags in (("same", ["--seed=1"]), ("other", ["--base-lr=0.5"])):
        run = made(tmp_path / name, *flags)
        (run.root / "seconds.json").write_text(json.dumps({"base": 7.0 if name == "same" else 99.0}))
    assert folder.measured(run_of(tmp_path / "new", "--seed=2"), "base") == 7.0
    assert folder.measured(run_of(tmp_path / "new", "--base-lr=0.25"), "base") is None


def test_bars_move_within_a_group_of_dialogues(model, tokenizer, tasks, monkeypatch, capsys):
    monkeypatch.setattr(bars, "DELAY", 0)
    for part in (actor, sampling):
        monkeypatch.setattr(part, "progress", lambda *args: bars.tqdm(*args[:1], desc=args[1], mininterval=0))
    human = SimpleNamespace(reply=lambda tasks, dialogues: ["No preference."] * len(tasks))
    actor.play_tasks(model, tokenizer, tasks[:2], human, [0, 1], actor.Rollout(max_turns=3, max_tokens=5))
    said = capsys.readouterr().err
    for bar, steps in (("turns", ["0/3", "1/3", "2/3"]), ("tokens", ["0/5", "1/5", "4/5"])):
        assert all(re.search(rf"{bar}: [^\r]* {step} ", said) for step in steps), bar


def test_a_bar_moves_within_a_step_and_does_not_stay(monkeypatch, capsys):
    monkeypatch.setattr(bars, "DELAY", 0)
    weight = torch.nn.Parameter(torch.zeros(1))
    train.take_step(None, [1.0, 2.0, 3.0, 4.0], lambda model, part, batch: (weight.sum() * sum(part), {}), 1)
    said = capsys.readouterr().err
    assert "micro-batches:   0%" in said and said.split("\r")[-1].strip() == ""
    assert weight.grad.item() == 2.5
    train.take_step(None, [1.0], lambda model, part, batch: (weight.sum() * sum(part), {}), 1)
    assert capsys.readouterr().err == ""  # one part has no bar


def test_no_bar_is_torn_by_a_warning(capsys):
    with bars.whole_bars(), bars.tqdm(total=2, desc="whole") as bar:
        warnings.warn("of a library", stacklevel=1)
        logging.getLogger("transformers.somewhere").warning("from a log")
        bars.note("a note")
        bar.update()
    said = capsys.readouterr().err
    for words in ("UserWarning: of a library", "from a log", "a note"):
        line = next(line for line in re.split(r"[\r\n]", said) if words in line)
        assert "whole" not in line, line
    assert warnings.showwarning.__module__ == "warnings" or "pytest" in warnings.showwarning.__module__


@pytest.mark.slow
def test_a_table_says_to_each_seed_what_it_was_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(program, "run_chains", lambda command, *args: told.extend([command, *args]))
    monkeypatch.setattr(program.report, "results_table", lambda *_: "TABLE")
    flags = ["--seeds=2", "--seed=5", "--table-critics=without-c,oracle", "--critic-lr=0.5", "--smoke"]
    assert main("table", "--run", tmp_path / "t", *flags) is None
    command, root, chains, jobs, unfinished = told
    assert (root, list(chains), jobs) == (tmp_path / "t", ["seed5", "seed6"], 2)
    assert list(chains["seed6"]) == ["seed 6", "seed 6, without-c", "seed 6, oracle"]
    assert (root / "table.md").read_text() == "TABLE"
    made(root / "seed6", "--critic-lr=0.5", "--smoke", "--seed=6", stages=["base", "rollout"])
    assert unfinished(chains["seed6"]["seed 6"]) == "critic"
    for extra, line in (([], chains["seed6"]["seed 6"]), (["--critic=oracle"], chains["seed6"]["seed 6, oracle"])):
        one = program.open_run([*command[2:], *line])
        assert (one.seed, one.settings["critic"].lr, one.options.smoke) == (6, 0.5, True)
        assert (one.variant == one.root) == (not extra) and one.root == tmp_path / "t/seed6"


def test_the_first_rows_of_one_file_are_held_out(tmp_path):
    rows = [{"problem_description": f"task {i}", "ground_truth": "def f(): return 1", "test_cases": {"a": "f()"}}
            for i in range(7)]
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def names(*flags):
        run = run_of(tmp_path / "r", "--tasks", file, *flags)
        return ["".join(t.problem_description[-1] for t in found()) for found in (run.training_tasks, run.held_out)]
    assert names("--eval-first=3") == ["3456", "012"]
    assert names("--eval-first=3", "--rollout-tasks=2", "--eval-tasks=1") == ["34", "0"]
    assert names("--eval-first=3", "--heldout", file) == ["0123456", "0123456"]
    assert run_of(tmp_path / "r", "--tasks", file, "--eval-first=3").record.needs("report")[-3:] == [
        "eval", "credit", "report"]
    assert "eval" not in run_of(tmp_path / "r", "--tasks", file).record.needs("report")
    with pytest.raises(InputError, match="holds 7 tasks, of which --eval-first keeps 1000"):
        names("--preset=paper")


def test_how_many_dialogues_and_states(tmp_path, monkeypatch):
    """Dialogues task by task up to their number; a share of all states, or so many at most."""
    made = []
    monkeypatch.setattr(program, "write_groups", lambda path, items, *_: made.append(items))
    monkeypatch.setattr(program, "read_lines", lambda path: [])
    monkeypatch.setattr(program.Run, "model", lambda *_, **__: (None, None))
    monkeypatch.setattr(program.actor, "check_tasks", lambda *_: None)
    monkeypatch.setattr(program.actor, "check_states", lambda *_: None)
    history = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    offline = [{"task": {}, "dialogue_history": history, "where": f"line {i}"} for i in range(20)]
    monkeypatch.setattr(program.Run, "trajectories", lambda *_: offline)
    for flags, count in (([], 10), (["--rollout-dialogues=7"], 7), (["--rollout-dialogues=70"], 10)):
        program.stage_rollout(run_of(tmp_path, "--rollout-tasks=5", "--rollout-per-task=2", *flags))
        assert made[-1] == [(i // 2, i % 2) for i in range(count)]
    for flags, count in ([], 40), (["--candidates-share=0.1"], 4), (["--candidates-states=3"], 3), ([
            "--candidates-share=0.5", "--candidates-states=0"], 20), (["--candidates-share=0.001"], 1):
        program.stage_samples(run_of(tmp_path, *flags))
        assert len(made[-1]) == count
