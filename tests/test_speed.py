"""Tokens a second and the share of the peak (machinery/speed.py): against counts by hand, and it changes no file."""
import json

import pytest
import torch
from conftest import save_model, tiny_llama

import sweet as program
from machinery import speed
from machinery.folder import closing
from machinery.sampling import sample
from machinery.train import Machine, load_model
from kernels.logprob import head_is_plain, lay_out, reference_sums, turn_logprobs
from kernels.prefix import can_share
from worlds import backend as world

EXAMPLES = [([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 4, 3, 2, 8], [0, 0, 0, 1, 1])]
# of tiny_llama: four times 16 x 16, three times 16 x 24 and two norms a layer, and one norm at the end
LAYER = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
BODY = 2 * LAYER + 16


@pytest.fixture
def counted(monkeypatch):
    """A model that was probed before anybody counts, and its Speed; the peak is 1000 operations a second."""
    monkeypatch.setattr(speed, "peak", lambda machine: 1000.0)
    model = tiny_llama(60)
    assert head_is_plain(model) and can_share(model)
    found = speed.Speed(Machine())
    assert found.watch(model) is model
    return model, found


def test_reading_and_learning(counted):
    model, found = counted
    reference_sums(model, EXAMPLES)
    assert found.end(2.0) == {"read": 5.0, "share": pytest.approx(10 * 2 * BODY / 2 / 1000, rel=5e-3)}  # 2 rows of 5
    found.watch(model)
    turn_logprobs(model, lay_out(model, EXAMPLES))[0].sum().backward()
    assert found.end(2.0) == {"learned": 5.0, "share": pytest.approx(10 * 6 * BODY / 2 / 1000, rel=5e-3)}


def test_memory_on_a_gpu_is_that_of_the_stage(counted, monkeypatch):
    """No GPU is needed: what torch would count there is given."""
    model, _ = counted
    held = {"peak": 7 * 2 ** 30}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update(peak=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["peak"])
    found = speed.Speed(Machine(device="cuda:0"))
    found.watch(model)
    reference_sums(model, EXAMPLES)
    held["peak"] += 3 * 2 ** 29  # what this stage takes at most
    ended = found.end(2.0)
    assert ended["gib"] == 1.5 and speed.in_words(ended).endswith("of the peak; 1.5 GiB")
    assert held["peak"] == 0  # the next stage starts anew


def test_a_gpu_that_is_not_there_is_left_to_the_check_of_devices():
    for device in ("cuda", "cuda:9", "cudax"):
        assert speed.Speed(Machine(device=device)).end(1.0) == {}


def test_what_is_frozen_takes_no_gradient(counted):
    model, found = counted
    found.end(1.0)
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    found.watch(model)
    turn_logprobs(model, lay_out(model, EXAMPLES))
    wanted = 10 * (4 * BODY + 2 * LAYER)
    assert found.end(1.0)["share"] == pytest.approx(wanted / 1000, rel=5e-3)


def test_sampling_and_the_end_of_counting(counted):
    model, found = counted
    tokenizer = world.make_tokenizer()
    model = tiny_llama(len(tokenizer))
    assert head_is_plain(model) and can_share(model)
    found.watch(model)
    turns = sample(model, tokenizer, [[300, 301, 302]] * 4, range(4), max_tokens=5, count=found.wrote)
    steps = max(map(len, turns)) - 1
    rates = found.end(1.0)
    assert rates["written"] == sum(map(len, turns)) and "learned" not in rates
    assert 2 + 4 + steps <= rates["read"] <= 2 + 4 + 4 * steps  # the prefix once, its last token and a step for each
    sample(model, tokenizer, [[300, 301, 302]], [0], max_tokens=2)
    assert found.end(1.0) == {} and not model.base_model._forward_hooks


def test_the_peak_is_that_of_a_matrix_product():
    """Within a factor: this machine is busy with other things."""
    square = torch.ones(1024, 1024)
    found = speed.peak(Machine())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        square @ square
    row, = (row for row in seen.key_averages() if row.key == "aten::mm")
    assert found / (2 * 1024 ** 3 / (row.cpu_time_total * 1e-6)) > 0.2


def test_a_run_keeps_it_and_says_it(tmp_path, capsys):
    model = save_model(tmp_path / "model", seed=3)
    run = tmp_path / "run"
    program.main(["rollout", "--run", str(run), "--model", model, "--base-documents", "4", "--base-epochs", "1",
                  "--rollout-tasks", "1", "--rollout-per-task", "2", "--rollout-max-turns", "2",
                  "--rollout-max-tokens", "3"])
    kept = json.loads((run / "speed.json").read_text())
    seconds = json.loads((run / "seconds.json").read_text())
    assert set(kept) == {"base", "rollout"} and set(kept["rollout"]) == {"written", "read", "share"}
    assert set(kept["base"]) >= {"learned", "share"}
    written = 0
    for line in (run / "trajectories.jsonl").read_text().splitlines():
        written += sum(len(message["output_ids"]) for message in json.loads(line)["dialogue_history"][1::2])
    assert written / kept["rollout"]["written"] == pytest.approx(seconds["rollout"], abs=0.06 + 0.01 * written)
    capsys.readouterr()
    program.main(["status", "--run", str(run)])
    said = speed.in_words(kept["rollout"])
    assert said.startswith("tokens/s: ") and said.endswith(" % of the peak")
    row, = (row for row in capsys.readouterr().out.splitlines() if row.startswith("  rollout "))
    assert row.endswith(said)
    assert f"  rollout: {said}" in closing(program.open_run(["--run", str(run)])).splitlines()
    assert load_model(run / "base")
