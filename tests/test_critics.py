"""Critics behind one door: each ranks the same candidates, by its own numbers, in a whole run."""
import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import actor
import critic
import report
import sweet as program
from machinery.files import InputError
from machinery.train import save_to
from studies.critics import Oracle, Untrained, find_critic
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
    ("untraind", "expected bradley-terry or untrained or imitation or oracle or module:Class (perhaps untrained)"),
    ("nowhere:Critic", "No module named 'nowhere'"),
    ("json:JSONDecoder", "JSONDecoder has no method fit(run, out)"),
])
def test_what_is_no_critic_is_one_line(spec, said):
    with pytest.raises(InputError) as error:
        find_critic(spec)
    assert f"--critic {spec}" in str(error.value) and said in str(error.value)


@pytest.mark.slow
def test_other_critics_rank_the_same_candidates(tmp_path, monkeypatch):
    """Everything before the critic is shared; a critic of one's own gives what it says, and the report and credit ask
    it, too."""
    first = tmp_path / "first"
    program.main(["--run", str(first), *SMALL])
    (tmp_path / "mine.py").write_text(
        "class Shortest:\n"
        "    def fit(self, run, out):\n"
        "        out.mkdir()\n"
        "    def score(self, run, states, cfg):\n"
        "        for state in states:\n"
        "            for candidate in state['candidates']:\n"
        "                candidate['advantage'] = -float(len(candidate['output_ids']))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for kind in ("untrained", "imitation", "oracle", "mine:Shortest"):
        run = tmp_path / kind.replace(":", "-")
        shutil.copytree(first, run)
        program.main(["--run", str(run), *SMALL, "--critic", kind, "--redo", "critic"])
        rows, before = ([json.loads(line) for line in (folder / "candidates.jsonl").open(encoding="utf-8")]
                        for folder in (run, first))
        texts = [[[c["content"] for c in row["candidates"]] for row in rows] for rows in (rows, before)]
        assert texts[0] == texts[1]
        advantages = [c["advantage"] for row in rows for c in row["candidates"]]
        assert advantages != [c["advantage"] for row in before for c in row["candidates"]]
        if kind == "oracle":
            assert set(advantages) == {0.0, 1.0}
        if kind == "mine:Shortest":
            assert advantages == [-float(len(c["output_ids"])) for row in rows for c in row["candidates"]]
        assert (run / "credit.json").exists() and (run / "report.html").exists()
        table = report.results_table([run], backend.Backend())
        assert f"another critic than the paper's: {kind}." in table


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
