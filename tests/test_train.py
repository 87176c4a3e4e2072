"""The training loop: order of examples, micro-batches, and a run that was killed."""
import copy
import json
import math
from dataclasses import dataclass

import pytest
import torch
from conftest import perturbed, tiny_llama

import actor
import critic
from env import render
from machinery.train import batches_of, fit, load_model, save_to, take_step
from kernels.logprob import collate, reference_sums, turn_logprobs


@dataclass(frozen=True)
class Config:
    lr: float = 1e-2
    batch_size: int = 4
    epochs: int = 3


class Killed(Exception):
    pass


def squares(model, part, batch=None):
    """A loss that is a mean over its examples."""
    x, y = (torch.tensor(column) for column in zip(*part))
    error = ((model(x[:, None]).squeeze(-1) - y) ** 2).mean()
    return error, {"error": float(error.detach())}


def small(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(1, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))


POINTS = [(i / 10, math.sin(i)) for i in range(18)]


def saver(model):
    return lambda folder: torch.save(model.state_dict(), folder / "weights.pt")


# ------------------------------------------------------------------ order

@pytest.mark.parametrize("sizes", [None, [(7 * i) % 11 for i in range(23)]])
def test_each_epoch_holds_every_example_once(sizes):
    batches = list(batches_of(23, 4, 3, seed=5, sizes=sizes))
    assert len(batches) == 18
    epochs = [[i for batch in batches[6 * e:6 * e + 6] for i in batch] for e in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert all(1 <= len(batch) <= 4 for batch in batches) and sum(len(b) < 4 for b in batches) == 3


@pytest.mark.parametrize("sizes", [None, [(7 * i) % 11 for i in range(23)]])
def test_the_order_depends_on_seed_and_epoch_only(sizes):
    torch.manual_seed(1)
    first = list(batches_of(23, 4, 2, 5, sizes))
    torch.manual_seed(2)
    assert list(batches_of(23, 4, 3, 5, sizes))[:len(first)] == first
    assert list(batches_of(23, 4, 2, 6, sizes)) != first


def test_examples_of_like_size_share_a_batch():
    sizes = [(7 * i) % 40 for i in range(40)]
    for batch in batches_of(40, 8, 2, 0, sizes):
        assert max(sizes[i] for i in batch) - min(sizes[i] for i in batch) == 7
    order = [min(sizes[i] for i in batch) for batch in batches_of(40, 8, 1, 0, sizes)]
    assert order != sorted(order)


def test_no_examples_no_batches():
    assert list(batches_of(0, 4, 3, 0)) == []


# ------------------------------------------------------------------ a step

@pytest.mark.parametrize("micro", [1, 2, 3, 5, 7, 100])
def test_micro_batches_make_the_same_step(micro):
    whole, parts = small(), small()
    want = take_step(whole, POINTS[:7], squares, None)
    found = take_step(parts, POINTS[:7], squares, micro)
    assert found == pytest.approx(want, abs=1e-6)
    for a, b in zip(whole.parameters(), parts.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-6) and a.grad.abs().max() > 1e-3


def pair_examples(model, tokenizer, trajectories):
    examples = [{"chosen": critic.critic_view(tokenizer, trajectories[i]),
                 "rejected": critic.critic_view(tokenizer, trajectories[i + 1])} for i in range(0, 10, 2)]
    for side in ("chosen", "rejected"):
        for example, sums in zip(examples, reference_sums(model, [e[side] for e in examples])):
            example[f"ref_{side}"] = sums
    return examples


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("loss", ["critic", "actor", "rft"])
def test_micro_batches_make_the_same_step_of_every_stage(model64, trajectories, tokenizer, micro, loss):
    """The likelihood of chosen turns is a mean over the tokens of the step, not of its parts."""
    examples = pair_examples(model64, tokenizer, trajectories)
    assert len({sum(map(bool, example["chosen"][1])) for example in examples}) > 2  # or the means would be the same
    loss_fn = {"critic": lambda m, part, batch: critic.loss_fn(m, part, 1.0, 0.3, "turn", batch),
               "actor": lambda m, part, batch: actor.preference_loss(m, part, 0.1, 0.3, batch),
               "rft": lambda m, part, batch: actor.imitation_loss(m, [e["chosen"] for e in part],
                                                                  [e["chosen"] for e in batch])}[loss]
    whole, parts = perturbed(model64), perturbed(model64)
    want, found = take_step(whole, examples, loss_fn, None), take_step(parts, examples, loss_fn, micro)
    assert found == pytest.approx(want, abs=1e-6)
    for a, b in zip(whole.parameters(), parts.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


@pytest.mark.parametrize("stage", ["critic", "actor", "rft"])
def test_a_run_in_micro_batches_is_the_run(model, trajectories, tokenizer, tmp_path, stage):
    """The stages hand the whole batch over: the same log, step by step."""
    logs = []
    for micro in (None, 1):
        mine = copy.deepcopy(model)
        how, out = {"save": save_to(mine, tokenizer), "micro_batch": micro}, tmp_path / f"{stage}{micro}"
        if stage == "critic":
            pairs = [(trajectories[i], trajectories[i + 1]) for i in range(0, 10, 2)]
            cfg = critic.CriticSettings(nll=0.3, batch_size=5)
            logs.append(critic.train(mine, tokenizer, pairs, out, cfg, 0, **how))
        elif stage == "actor":
            logs.append(actor.train_preferences(mine, pair_examples(mine, tokenizer, trajectories), out,
                                                actor.ActorSettings(nll=0.3, batch_size=5), 0, label="actor", **how))
        else:
            views = [render(tokenizer, t["dialogue_history"]) for t in trajectories[:5]]
            logs.append(actor.train_imitation(mine, views, out, actor.Rft(batch_size=5, epochs=3), 0, label="rft",
                                              **how))
    for want, found in zip(*logs, strict=True):
        assert found == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_fit_is_adamw_with_warm_up_decay_and_clipping(tmp_path):
    """The same steps written out."""
    model, plain = small(), small()
    log = fit(model, POINTS, squares, tmp_path / "out", Config(), 3, saver(model), warmup=0.2, clip=0.05)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=Config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    plan = list(batches_of(18, 4, 3, 3))
    assert len(log) == len(plan) == 15
    for step, batch in enumerate(plan):
        for group in optimizer.param_groups:
            group["lr"] = Config.lr * min((step + 1) / 3, (15 - step) / 12)
        loss = squares(plain, [POINTS[i] for i in batch])[0]
        optimizer.zero_grad()
        loss.backward()
        norm, value = float(torch.sqrt(sum(p.grad.pow(2).sum() for p in plain.parameters()))), float(loss.detach())
        for p in plain.parameters():
            p.grad *= min(1.0, 0.05 / (norm + 1e-6))
        optimizer.step()
        assert log[step] == pytest.approx({"loss": value, "error": value, "grad_norm": norm}, abs=1e-5)
    for a, b in zip(model.parameters(), plain.parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    assert json.loads((tmp_path / "out" / "log.json").read_text()) == log


# ------------------------------------------------------------------ killed and resumed

def weights(folder):
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.parametrize("steps", [1, 4, 5, 14])
@pytest.mark.parametrize("every", [0.0, 1e9])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, steps, every):
    """every: seconds between checkpoints; at 1e9 there is none, and the run starts again."""
    whole = small()
    log = fit(whole, POINTS, squares, tmp_path / "whole", Config(), 3, saver(whole), checkpoint_seconds=every)
    calls = []

    def dies(model, part, batch):
        calls.append(part)
        if len(calls) > steps:
            raise Killed
        return squares(model, part)
    first = small()
    with pytest.raises(Killed):
        fit(first, POINTS, dies, tmp_path / "out", Config(), 3, saver(first), checkpoint_seconds=every)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    calls.clear()

    def counts(model, part, batch):
        calls.append(part)
        return squares(model, part)
    second = small()
    resumed = fit(second, POINTS, counts, tmp_path / "out", Config(), 3, saver(second), checkpoint_seconds=every)
    assert len(calls) == (15 - steps if every == 0.0 else 15)
    assert resumed == log and json.loads((tmp_path / "out" / "log.json").read_text()) == log
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["log.json", "weights.pt"]
    assert not (tmp_path / "out.partial").exists()


def test_killed_twice_and_while_saving(tmp_path):
    whole = small()
    log = fit(whole, POINTS, squares, tmp_path / "whole", Config(), 3, saver(whole))
    for steps in (3, 5):
        calls = []

        def dies(model, part, batch, calls=calls, steps=steps):
            calls.append(part)
            if len(calls) > steps:
                raise Killed
            return squares(model, part)
        with pytest.raises(Killed):
            model = small()
            fit(model, POINTS, dies, tmp_path / "out", Config(), 3, saver(model), checkpoint_seconds=0.0)

    def no_disk(folder):
        (folder / "weights.pt").write_bytes(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError):
        fit(small(), POINTS, squares, tmp_path / "out", Config(), 3, no_disk, checkpoint_seconds=0.0)
    assert not (tmp_path / "out").exists()
    model = small()
    assert fit(model, POINTS, squares, tmp_path / "out", Config(), 3, saver(model), checkpoint_seconds=0.0) == log
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_result_appears_only_at_the_end(tmp_path):
    out, model, seen = tmp_path / "out", small(), []

    def watches(m, part, batch):
        seen.append(out.exists())
        return squares(m, part)

    def save(folder):
        seen.append(out.exists())
        saver(model)(folder)
    fit(model, POINTS, watches, out, Config(), 3, save, checkpoint_seconds=0.0)
    assert seen == [False] * 16 and out.is_dir()


def test_the_critic_resumes_bit_for_bit(tokenizer, model, trajectories, tmp_path):
    """The real thing: language model, reference log-probs, Hugging Face directory."""
    pairs = [(trajectories[i + 1], trajectories[i]) for i in range(0, 24, 2)]
    cfg, folders = critic.CriticSettings(epochs=2, lr=1e-2, nll=0.0), {}

    def run(name, die_after=None, monkey=None):
        mine = tiny_llama(len(tokenizer))
        if die_after is not None:
            steps = []

            def dies(*args):
                steps.append(1)
                if len(steps) > die_after:
                    raise Killed
                return real(*args)
            real = critic.loss_fn
            monkey.setattr(critic, "loss_fn", dies)
        folders[name] = tmp_path / name
        return critic.train(mine, tokenizer, pairs, tmp_path / name, cfg, 0, save_to(mine, tokenizer))
    log = run("whole")
    real_fit = critic.fit
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(critic, "fit", lambda *args, **kwargs: real_fit(*args, **kwargs, checkpoint_seconds=0.0))
        with pytest.raises(Killed):
            run("killed", 2, monkey)
    assert run("killed") == log and not (tmp_path / "killed.partial").exists()
    ours, theirs = (load_model(folders[name])[0].state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert abs(log[0]["loss"] - math.log(2)) < 1e-5 and log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["accuracy"] > 0.5


# ------------------------------------------------------------------ step 0 through the whole loop

def preference_examples(tokenizer, trajectories):
    return [{side: actor.turn_view(tokenizer, trajectories[i]["dialogue_history"][:1],
                                   trajectories[j]["dialogue_history"][1])
             for side, j in (("chosen", i), ("rejected", i + 1))} for i in range(0, 12, 2)]


def test_training_starts_at_log_2_and_learns(tokenizer, trajectories, tmp_path):
    """Chosen turns gain on rejected ones, and the saved policy opens again with the same log-probs."""
    model, cfg = tiny_llama(len(tokenizer)), actor.ActorSettings(lr=1e-2, nll=0.0, batch_size=6, epochs=8)
    examples = preference_examples(tokenizer, trajectories)
    log = actor.train_preferences(model, examples, tmp_path / "actor", cfg, 0, save_to(model, tokenizer), "actor")
    assert abs(log[0]["loss"] - math.log(2)) < 1e-5 and log[-1]["loss"] < 0.5
    again, same_tokenizer = load_model(tmp_path / "actor")
    batch = collate([e["chosen"] for e in examples])
    assert torch.allclose(turn_logprobs(again, batch)[0], turn_logprobs(model, batch)[0], atol=1e-4)
    messages = trajectories[0]["dialogue_history"]
    assert render(same_tokenizer, messages) == render(tokenizer, messages)


def test_dropout_does_not_move_step_0(tokenizer, trajectories, tmp_path):
    """A policy whose configuration has dropout is its own reference before the first step, too."""
    model = tiny_llama(len(tokenizer), attention_dropout=0.5)
    cfg = actor.ActorSettings(lr=1e-2, nll=0.0, batch_size=6, epochs=1)
    log = actor.train_preferences(model, preference_examples(tokenizer, trajectories), tmp_path / "actor", cfg, 0,
                                  save_to(model, tokenizer), "actor")
    assert abs(log[0]["loss"] - math.log(2)) < 1e-4


def test_imitation_raises_the_log_probs(tokenizer, trajectories, tmp_path):
    model = tiny_llama(len(tokenizer))
    views = [render(tokenizer, t["dialogue_history"]) for t in trajectories[:8]]
    log = actor.train_imitation(model, views, tmp_path / "rft", actor.Rft(lr=1e-2, batch_size=8, epochs=10), 0,
                                save_to(model, tokenizer), "rft")
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
