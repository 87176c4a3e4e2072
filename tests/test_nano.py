"""nano.py is the plain path: its log-probs, losses and gradients are the core's, so that neither can drift."""
import copy
import random
import runpy
from pathlib import Path

import pytest
import torch

import actor
import critic
import nano
from bench.lines import CORE, lines_of_code
from kernels.logprob import collate, lay_out, turn_logprobs
from worlds import backend

ROOT = Path(__file__).resolve().parent.parent


def ragged(rng, lengths, vocabulary):
    """An example with turns of these lengths (0: the turn is absent), after and between some context."""
    input_ids, turn_ids = [], []
    for turn, length in enumerate(lengths, 1):
        context = 1 + int(rng.integers(1, 6))
        input_ids += rng.integers(1, vocabulary, context + length).tolist()
        turn_ids += [0] * context + [turn] * length
    return input_ids, turn_ids


@pytest.fixture
def model():
    model, _ = backend.new_model(backend.Base(hidden=16, layers=2), 0)
    return model.double().eval()


@pytest.fixture
def pairs():
    import numpy as np
    rng = np.random.default_rng(3)
    shapes = [([3, 1, 9], [2, 2]), ([1], [4, 1, 1, 7]), ([5, 2], [1, 6, 3])]
    made = [{"chosen": ragged(rng, better, 300), "rejected": ragged(rng, worse, 300)} for better, worse in shapes]
    for pair in made:  # any numbers will do as pi_ref's log-probs
        for side in ("chosen", "rejected"):
            pair[f"ref_{side}"] = rng.normal(-9, 3, max(pair[side][1])).tolist()
    return made


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_log_probs_of_turns(model, pairs):
    examples = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    sums_BK, lengths_BK = nano.turn_logprobs(model, examples)
    for batch in (collate(examples), lay_out(model, examples)):
        core_BK, core_lengths_BK = turn_logprobs(model, batch)
        close(sums_BK, core_BK)
        assert lengths_BK.tolist() == core_lengths_BK.tolist()
    alone = [nano.turn_logprobs(model, [example])[0][0] for example in examples]
    for row, sums_K in zip(sums_BK, alone):
        close(row[:len(sums_K)], sums_K)


def test_reference_log_probs_are_those_of_each_example_alone(model, pairs):
    examples = [pair["rejected"] for pair in pairs]
    rows = nano.reference_logprobs(model, examples, batch_size=2)
    for example, row in zip(examples, rows):
        close(torch.tensor(row, dtype=torch.float64), nano.turn_logprobs(model, [example])[0][0].detach())


def test_advantages(model, pairs):
    sums_BK, ref_BK, lengths_BK = nano.both_sides(model, pairs)
    ours_BK = nano.turn_advantages(sums_BK, ref_BK, lengths_BK)
    close(ours_BK, critic.turn_advantages(sums_BK, ref_BK, lengths_BK))
    assert ours_BK[lengths_BK == 0].abs().max() == 0


@pytest.mark.parametrize("nll", [0.0, 0.7])
def test_both_losses_and_their_gradients(model, pairs, nll):
    for ours, core in (
            (nano.critic_loss(model, pairs, 0.9, nll), critic.loss_fn(model, pairs, 0.9, nll, "turn")[0]),
            (nano.actor_loss(model, pairs, 0.3, nll), actor.preference_loss(model, pairs, 0.3, nll)[0])):
        close(ours, core)
        for mine, theirs in zip(gradients(model, ours), gradients(model, core)):
            close(mine, theirs)


def test_at_step_0_both_preference_losses_are_log_2_and_all_advantages_0(model, pairs):
    pairs = copy.deepcopy(pairs)
    nano.add_reference(model, pairs)
    log_2 = torch.tensor(2.0, dtype=torch.float64).log()
    close(nano.critic_loss(model, pairs, nll=0.0), log_2)
    close(nano.actor_loss(model, pairs, nll=0.0), log_2)
    assert nano.turn_advantages(*nano.both_sides(model, pairs)).abs().max() < 1e-6


def test_turn_pairs_take_one_of_the_better_and_one_of_the_worse_samples():
    groups = [{"prompt": [1, 2], "turns": [[5], [6], [7, 7]], "counts": [8, 6, 2]}]
    pairs = nano.all_turn_pairs(groups, [0.1, 0.3, -0.5], random.Random(0))
    # sorted samples: 6 times turn 1, 8 times turn 0, twice turn 2; the better half is 1 1 1 1 1 1 0 0
    found = {(tuple(pair["chosen"][0][2:]), tuple(pair["rejected"][0][2:])) for pair in pairs}
    assert len(found) == 2 and found <= {((6,), (5,)), ((6,), (7, 7)), ((5,), (7, 7))}
    assert pairs[0]["chosen"][1][:2] == [0, 0] and set(pairs[0]["chosen"][1][2:]) == {1}


def test_turn_pairs_are_those_of_the_core():
    rng = random.Random(1)
    for seed in range(50):
        counts = [rng.randint(1, 5) for _ in range(rng.randint(1, 6))]
        advantages = [rng.choice([-0.5, 0.0, 0.5, 1.0]) for _ in counts]  # with ties
        ours = nano.turn_pairs(advantages, counts, random.Random(seed))
        assert ours == actor.turn_pairs(advantages, counts, nano.pairs_per_state, random.Random(seed))


def test_importing_it_runs_nothing(capsys):
    runpy.run_path(nano.__file__, run_name="imported")
    assert capsys.readouterr().out == ""


def test_the_readme_counts_right():
    """Its number of lines of code of the five core files is what its command prints."""
    counted = sum(lines_of_code((ROOT / name).read_text(encoding="utf-8")) for name in CORE)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"are {counted:,} lines of code (`python -m bench.lines`;" in readme
