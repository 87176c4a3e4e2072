"""Critics behind one door: each ranks the same candidates, by its own numbers, in a whole run."""
import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import actor
import critic
import report
import sweet as program
from machinery.files import InputError
from machinery.train import save_to
from studies.critics import KNOWN_CRITICS, Oracle, Untrained, find_critic
from worlds import backend

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--smoke", "--rollout-tasks", "30", "--candidates-states", "30", "--eval-tasks", "5", "--credit-states", "6",
         "--credit-monte-carlo-states", "1", "--actor-epochs", "1"]


def candidate(content, with_c, without_c, n):
    return {"content": content, "ref_sum": with_c, "ref_sum_without_c": without_c, "output_ids": [0] * n}


def test_the_untrained_critic_by_hand():
    states = [{"candidates": [candidate("a", -1.0, -4.0, 2), candidate("b", -2.0, -1.0, 4)]}]
    Untrained().score(None, states, None)
    assert [c["advantage"] for c in states[0]["candidates"]] == [1.5, -0.25]


def test_the_oracle_says_what_the_world_knows():
    task = backend.make_tasks(1, 0)[0]
    steps = backend.read_function(task.ground_truth)
    known = backend.known_steps([{"role": "user", "content": task.problem_description}])
    messages = [{"role": "user", "content": task.problem_description}]
    useful = next(step for step in steps if step not in known)
    useless = next(step for step in range(6) if step not in steps)
    said = {step: next(text for text in backend.phrases() if backend.asked_step(f"Tell me about the {text}") == step
                       or backend.asked_step(text) == step) for step in (useful, useless)}
    contents = [f"Tell me about the {said[useful]}", f"Tell me about the {said[useless]}",
                f"I WANT TO ANSWER:\n{task.ground_truth}", "I WANT TO ANSWER:\ndef f(): pass"]
    states = [{"task": task.to_record(), "messages": messages,
               "candidates": [candidate(content, 0, 0, 1) for content in contents]}]
    Oracle().score(SimpleNamespace(world=backend.Backend()), states, None)
    assert [c["advantage"] for c in states[0]["candidates"]] == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("spec, said", [
    ("untraind", "or untrained or imitation or oracle or module:Class (perhaps untrained)"),
    ("nowhere:Critic", "No module named 'nowhere'"),
    ("json:JSONDecoder", "JSONDecoder has no method fit(run, out)"),
])
def test_what_is_no_critic_is_one_line(spec, said):
    with pytest.raises(InputError) as error:
        find_critic(spec)
    assert f"--critic {spec}" in str(error.value) and said in str(error.value)


@pytest.mark.parametrize("kind, wanted", [
    ("bradley-terry", (True, "turn", "c")), ("without-c", (False, "turn", "c")), ("sum", (True, "none", "c")),
    ("trajectory", (True, "trajectory", "c")), ("own", (True, "turn", "own"))])
def test_what_the_papers_ablations_change(kind, wanted, monkeypatch):
    """Training and ranking are told the same."""
    told = []
    monkeypatch.setattr(critic, "train", lambda *_, reference, normalize, **__: told.append((reference, normalize)))
    monkeypatch.setattr(critic, "rank", lambda *args: told.append(args[-3:]))
    run = SimpleNamespace(model=lambda *_, **__: (None, None), settings={"critic": None, "pairs": critic.Pairs()},
                          seed=0, better_and_worse=lambda *_: [], learning=lambda *_: {})
    made = find_critic(kind)
    made.fit(run, None)
    made.score(run, [], None)
    assert told == [wanted[:2], wanted]


@pytest.mark.slow
def test_critics_lie_beside_each_other(tmp_path, monkeypatch, capsys):
    """A critic has a folder of its own for what depends on it, and shares the rest, byte by byte; the report, credit
    and status know of all, and a change of what is shared names them all."""
    run = tmp_path / "run"
    program.main(["--run", str(run), *SMALL])
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    (tmp_path / "mine.py").write_text(
        "class Shortest:\n"
        "    def fit(self, run, out):\n"
        "        out.mkdir()\n"
        "    def score(self, run, states, cfg):\n"
        "        for state in states:\n"
        "            for candidate in state['candidates']:\n"
        "                candidate['advantage'] = -float(len(candidate['output_ids']))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folders = {kind: run / kind.replace(":", "-") for kind in (*KNOWN_CRITICS, "mine:Shortest")}
    chosen = ("without-c", "untrained", "imitation", "oracle", "mine:Shortest")
    for kind in chosen:
        program.main(["--run", str(run), *SMALL, "--critic", kind])
        own = {"critic", "candidates.jsonl", "pairs.jsonl", "actor", "eval.jsonl", "credit.json", "credit.jsonl"}
        kept = {"settings", "settings.json", "seconds.json", "made.json"}
        assert {path.name for path in folders[kind].iterdir()} == own | kept
        rows, first = ([json.loads(line) for line in (folder / "candidates.jsonl").open(encoding="utf-8")]
                       for folder in (folders[kind], run))
        texts = [[[c["content"] for c in row["candidates"]] for row in rows] for rows in (rows, first)]
        assert texts[0] == texts[1]
        advantages = [c["advantage"] for row in rows for c in row["candidates"]]
        assert advantages != [c["advantage"] for row in first for c in row["candidates"]]
        if kind == "oracle":
            assert set(advantages) == {0.0, 1.0}
        if kind == "mine:Shortest":
            assert advantages == [-float(len(c["output_ids"])) for row in rows for c in row["candidates"]]
    changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert {path.name for path in changed} == {"report.html", ".lock"}
    titles = ["SWEET", "SWEET without c", "untrained critic", "imitation critic", "oracle", "mine:Shortest critic"]
    assert list(report.critics_of(run)) == titles
    tables = report.results_table([run], backend.Backend())
    lines = tables.splitlines()
    for title in titles[1:]:
        assert sum(line.startswith(f"| {title} ") for line in lines) == 2  # results and credit
        assert sum(line.startswith(f"| SWEET - {title} ") for line in lines) == 1
    capsys.readouterr()
    program.main(["status", "--run", str(run)])
    said = capsys.readouterr().out
    assert all(f"{folders[kind]}: " in said for kind in chosen)
    with pytest.raises(SystemExit) as end:
        program.main(["--run", str(run), *SMALL, "--rollout-tasks", "31"])
    assert all(f"{folders[kind]}/pairs.jsonl" in str(end.value) for kind in chosen)
    with pytest.raises(SystemExit) as end:
        program.main(["--run", str(run), *SMALL, "--critic-lr", "0.5"])
    assert "/critic " in str(end.value) and "oracle" not in str(end.value)
    assert program.open_run(["--run", str(run), "--critic", "oracle"]).settings == \
        program.open_run(["--run", str(run), *SMALL, "--critic", "oracle"]).settings


LOSSES = """
import torch

def hinge(chosen_BK, rejected_BK, beta):
    return torch.relu(1 - beta * (chosen_BK.sum(-1) - rejected_BK.sum(-1))).mean()

def ipo(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta):
    return (((chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B) - 1 / (2 * beta)) ** 2).mean()
"""


def test_a_loss_of_ones_own(model, trajectories, tokenizer, tmp_path, monkeypatch):
    """At the first step all ratios are 0: hinge is 1, and IPO's square 1 / (4 beta^2)."""
    (tmp_path / "my_losses.py").write_text(LOSSES)
    monkeypatch.syspath_prepend(str(tmp_path))
    pairs = [(trajectories[i], trajectories[i + 1]) for i in range(0, 8, 2)]
    cfg = critic.Critic(loss="my_losses:hinge", nll=0.0, epochs=1)
    mine = copy.deepcopy(model)
    log = critic.train(mine, tokenizer, pairs, tmp_path / "critic", cfg, 0, save_to(mine, tokenizer))
    assert log[0]["loss"] == pytest.approx(1.0)
    views = [{"chosen": critic.critic_view(tokenizer, better), "rejected": critic.critic_view(tokenizer, worse)}
             for better, worse in pairs]
    mine = copy.deepcopy(model)
    log = actor.train_preferences(mine, views, tmp_path / "actor",
                                  actor.Actor(loss="my_losses:ipo", nll=0.0, beta=0.25, epochs=1), 0,
                                  save_to(mine, tokenizer), "actor")
    assert log[0]["loss"] == pytest.approx(4.0)


def test_what_is_no_loss_is_one_line_before_any_work(tmp_path):
    with pytest.raises(SystemExit) as end:
        program.main(["--run", str(tmp_path / "run"), "--actor-loss", "actor:nothing"])
    assert "--actor-loss actor:nothing" in str(end.value) and "\n" not in str(end.value)
    assert not (tmp_path / "run/base").exists()


def test_a_table_of_unknown_critics_or_of_one_is_refused_before_any_work(tmp_path):
    for flags, said in ((["--table-critics", "untraind"], "--table-critics untraind: expected "),
                        (["--critic", "oracle"], "--critic oracle: the table names its critics by --table-critics")):
        with pytest.raises(SystemExit) as end:
            program.main(["table", "--run", str(tmp_path / "t"), *flags])
        assert said in str(end.value) and not list(tmp_path.glob("t/seed*"))
