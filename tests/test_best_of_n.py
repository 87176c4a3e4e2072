"""Best of N: the same stream of candidates for every N, the critic's best is played, and the policy never sees c."""
from types import SimpleNamespace

import pytest
import torch

import actor
import critic
from env import grade, render
from machinery import train
from machinery.files import InputError, read_jsonl, write_lines
from machinery.server import Server
from machinery.speed import Speed
from simulator import Human, SpokenHuman
from studies import best_of_n
from worlds import backend

NUMBERS = (1, 2, 5)


class Sum:
    """An advantage that looks at nothing but the ids: any order will do for a test. It remembers what it was shown."""

    def __init__(self):
        self.seen = []

    @staticmethod
    def advantage(ids):
        return float(sum(ids) % 101)

    def score(self, run, states, cfg):
        self.seen += states
        for state in states:
            for candidate in state["candidates"]:
                candidate["advantage"] = self.advantage(candidate["output_ids"])


def run_in(folder, model, tokenizer, tasks, kind="sum", seed=4):
    """What best-of-N asks of a run, on a random model."""
    folder.mkdir(exist_ok=True)
    world = backend.Backend()
    settings = {"rollout": actor.Rollout(max_turns=3, max_tokens=9), "critic": critic.CriticSettings(kind=kind)}
    return SimpleNamespace(
        root=folder, path=lambda name: folder / name, model=lambda name: (model, tokenizer), world=world, seed=seed,
        speed=Speed(train.Machine()), sampling={}, track=None,
        instructions=world.INSTRUCTIONS,
        settings=settings, critic=Sum(), held_out=lambda: tasks, machine=train.Machine(rows=40), grade=grade,
        human=lambda held_out=False: world.human("scripted", None, None, seed) if held_out else None,
        record=SimpleNamespace(values={"clip": None}))


def dialogues(run):
    return [record for _, record in read_jsonl(best_of_n.file_of(run))]


@pytest.fixture(scope="module")
def played(tmp_path_factory, model, tokenizer, tasks):
    run = run_in(tmp_path_factory.mktemp("best") / "run", model, tokenizer, tasks[:7])
    best_of_n.play(run, NUMBERS)
    return run


def test_one_candidate_is_plain_sampling(played, model, tokenizer, tasks):
    keys = [(played.seed, "eval", i) for i in range(7)]
    plain = actor.play_tasks(model, tokenizer, tasks[:7], played.human(True), keys, played.settings["rollout"])
    found = dialogues(played)[:7]
    assert [record["n"] for record in found] == [1] * 7
    for record, trajectory in zip(found, plain):
        assert record["dialogue_history"] == actor.bare(trajectory["dialogue_history"])
        assert (record["answer"], record["reward"]) == (trajectory["answer"], trajectory["reward"])


def test_a_full_context_ends_a_dialogue_on_its_last_turn(played, tmp_path, model, tokenizer, tasks, monkeypatch):
    third = []  # tokens that the policy has to read for its third turn
    for record in dialogues(played)[:7]:
        if len(record["dialogue_history"]) > 4:
            third.append(len(render(tokenizer, record["dialogue_history"][:5])[0]))
    monkeypatch.setattr(model.config, "max_position_embeddings", max(third) + 9 - 1)  # the longest has no room
    run = run_in(tmp_path / "run", model, tokenizer, tasks[:7])
    best_of_n.play(run, [1])
    keys = [(run.seed, "eval", i) for i in range(7)]
    plain = actor.play_tasks(model, tokenizer, tasks[:7], run.human(True), keys, run.settings["rollout"])
    found = [record["dialogue_history"] for record in dialogues(run)]
    assert found == [actor.bare(trajectory["dialogue_history"]) for trajectory in plain]
    assert sum(map(len, found)) < sum(len(record["dialogue_history"]) for record in dialogues(played)[:7])


def test_the_best_of_the_first_n_is_played(played, model, tokenizer):
    """Every turn again, each candidate sampled by itself."""
    different = set()
    for place, record in enumerate(dialogues(played)):
        n, task = NUMBERS[place // 7], (played.seed, "eval", place % 7)
        assert record["n"] == n and record["critic"] == "sum"
        history = record["dialogue_history"]
        for turn in range(len(history) // 2):
            prompt, _ = render(tokenizer, history[:2 * turn + 1])
            candidates = []
            for k in range(n):
                key = (task, turn, k) if k else (task, turn)
                candidates += actor.sample(model, tokenizer, [prompt], [key], max_tokens=9)
            best = max(candidates, key=Sum.advantage)
            assert history[2 * turn + 1]["output_ids"] == best
            different.add(candidates.index(best))
    assert different == set(range(5))


def test_the_critic_reads_c_and_the_policy_does_not(played, model, tokenizer, tasks):
    assert {state["task"]["ground_truth"] for state in played.critic.seen} == {t.ground_truth for t in tasks[:7]}
    state = played.critic.seen[0]
    candidate = state["candidates"][0]
    ids = candidate["output_ids"]
    for field, reference in (("ref_sum", state["task"]["ground_truth"]), ("ref_sum_without_c", None)):
        prefix, _ = render(tokenizer, state["messages"][:1], reference)
        logprobs_TV = model(torch.tensor([prefix + ids])).logits[0].log_softmax(-1)
        total = sum(logprobs_TV[len(prefix) - 1 + t, token].item() for t, token in enumerate(ids))
        assert candidate[field] == pytest.approx(total, abs=1e-4)
    for record in dialogues(played):
        for message in record["dialogue_history"]:
            assert record["task"]["ground_truth"] not in message["content"]


def test_a_stop_and_a_human_who_leaves_change_nothing(played, tmp_path, model, tokenizer, tasks):
    run = run_in(tmp_path / "run", model, tokenizer, tasks[:7])

    class Away(Human):
        def reply(self, tasks, dialogues):
            return [None if task == run.held_out()[2] else reply
                    for task, reply in zip(tasks, there(True).reply(tasks, dialogues))]
    there, run.human = run.human, lambda held_out: Away()
    with pytest.raises(InputError, match="unfinished"):
        best_of_n.play(run, NUMBERS)
    run.human = there
    score, calls = run.critic.score, iter(range(100))

    def stopped(*args):
        if next(calls) == 4:
            raise KeyboardInterrupt
        score(*args)
    run.critic.score = stopped
    with pytest.raises(KeyboardInterrupt):
        best_of_n.play(run, NUMBERS)
    assert not best_of_n.file_of(run).exists() and (tmp_path / "run/best-of-n.jsonl.partial").stat().st_size
    best_of_n.play(run, NUMBERS)
    assert best_of_n.file_of(run).read_bytes() == best_of_n.file_of(played).read_bytes()


def test_replies_that_show_code_are_counted(tmp_path, capsys, model, tokenizer, tasks):
    run = run_in(tmp_path / "run", model, tokenizer, tasks[:2])

    class Model(SpokenHuman):
        def complete(self, tasks, conversations):
            return [task.ground_truth for task in tasks]
    run.human = lambda held_out: Model(Server(leaks="keep"))
    best_of_n.play(run, (1,))
    replies = sum(len(record["dialogue_history"]) // 2 - 1 for record in dialogues(run))
    assert f"showed code of the reference: {replies} of {replies} (kept)" in capsys.readouterr().err and replies


def test_figures_by_hand(tmp_path, tasks):
    """Two seeds of one critic, one of another; each N wins a known share of four tasks."""
    runs = []
    made = (("a", "sum", 0, (0, 1, 3)), ("b", "sum", 1, (1, 1, 4)), ("c", "none", 0, (2, 2, 1)))
    for folder, kind, seed, won in made:
        run = run_in(tmp_path / folder, None, None, tasks[:4], kind, seed)
        rows = []
        for n, count in zip(NUMBERS, won):
            rows += [{"n": n, "task": task.to_record(), "reward": 1.0 if i < count else 0.5, "answer": "",
                      "dialogue_history": []} for i, task in enumerate(tasks[:4])]
        write_lines(best_of_n.file_of(run), rows)
        runs.append(run)
    found = best_of_n.means(runs, NUMBERS)
    assert [row[0] for row in found["sum"]] == pytest.approx([12.5, 25.0, 87.5, 75.0])
    assert [row[0] for row in found["none"]] == pytest.approx([50.0, 50.0, 25.0, -25.0])
    assert all(low <= mean <= high and low < high for mean, low, high in found["sum"] + found["none"])
    runs[0].held_out = lambda: tasks[:3]
    with pytest.raises(InputError, match="is of other held-out tasks"):
        best_of_n.successes(runs[0], NUMBERS)
