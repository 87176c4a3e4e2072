"""Several processes (torchrun on this machine, over gloo) do what one does: training, files, ends."""
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
import ranks_worker
import torch
from conftest import save_model
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--base-documents", "1500", "--base-epochs", "2", "--rollout-tasks", "24", "--rollout-per-task", "8",
        "--critic-epochs", "1", "--candidates-states", "40", "--candidates-n", "4", "--actor-epochs", "1",
        "--rft-epochs", "1", "--multiturn-epochs", "1", "--eval-tasks", "6", "--rows", "40"]


def torchrun(*args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--",
               *map(str, args)]  # after "--", since torchrun takes --run for one of its own
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def ended(running):
    """(status, stdout, our own lines on stderr) of a command."""
    out, said = running.communicate(timeout=1800)
    print(said[-3000:])  # pytest shows it with a failure
    ours = [line for line in said.splitlines() if line.startswith("sweet: ")]
    assert running.returncode or "Traceback" not in said, said[-3000:]
    return running.returncode, out, ours


# ------------------------------------------------------------------ training

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of trainings by one process and by two, and what the processes said."""
    folder = tmp_path_factory.mktemp("ranks")
    one = ranks_worker.all_trainings(folder, "one")
    save_model(folder / "sharded/critic", tie=True)
    save_model(folder / "sharded/actor", seed=1, tie=False)
    one["sharded"] = ranks_worker.sharded_trainings(folder / "sharded", "one")
    shutil.copytree(folder / "one-dies.partial", folder / "kept-one-dies.partial")
    status, _, _ = ended(torchrun("tests/ranks_worker.py", "train", folder))
    assert status == 0
    return folder, one, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def difference(one, two):
    """The largest difference of two trainings' weights."""
    if (one / "weights.pt").exists():
        ours, theirs = (torch.load(folder / "weights.pt") for folder in (one, two))
    else:
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert ours.keys() <= theirs.keys()  # of a tied head transformers writes a second copy where it was sharded
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


@pytest.mark.parametrize("kind", [*ranks_worker.KINDS, "micro"])
def test_two_processes_train_as_one(trained, kind):
    """In float64, six steps: the same figures, and the same weights, up to what sums in another order round apart."""
    folder, _, _ = trained
    one, two = folder / f"one-{kind}", folder / f"two-{kind}"
    logs = [json.loads((out / "log.json").read_text()) for out in (one, two)]
    assert len(logs[0]) == 6 and logs[0][0]["loss"] != logs[0][-1]["loss"]
    for want, found in zip(*logs, strict=True):
        assert found == pytest.approx(want, rel=1e-5, abs=1e-6)
    assert difference(one, two) < 1e-8
    assert sorted(path.name for path in two.iterdir()) == ["log.json", "weights.pt"]


def test_steps_too_small_for_bfloat16_add_up_in_two_processes(trained):
    folder, _, _ = trained
    assert difference(folder / "one-bfloat16", folder / "two-bfloat16") < 0.01


def test_each_process_holds_half_of_the_optimizers_state(trained):
    """A tied embedding is most of a tiny model, and has one owner; in parts it has two."""
    _, one, two = trained
    kinds = [(one, two), (one["sharded"], [found["sharded"] for found in two])]
    for whole, halves in kinds:
        for kind in whole.keys() - {"sharded"}:
            assert sum(half[kind] for half in halves) == whole[kind] > 0
            if kind != "critic" or halves[0] is not two[0]:
                assert max(half[kind] for half in halves) < 0.51 * whole[kind]


def test_the_checkpoint_of_two_processes_is_that_of_one(trained):
    folder, _, _ = trained
    one, two = (torch.load(folder / f"{name}-dies.partial/checkpoint.pt") for name in ("kept-one", "two"))
    assert one.keys() == two.keys() and len(one["log"]) == len(two["log"]) == 4
    assert one["optimizer"]["param_groups"] == two["optimizer"]["param_groups"]
    assert one["optimizer"]["state"].keys() == two["optimizer"]["state"].keys()
    for i, moments in one["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.allclose(value, two["optimizer"]["state"][i][name], atol=1e-9), name
    for name, weight in one["weights"].items():
        assert torch.allclose(weight, two["weights"][name], atol=1e-8)


def test_a_run_goes_on_with_another_number_of_processes(trained):
    """From one to two, and from two to one: the same end as without a stop."""
    folder, _, _ = trained
    shutil.copytree(folder / "two-dies.partial", folder / "resumed.partial")
    ranks_worker.learn("actor", folder / "resumed")
    for resumed in ("one-dies", "resumed"):
        assert difference(folder / "one-actor", folder / resumed) < 1e-8
        log = json.loads((folder / resumed / "log.json").read_text())
        assert log[4] == pytest.approx(json.loads((folder / "one-actor/log.json").read_text())[4], rel=1e-5, abs=1e-6)


def test_sharded_weights_give_the_losses_of_one_process(trained):
    """FSDP2 over gloo, also after a stop with another number of processes; saved whole."""
    folder = trained[0] / "sharded"
    shutil.copytree(folder / "two-dies.partial", folder / "resumed.partial")
    ranks_worker.learn("actor", folder / "resumed", shard=folder / "actor")
    for one, two in (("one-critic", "two-critic"), ("one-actor", "two-actor"), ("one-actor", "one-dies"),
                     ("one-actor", "resumed")):
        logs = [json.loads((folder / out / "log.json").read_text()) for out in (one, two)]
        for want, found in zip(*logs, strict=True):
            assert found["loss"] == pytest.approx(want["loss"], abs=1e-9), two
        assert difference(folder / one, folder / two) < 1e-8
        assert "fsdp" not in (folder / two / "config.json").read_text().lower()


def test_work_is_dealt_out_and_comes_back_in_order(trained):
    _, _, two = trained
    for found in two:
        assert found["squares"] == [0, 1, 4, 9, 16] and found["first"] == 0


# ------------------------------------------------------------------ ends

@pytest.mark.parametrize("what, said", [("all", "everybody finds this"), ("one", "only one finds this"),
                                        ("group", "sixteen is refused")])
def test_an_error_ends_all_with_one_line(tmp_path, what, said):
    status, _, lines = ended(torchrun("tests/ranks_worker.py", what, tmp_path))
    assert status != 0 and lines == [f"sweet: rollout: {said}"]
    if what == "group":  # item 16 is in the sixth group, which comes with the fifth: four are kept
        kept = (tmp_path / "x.jsonl.partial").read_text().splitlines()
        assert kept == [json.dumps({"x": x}) for x in range(12)]


# ------------------------------------------------------------------ files

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A miniature run by one process."""
    run = tmp_path_factory.mktemp("run") / "whole"
    done = subprocess.run([sys.executable, "sweet.py", "eval", "--run", run, *TINY], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return run


def test_files_of_two_processes_are_those_of_one_also_after_a_kill(whole, tmp_path):
    """The models are given: two processes sample, score and evaluate with them, killed on the way and then not."""
    run = tmp_path / "two"
    shutil.copytree(whole, run)
    files = ["trajectories.jsonl", "samples.jsonl", "candidates.jsonl", "pairs.jsonl", "eval.jsonl"]
    for name in files:
        (run / name).unlink()
    running, half = torchrun("sweet.py", "eval", "--run", run, *TINY), run / "samples.jsonl.partial"
    while running.poll() is None and not (half.exists() and half.stat().st_size):
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    status, _, lines = ended(running)
    assert status != 0 and len([line for line in lines if "stopped by" in line]) <= 1
    status, out, lines = ended(torchrun("sweet.py", "eval", "--run", run, *TINY))
    assert status == 0 and out.count("eval is done") == 1
    assert len([line for line in lines if re.search(r"\d of \d, eval", line)]) == 1
    for name in files:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_every_stage_trains_under_torchrun(whole, tmp_path):
    """From nothing to a report, and the models are about those of one process; `table` starts processes of its own."""
    run = tmp_path / "all"
    status, out, _ = ended(torchrun("sweet.py", "--run", run, *TINY, "--credit-states", "4",
                                    "--credit-monte-carlo-states", "0"))
    assert status == 0 and "SWEET" in out and (run / "report.html").exists()
    for name in ("base", "critic", "actor", "rft", "multiturn"):
        assert (run / name / "model.safetensors").exists()
    first = [json.loads((folder / "base/log.json").read_text()) for folder in (run, whole)]
    assert first[0][-1]["loss"] == pytest.approx(first[1][-1]["loss"], abs=1e-4)
    status, _, lines = ended(torchrun("sweet.py", "table", "--run", run))
    assert status != 0 and len(lines) == 1 and "not under torchrun" in lines[0]


def test_the_flag_shard(whole, tmp_path):
    """The critic's stage alone, in float32 and in parts: the losses of one process, and a model that loads whole."""
    run = tmp_path / "parts"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "critic")
    status, _, _ = ended(torchrun("sweet.py", "critic", "--run", run, "--shard"))
    assert status == 0
    found, wanted = (json.loads((folder / "critic/log.json").read_text()) for folder in (run, whole))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in wanted], abs=1e-3)
    ours, theirs = (load_file(folder / "critic/model.safetensors") for folder in (run, whole))
    assert ours.keys() >= theirs.keys() and all(ours[name].shape == theirs[name].shape for name in theirs)
    status, _, lines = ended(torchrun("sweet.py", "critic", "--run", run, "--shard", "--lora", "4"))
    assert status != 0 and len(lines) == 1 and "--shard: expected several processes" in lines[0]
