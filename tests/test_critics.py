"""Critics behind one door: each ranks the same candidates, by its own numbers, in a whole run."""
import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import actor
import critic
import report
import sweet as program
from machinery.files import InputError
from machinery.train import fit, load_model, save_to
from conftest import tiny_llama
from kernels.logprob import lay_out
from studies import critics
from studies.critics import KNOWN_CRITICS, Headed, Judge, Oracle, Regression, Untrained, Value, find_critic
from worlds import backend, tiny

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
    ("untraind", "or imitation or regression or value or judge or oracle or module:Class (perhaps untrained)"),
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


# ------------------------------------------------------------------ a number from hidden states

def random_head(model, seed=0):
    """A head, and its weight and bias as plain numbers."""
    headed = Headed(model).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        headed.head.weight.copy_(torch.randn(headed.head.weight.shape, generator=generator, dtype=torch.float64))
        headed.head.bias.fill_(0.3)
    return headed


def by_hand(headed, view):
    """What the head says of each turn of one dialogue, read by itself: [(in front, mean, at the end)]."""
    input_ids, turn_ids = view
    with torch.no_grad():
        hidden_TD = headed.model(torch.tensor([input_ids]), output_hidden_states=True).hidden_states[-1][0]
        score_T = (hidden_TD * headed.head.weight[0]).sum(-1) + headed.head.bias
    rows = []
    for turn in range(1, max(turn_ids) + 1):
        places = [t for t, k in enumerate(turn_ids) if k == turn]
        rows.append((score_T[places[0] - 1], sum(score_T[t] for t in places) / len(places), score_T[places[-1]]))
    return rows


def bare_run(model, tokenizer, trajectories, folder, **cfg):
    """What a critic asks of a run, on a model in memory."""
    def better_and_worse(per_task, model, tokenizer, view):
        return list(zip(trajectories[1:8:2], trajectories[0:8:2]))

    def load(name, train=False):
        return (copy.deepcopy(model), tokenizer) if name == "base" else load_model(folder / name)
    return SimpleNamespace(
        model=load, path=lambda name: folder / name, seed=0, better_and_worse=better_and_worse,
        trajectories=lambda _: [{**trajectory, "where": "line"} for trajectory in trajectories[:8]],
        settings={"critic": critic.CriticSettings(epochs=2, batch_size=2, **cfg), "pairs": critic.Pairs()},
        learning=lambda model, tokenizer: {"save": save_to(model, tokenizer), "micro_batch": 0})


def some_states(tokenizer, trajectories):
    """Sixteen candidates of two observations, enough for them to share a row."""
    states = []
    for trajectory in trajectories[:2]:
        turns = [actor.action_tokens(tokenizer, m) for t in trajectories for m in t["dialogue_history"][1::2]]
        candidates = [{"output_ids": ids, "content": str(ids)} for ids in turns[:8]]
        states.append({"task": trajectory["task"], "messages": trajectory["dialogue_history"][:1],
                       "candidates": candidates})
    return states


def test_the_head_reads_each_turn_as_by_hand(model64, tokenizer, trajectories):
    """In rows of their own, and where candidates share a prefix (of which the front of a turn is a part)."""
    headed = random_head(model64)
    batches = [[critic.critic_view(tokenizer, t) for t in trajectories[:7]],
               critic.candidate_views(tokenizer, some_states(tokenizer, trajectories)[0])]
    assert ["owner_ids" in lay_out(model64, views) for views in batches] == [False, True]
    for views in batches:
        with torch.no_grad():
            *found, lengths_BK = headed.turns(lay_out(model64, views))
        for b, view in enumerate(views):
            rows = by_hand(headed, view)
            for k, row in enumerate(rows):
                assert [part[b, k].item() for part in found] == pytest.approx([float(x) for x in row], abs=1e-9)
                assert lengths_BK[b, k] == view[1].count(k + 1)
            assert all((part[b, len(rows):] == 0).all() for part in found)


def test_the_regression_head_learns_by_eq_2(model64, tokenizer, trajectories):
    headed = random_head(model64)
    views = [critic.critic_view(tokenizer, t) for t in trajectories[:4]]
    part = [{"chosen": views[0], "rejected": views[1]}, {"chosen": views[2], "rejected": views[3]}]
    loss, _ = Regression().loss(headed, part, critic.CriticSettings(beta=0.7))
    totals = [sum(mean for _, mean, _ in by_hand(headed, view)) for view in views]
    by_pair = [torch.log1p(torch.exp(-0.7 * (totals[i] - totals[i + 1]))) for i in (0, 2)]
    assert loss.item() == pytest.approx(float(sum(by_pair) / 2), abs=1e-9)


def test_the_value_learns_rewards_and_ranks_by_differences(model64, tokenizer, trajectories):
    headed = random_head(model64)
    views = [critic.critic_view(tokenizer, t) for t in trajectories[:5]]
    rewards = [0.0, 1.0, 0.25, 1.0, 0.0]
    assert len({max(turn_ids) for _, turn_ids in views}) > 1
    wanted = 0.0
    for view, reward in zip(views, rewards):
        said = [torch.sigmoid(score) for front, _, end in by_hand(headed, view) for score in (front, end)]
        costs = [-reward * torch.log(p) - (1 - reward) * torch.log(1 - p) for p in said]
        wanted += float(sum(costs)) / len(costs) / len(views)
    loss, _ = Value().loss(headed, list(zip(views, rewards)))
    assert loss.item() == pytest.approx(wanted, abs=1e-9)
    advantages_BK, _ = Value().advantages(headed, lay_out(model64, views))
    for b, view in enumerate(views):
        for k, (front, _, end) in enumerate(by_hand(headed, view)):
            assert advantages_BK[b, k].item() == pytest.approx(float(end.sigmoid() - front.sigmoid()), abs=1e-9)


@pytest.mark.parametrize("kind", [Regression, Value])
def test_what_is_left_ranks_as_what_was_trained(kind, model, tokenizer, trajectories, tmp_path, monkeypatch):
    """From log 2 on, with c in sight; stopped at any step, it goes on to the same bytes."""
    run = bare_run(model, tokenizer, trajectories, tmp_path)
    kind().fit(run, tmp_path / "critic")
    log = json.loads((tmp_path / "critic/log.json").read_text())
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and log[-1]["loss"] < log[0]["loss"]
    states = some_states(tokenizer, trajectories)
    kind().score(run, states, run.settings["critic"])
    headed = Headed(run.model("critic")[0], tmp_path / "critic").double()
    for state in states:
        for candidate, view in zip(state["candidates"], critic.candidate_views(tokenizer, state)):
            (front, mean, end), = by_hand(headed, view)
            wanted = mean if kind is Regression else end.sigmoid() - front.sigmoid()
            assert candidate["advantage"] == pytest.approx(float(wanted), abs=2e-5)
    assert len({c["advantage"] for c in states[0]["candidates"]}) > 4

    steps, whole = iter(range(100)), kind.loss

    def loss(*args):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return whole(*args)
    def short_of_breath(headed, examples, *args, **how):
        views = [pair["chosen"] for pair in examples] if kind is Regression else [view for view, _ in examples]
        assert all("In light that the final answer is: def" in tokenizer.decode(ids) for ids, _ in views)
        return fit(headed, examples, *args, checkpoint_seconds=0, **how)
    monkeypatch.setattr(critics, "fit", short_of_breath)
    monkeypatch.setattr(kind, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        kind().fit(run, tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
    kind().fit(run, tmp_path / "stopped")
    for file in ("model.safetensors", Headed.FILE, "log.json"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "critic" / file).read_bytes()


# ------------------------------------------------------------------ a model that is asked

def test_the_judge_weighs_yes_against_no(tokenizer, trajectories):
    words = tiny.make_tokenizer(["Yes", "No", *backend.phrases()])
    judge = tiny_llama(len(words), seed=5).double()
    run = SimpleNamespace(model=lambda name: (judge, words))
    states = some_states(tokenizer, trajectories)
    Judge().score(run, states, None)
    yes, no = words.convert_tokens_to_ids(["Yes", "No"])
    for state in states:
        for candidate in state["candidates"]:
            asked = critics.QUESTION.format(
                reference=state["task"]["ground_truth"], turn=candidate["content"],
                conversation=f"Person: {state['messages'][0]['content']}")
            text = words.apply_chat_template([{"role": "user", "content": asked}], tokenize=False,
                                             add_generation_prompt=True)
            ids = words(text, add_special_tokens=False, return_tensors="pt").input_ids
            logits_V = judge(ids).logits[0, -1]
            assert candidate["advantage"] == pytest.approx((logits_V[yes] - logits_V[no]).item(), abs=2e-6)


def test_the_judge_says_what_it_needs(model, tokenizer, tmp_path):
    run = SimpleNamespace(model=lambda name: (model, tokenizer))
    with pytest.raises(InputError) as error:
        Judge().fit(run, tmp_path / "critic")
    assert "--critic judge: needs a --model that was trained to chat" in str(error.value)
    assert not (tmp_path / "critic").exists()


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
    chosen = ("without-c", "untrained", "imitation", "regression", "value", "oracle", "mine:Shortest")
    for kind in chosen:
        program.main(["--run", str(run), *SMALL, "--critic", kind])
        own = {"critic", "candidates.jsonl", "pairs.jsonl", "actor", "eval.jsonl", "credit.json", "credit.jsonl"}
        kept = {"settings", "settings.json", "seconds.json", "speed.json", "made.json"}
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
    titles = ["SWEET", "SWEET without c", "untrained critic", "imitation critic",
              "regression critic", "value critic", "oracle", "mine:Shortest critic"]
    assert list(report.critics_of(run)) == titles
    tables = report.results_table([run], backend.Backend())
    lines = tables.splitlines()
    for title in titles[1:]:
        assert sum(line.startswith(f"| {title} ") for line in lines) == 3  # results, what went wrong, credit
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
    cfg = critic.CriticSettings(loss="my_losses:hinge", nll=0.0, epochs=1)
    mine = copy.deepcopy(model)
    log = critic.train(mine, tokenizer, pairs, tmp_path / "critic", cfg, 0, save_to(mine, tokenizer))
    assert log[0]["loss"] == pytest.approx(1.0)
    views = [{"chosen": critic.critic_view(tokenizer, better), "rejected": critic.critic_view(tokenizer, worse)}
             for better, worse in pairs]
    mine = copy.deepcopy(model)
    log = actor.train_preferences(mine, views, tmp_path / "actor",
                                  actor.ActorSettings(loss="my_losses:ipo", nll=0.0, beta=0.25, epochs=1), 0,
                                  save_to(mine, tokenizer), "actor")
    assert log[0]["loss"] == pytest.approx(4.0)


def test_what_is_no_loss_is_one_line_before_any_work(tmp_path):
    with pytest.raises(SystemExit) as end:
        program.main(["--run", str(tmp_path / "run"), "--actor-loss", "actor:nothing"])
    assert "--actor-loss actor:nothing" in str(end.value) and "\n" not in str(end.value)
    assert not (tmp_path / "run/base").exists()


def test_a_table_of_unknown_critics_or_of_one_is_refused_before_any_work(tmp_path):
    for flags, said in ((["--table-critics", "untraind"], "--table-critics untraind: expected "),
                        (["--critic", "oracle"], "--critic oracle: with several seeds, further critics are named by")):
        with pytest.raises(SystemExit) as end:
            program.main(["table", "--run", str(tmp_path / "t"), *flags])
        assert said in str(end.value) and not list(tmp_path.glob("t/seed*"))
