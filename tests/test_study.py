"""Studies: which runs they are made of, their figures against a bootstrap by hand, and each command end to end."""
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

import actor
import critic
import sweet as program
from machinery.files import InputError
from machinery.train import Given
from studies import study
from worlds import backend

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--smoke", "--rollout-tasks=40", "--candidates-states=30", "--eval-tasks=6", "--credit-states=6",
         "--credit-monte-carlo-states=1", "--actor-epochs=1"]
FILES = ("study.md", "study.json", "study.svg")


def a_run(root, methods=program.Eval.methods, **options):
    settings = {"study": study.Study(**options), "rollout": actor.Rollout(tasks=160, per_task=8),
                "candidates": actor.Candidates(states=4000), "critic": critic.CriticSettings(),
                "eval": program.Eval(methods=methods)}
    return SimpleNamespace(root=root, settings=settings, given=Given(), initial="", world=backend.Backend(), seed=0,
                           record=SimpleNamespace(values={}))


# ------------------------------------------------------------------ which runs

def opened(words):
    return program.open_run([word for word in words if word.startswith("--")])


def test_the_runs_of_each_study(tmp_path):
    run = a_run(tmp_path, critics="oracle,value")
    for name in ("critics", "best-of-n"):
        chain = study.chains(run, name, [3])["seed3"]
        assert list(chain) == ["seed 3", "seed 3, oracle", "seed 3, value"]
        assert all((words[0] == "best-of-n") == (name == "best-of-n") for words in chain.values())
        made = [opened(words) for words in chain.values()]
        assert {one.root for one in made} == {tmp_path / "seed3"} and {one.seed for one in made} == {3}
        assert [one.settings["critic"].kind for one in made] == ["bradley-terry", "oracle", "value"]


def test_sizes_share_a_base_policy_and_states_grow_with_dialogues(tmp_path):
    chain = study.chains(a_run(tmp_path, sizes="1/16,1/4,1"), "data", [3])["seed3"]
    assert list(chain) == [f"seed 3, {share}{more}" for share in ("1", "1/4", "1/16") for more in ("", ", untrained")]
    (tmp_path / "seed3-size1/base").mkdir(parents=True)
    assert all(words[0] == "eval" for words in chain.values())
    made = [opened(words) for words in chain.values()][::2]
    assert [one.given.model for one in made] == ["", *[str(tmp_path / "seed3-size1/base")] * 2]
    assert [(one.settings["rollout"].tasks, one.settings["candidates"].states) for one in made] == [
        (160, 4000), (40, 1000), (10, 250)]
    assert len({one.root for one in made}) == 3 and {one.seed for one in made} == {3}


def test_a_round_starts_from_the_actor_before_it_on_other_tasks(tmp_path):
    chain = study.chains(a_run(tmp_path, rounds=3), "rounds", [3])["seed3"]
    made = [opened(words) for words in chain.values()]
    assert [one.given.model for one in made] == ["", *(str(tmp_path / f"seed3{n}/actor") for n in ("", "-round2"))]
    seeds = [one.settings["rollout"].seed for one in made]
    assert seeds[0] == 0 and len(set(seeds)) == 3
    assert {one.seed for one in made} == {3}  # and with it, the test tasks
    others = study.chains(a_run(tmp_path, rounds=3), "rounds", [4])["seed4"]
    assert not {opened(words).settings["rollout"].seed for words in others.values()} & set(seeds[1:])


@pytest.mark.parametrize("options, given, name, said", [
    ({"sizes": "1"}, {}, "data", "--study-sizes 1: expected two or more"),
    ({"sizes": "1,0/3,x"}, {}, "data", "--study-sizes 1,0/3,x: expected"),
    ({"critics": "untraind"}, {}, "critics", "--study-critics untraind: expected "),
    ({}, {"trajectories": "t.jsonl"}, "rounds", "--trajectories: study rounds rolls out"),
    ({}, {"candidates": "c.jsonl"}, "data", "--candidates: study data samples"),
    ({"methods": "rft,actor"}, {}, "data", "--eval-methods rft,actor: expected base and actor among them: study data"),
    ({"methods": "base,rft"}, {}, "rounds", "--eval-methods base,rft: expected base and actor among them"),
    ({"methods": "base"}, {}, "critics", "--eval-methods base: expected base and actor among them")])
def test_what_no_study_can_begin_with(tmp_path, options, given, name, said):
    run = a_run(tmp_path, **options)
    run.given = Given(**given)
    with pytest.raises(InputError, match=re.escape(said)):
        study.chains(run, name, [0])
    (tmp_path / "study.json").write_text('{"study": "rounds"}')
    with pytest.raises(InputError, match="holds the study rounds"):
        study.chains(a_run(tmp_path), "critics", [0])


def test_critics_that_do_not_apply_are_left_out(tmp_path):
    run = a_run(tmp_path)
    assert not {"judge", "bradley-terry"} & set(study.all_that_apply(run))
    run.given = Given(model="m", tasks="t.jsonl")
    assert "judge" in study.all_that_apply(run) and "oracle" not in study.all_that_apply(run)


# ------------------------------------------------------------------ figures

def write_eval(folder, methods, tasks, rng, top_ps=(1.0, 0.9)):
    """eval.jsonl with random outcomes; returns {(method, top_p): [0 or 100 a task]}."""
    found, rows = {}, []
    for k, method in enumerate(methods):
        for top_p in top_ps:
            found[method, top_p] = [100.0 * (rng.random() < 0.2 + 0.15 * k) for _ in tasks]
            for task, figure in zip(tasks, found[method, top_p]):
                history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
                rows.append({"method": method, "top_p": top_p, "task": task.to_record(),
                             "dialogue_history": history, "answer": "a", "reward": figure / 100})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def by_hand(values, other=None, draws=3000):
    """Mean and interval over [a list a seed], less those of `other` on the same draws: plain loops."""
    def mean(rows):
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    if other:
        values = [[a - b for a, b in zip(one, two)] for one, two in zip(values, other)]
    rng, found = random.Random(5), []
    for _ in range(draws):
        seeds = [rng.choice(values) for _ in values]
        found.append(mean([rng.choices(row, k=len(row)) for row in seeds]))
    found.sort()
    return mean(values), found[round(0.025 * draws)], found[round(0.975 * draws)]


def figures_of(root):
    kept = json.loads((root / "study.json").read_text())
    return {(one["row"], one["column"]): (one["mean"], one["low"], one["high"]) for one in kept["figures"]}


def agrees(found, wanted):
    assert found[0] == pytest.approx(wanted[0], abs=1e-3)
    assert found[1:] == pytest.approx(wanted[1:], abs=1.5)  # two bootstraps of some thousand draws


BASELINES = ["base", "RFT", "multi-turn DPO", "SWEET"]


def test_critics_against_a_bootstrap_by_hand(tmp_path):
    rng, seeds = random.Random(1), []
    for seed in (0, 1, 2):
        tasks = backend.make_tasks(60, seed, "test")
        folder = tmp_path / f"seed{seed}"
        found = write_eval(folder, BASELINES, tasks, rng)
        for kind, title in (("without-c", "SWEET without c"), ("value", "value critic")):
            found |= write_eval(folder / kind, [title], tasks, rng)
            (folder / kind / "settings.json").write_text(json.dumps({"critic.kind": kind}))
            (folder / kind / "credit.json").write_text(json.dumps({"question": {"auc": 0.5 + seed / 10, "states": 4}}))
        seeds.append(found)
    text = study.finish(a_run(tmp_path), "critics", range(3), None)
    found = figures_of(tmp_path)
    for method in (*BASELINES, "SWEET without c", "value critic"):
        for top_p, way in ((1.0, "T=1"), (0.9, "top-p 0.9")):
            mine, sweet = ([seed[name, top_p] for seed in seeds] for name in (method, "SWEET"))
            agrees(found[method, f"success, {way}"], by_hand(mine))
            agrees(found[method, f"less SWEET, {way}"], by_hand(mine, sweet))
    row = next(line for line in text.splitlines() if line.startswith("| value critic "))
    assert "0.60 (0.50 to 0.70, 12 states)" in row
    assert "n = 60 + 60 + 60 held-out tasks, seeds: 3." in text and "`python " in text and "commit " in text
    ElementTree.fromstring((tmp_path / "study.svg").read_text())
    assert "prefers-color-scheme:dark" in (tmp_path / "study.svg").read_text()


def test_sizes_and_rounds_against_a_bootstrap_by_hand(tmp_path):
    rng = random.Random(2)
    cases = {"data": {"-size1of4": "40 dialogues", "-size1": "160 dialogues"}, "rounds": {"": 1, "-round2": 2}}
    for name, folders in cases.items():
        root, seeds = tmp_path / name, []
        for seed in (0, 1):
            tasks, found = backend.make_tasks(50, seed, "test"), {}
            for folder, label in folders.items():
                place = root / f"seed{seed}{folder}"
                for (method, top_p), values in write_eval(place, BASELINES, tasks, rng).items():
                    found[label, method, top_p] = values
                (place / "trajectories.jsonl").write_text("{}\n" * int(str(label).split()[0]))
            seeds.append(found)
        text = study.finish(a_run(root, sizes="1/4,1", rounds=2), name, range(2), None)
        found = figures_of(root)
        for label in folders.values():
            def of(method, label=label, seeds=seeds):
                return [seed[label, method, 0.9] for seed in seeds]
            if name == "data":
                column = f"{label}, top-p 0.9"
                agrees(found["RFT", column], by_hand(of("RFT")))
                agrees(found["SWEET - RFT", column], by_hand(of("SWEET"), of("RFT")))
            else:
                row = f"round {label}: SWEET"
                agrees(found[row, "success, top-p 0.9"], by_hand(of("SWEET")))
                agrees(found[row, "gain of the round, top-p 0.9"], by_hand(of("SWEET"), of("base")))
        assert "SWEET" in text
        ElementTree.fromstring((root / "study.svg").read_text())


def test_a_study_of_some_methods(tmp_path):
    """Whoever was not evaluated has no row."""
    for name in ("critics", "data", "rounds"):
        run = a_run(tmp_path / name, "base,actor", rounds=2, sizes="1/4,1")
        assert study.chains(run, name, [0])
        for folder in ("", "-round2", "-size1", "-size1of4"):
            place = run.root / f"seed0{folder}"
            write_eval(place, ["base", "SWEET"], backend.make_tasks(5, 0, "test"), random.Random(0))
            (place / "trajectories.jsonl").write_text("{}\n")
        study.finish(run, name, range(1), None)
        rows = {row for row, _ in figures_of(run.root)}
        assert not {row for row in rows if "RFT" in row or "DPO" in row}
        if name == "rounds":
            assert rows == {"base policy", "round 1: SWEET", "round 2: SWEET"}
    assert study.chains(a_run(tmp_path, "actor"), "best-of-n", [0])  # evaluates nobody


def test_other_tasks_at_another_size_are_refused(tmp_path):
    for folder, seed in (("seed0", 0), ("seed0-round2", 1)):
        write_eval(tmp_path / folder, BASELINES, backend.make_tasks(5, seed, "test"), random.Random(0))
    with pytest.raises(InputError, match="evaluated on different tasks"):
        study.finish(a_run(tmp_path, rounds=2), "rounds", range(1), None)


# ------------------------------------------------------------------ each command

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run that each study begins with."""
    run = tmp_path_factory.mktemp("study") / "run"
    subprocess.run([sys.executable, ROOT / "sweet.py", "--run", run, *SMALL], check=True, capture_output=True)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name, first, begun, last", [
    ("critics", "seed0", "untrained/actor", "untrained/eval.jsonl"),
    ("data", "seed0-size1", "../seed0-size1of2/critic", "../seed0-size1of2/untrained/eval.jsonl"),
    ("rounds", "seed0", "../seed0-round2/critic", "../seed0-round2/eval.jsonl"),
    ("best-of-n", "seed0", "untrained/critic", "untrained/best-of-n.jsonl")])
def test_a_study_that_was_stopped_ends_in_the_same_files(trained, tmp_path, name, first, begun, last):
    """From the first command to the end, and once more after a stop in the middle of its second run."""
    command = [sys.executable, str(ROOT / "sweet.py"), "study", name, "--run", str(tmp_path), *SMALL, "--seeds=1",
               "--study-critics=untrained", "--study-sizes=1/2,1", "--study-rounds=2"]
    shutil.copytree(trained, tmp_path / first)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == (tmp_path / "study.md").read_text().strip() and "runs: " in done.stderr
    left = [tmp_path / file for file in FILES] + [(tmp_path / first / last)]
    before = [file.read_bytes() for file in left]
    shutil.rmtree((tmp_path / first / begun).resolve().parent)
    for file in FILES:
        (tmp_path / file).unlink()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / first / begun).parent.glob(f"{Path(begun).name}*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM and not (tmp_path / "study.md").exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert [file.read_bytes() for file in left] == before
