"""Log-probs, Eq. 2-4 and ranking, against float64 arithmetic written out here."""
import copy
import math
import random

import pytest
import torch
from conftest import eager, gemma2, perturbed, tiny_llama

import actor
import critic
from env import end_of_turn, render
from kernels import prefix
from kernels.logprob import collate, head_is_plain, pad_turns, reference_sums, token_logprobs, turn_logprobs

LOG2 = math.log(2.0)


# ------------------------------------------------------------------ oracles: no function of the project

def hand_log_softmax(row_V):
    """log softmax of one row, written out."""
    top = row_V.max().detach()
    return row_V - top - torch.log(torch.exp(row_V - top).sum())


def flat(segments):
    """[(context ids, turn ids), ...] -> input_ids, turn_ids."""
    input_ids, turn_ids = [], []
    for k, (context, turn) in enumerate(segments, 1):
        input_ids += context + turn
        turn_ids += [0] * len(context) + [k] * len(turn)
    return input_ids, turn_ids


def hand_turns(model, segments):
    """For each turn the list of its tokens' log-probs: one unpadded row, the whole model, a loop over tokens."""
    input_ids, _ = flat(segments)
    logits_TV = model(input_ids=torch.tensor([input_ids])).logits[0]
    turns, position = [], 0
    for context, turn in segments:
        position += len(context)
        logps = []
        for token in turn:
            logps.append(hand_log_softmax(logits_TV[position - 1])[token])
            position += 1
        turns.append(logps)
    return turns


def hand_advantages(model, initial, segments):
    """Eq. 3 for every turn of a dialogue; 0 for a turn without tokens."""
    with torch.no_grad():
        reference = hand_turns(initial, segments)
    result = []
    for ours, theirs in zip(hand_turns(model, segments), reference):
        total = torch.zeros((), dtype=torch.float64)
        for a, b in zip(ours, theirs):
            total = total + (a - b)
        result.append(total / max(1, len(ours)))
    return result


def hand_mean_nll(model, dialogues):
    """Minus the mean log-prob of all agent tokens of some dialogues."""
    logps = [logp for segments in dialogues for turn in hand_turns(model, segments) for logp in turn]
    return -sum(logps) / len(logps)


def hand_critic_loss(model, initial, pairs, beta, nll):
    """Eq. 2, plus nll times the mean over the chosen agent tokens."""
    loss = 0.0
    for better, worse in pairs:
        margin = sum(hand_advantages(model, initial, better)) - sum(hand_advantages(model, initial, worse))
        loss = loss + torch.log(1 + torch.exp(-beta * margin)) / len(pairs)
    return loss + nll * hand_mean_nll(model, [better for better, _ in pairs])


def hand_actor_loss(model, initial, pairs, beta, nll):
    """Eq. 4, plus nll times the mean over the chosen agent tokens."""
    loss = 0.0
    for chosen, rejected in pairs:
        ratios = []
        for segments in (chosen, rejected):
            with torch.no_grad():
                reference = sum(logp for turn in hand_turns(initial, segments) for logp in turn)
            ratios.append(sum(logp for turn in hand_turns(model, segments) for logp in turn) - reference)
        loss = loss + torch.log(1 + torch.exp(-beta * (ratios[0] - ratios[1]))) / len(pairs)
    return loss + nll * hand_mean_nll(model, [chosen for chosen, _ in pairs])


def dialogue(rng, vocab, n_turns):
    """Random segments of n_turns turns, one to five tokens each."""
    def ids(low, high):
        return [rng.randrange(vocab) for _ in range(rng.randint(low, high))]
    return [(ids(1, 4), ids(1, 5)) for _ in range(n_turns)]


def pairs_of(shapes, vocab, seed=0):
    """Pairs of dialogues with the given numbers of turns."""
    rng = random.Random(seed)
    return [(dialogue(rng, vocab, a), dialogue(rng, vocab, b)) for a, b in shapes]


def as_batch(initial, pairs):
    """Pairs of segments -> what critic.loss_fn and actor.preference_loss read."""
    batch = [{"chosen": flat(better), "rejected": flat(worse)} for better, worse in pairs]
    for side in ("chosen", "rejected"):
        for example, sums in zip(batch, reference_sums(initial, [e[side] for e in batch])):
            example[f"ref_{side}"] = sums
    return batch


def gradients(loss, model):
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), grads)}


def assert_same_gradients(ours, theirs, tolerance=1e-6):
    for name in theirs:
        difference = (ours[name] - theirs[name]).abs().max().item()
        assert difference <= tolerance * max(1.0, theirs[name].abs().max().item()), (name, difference)


# ------------------------------------------------------------------ token_logprobs

@pytest.mark.parametrize("n, chunk, keep", [(1, 1024, 4), (7, 3, 0), (9, 3, 2), (8, 1, 4), (13, 12, 1), (0, 4, 1)])
def test_token_logprobs_and_both_gradients(n, chunk, keep):
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (n,), generator=generator)
    outer = torch.randn(n, generator=generator, dtype=torch.float64)
    ours = token_logprobs(hidden, weight, targets, chunk, keep)
    theirs = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    assert ours.shape == (n,) and ours.dtype == torch.float64
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    want = torch.autograd.grad((theirs * outer).sum(), (hidden, weight))
    for _ in range(2):  # what was kept for the backward pass is still there for a second one
        for a, b in zip(torch.autograd.grad((ours * outer).sum(), (hidden, weight), retain_graph=True), want):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_token_logprobs_with_a_frozen_head_or_a_frozen_body():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(6, 4).double(), torch.randn(9, 4).double(), torch.tensor([0, 8, 3, 3, 1, 2])
    want = (hidden @ weight.T).log_softmax(-1)[torch.arange(6), targets]
    for first, second in ((True, False), (False, True)):
        h, w = hidden.clone().requires_grad_(first), weight.clone().requires_grad_(second)
        ours = token_logprobs(h, w, targets, 4)
        assert torch.allclose(ours, want, atol=1e-12)
        ours.sum().backward()
        assert (h.grad is not None) == first and (w.grad is not None) == second


def test_bf16_error_is_no_worse_than_eager():
    """The yardstick is float64 on the same bf16 numbers; eager is the usual logits.float().log_softmax()."""
    generator = torch.Generator().manual_seed(1)
    n, width, vocab = 300, 32, 500
    base_h = torch.randn(n, width, generator=generator).bfloat16()
    base_w = torch.randn(vocab, width, generator=generator).mul(0.3).bfloat16()
    targets = torch.randint(vocab, (n,), generator=generator)

    def run(function, dtype):
        h, w = base_h.to(dtype).requires_grad_(), base_w.to(dtype).requires_grad_()
        out = function(h, w, targets)
        out.sum().backward()
        return [x.detach().double() for x in (out, h.grad, w.grad)]
    exact = run(eager, torch.float64)
    ours = run(lambda *given: token_logprobs(*given, 128), torch.bfloat16)
    usual = run(eager, torch.bfloat16)
    for name, right, mine, other in zip(("value", "hidden", "weight"), exact, ours, usual):
        assert (mine - right).abs().max() <= 1.05 * (other - right).abs().max() + 1e-6, name
    assert token_logprobs(base_h, base_w, targets).dtype == torch.float32


def test_bf16_gradients_of_confident_tokens():
    """Rows that give their target more than 0.95, whose gradients are small differences: as near to float64's as
    eager's own."""
    generator = torch.Generator().manual_seed(2)
    weight, targets = torch.randn(500, 64, generator=generator).bfloat16(), torch.randint(500, (200,))
    hidden = (weight[targets] * 0.18).bfloat16()

    def gradients_of(function, dtype):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        value = function(h, w, targets)
        return [g.double() for g in torch.autograd.grad(value[sure].sum(), (h, w))]
    sure = eager(hidden.double(), weight.double(), targets).exp() > 0.95
    assert sure.sum() > 100
    ways = ((eager, torch.float64), (token_logprobs, torch.bfloat16), (eager, torch.bfloat16))
    for right, mine, other in zip(*(gradients_of(*way) for way in ways)):
        assert (mine - right).norm() < 1.2 * (other - right).norm()


# ------------------------------------------------------------------ turn_logprobs

@pytest.mark.parametrize("name", ["model64", "grouped64"])
def test_turn_logprobs_against_a_loop_over_tokens(name, request):
    model = request.getfixturevalue(name)
    rng = random.Random(2)
    dialogues = [dialogue(rng, model.config.vocab_size, k) for k in (1, 3, 2, 10)]
    sums, lengths = turn_logprobs(model, collate([flat(d) for d in dialogues]))
    assert sums.shape == lengths.shape == (4, 10)
    for b, segments in enumerate(dialogues):
        turns = hand_turns(model, segments) + [[]] * (10 - len(segments))
        assert lengths[b].tolist() == [len(turn) for turn in turns]
        assert sums[b].tolist() == pytest.approx([sum(float(logp.detach()) for logp in turn) for turn in turns])


def test_a_row_without_agent_tokens_has_one_empty_turn(model):
    sums, lengths = turn_logprobs(model, collate([([5, 6, 7], [0, 0, 0])]))
    assert sums.tolist() == [[0.0]] and lengths.tolist() == [[0.0]]


def test_the_normaliser_counts_what_the_sum_adds(tokenizer, trajectories):
    """Under a uniform model every token has log-prob -log V, so every turn's mean is -log V: end tokens, cut-off
    turns and all."""
    uniform = tiny_llama(len(tokenizer), layers=1, tie=False)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    uniform.double()
    views = [critic.critic_view(tokenizer, t) for t in trajectories]
    sums, lengths = turn_logprobs(uniform, collate(views))
    present = lengths > 0
    assert torch.allclose(sums[present] / lengths[present], torch.full_like(sums[present], -math.log(len(tokenizer))))
    for normalize in ("turn", "trajectory"):
        advantages = critic.turn_advantages(sums, torch.zeros_like(sums), lengths, normalize)
        found = advantages[present] if normalize == "turn" else advantages.sum(-1)
        assert torch.allclose(found, torch.full_like(found, -math.log(len(tokenizer))))


def test_every_row_has_its_own_mask(model, trajectories, tokenizer):
    """A known fault returned the mask of the last row for the whole batch."""
    views = [critic.critic_view(tokenizer, t) for t in trajectories]
    _, lengths = turn_logprobs(model, collate(views))
    for row, (_, turn_ids) in zip(lengths.tolist(), views):
        assert [int(n) for n in row] == [turn_ids.count(k + 1) for k in range(len(row))]
    assert len({tuple(row) for row in lengths.tolist()}) > 3


def test_padding_order_and_batch_size_change_nothing(model, trajectories, tokenizer):
    views = [critic.critic_view(tokenizer, t) for t in trajectories[:16]]
    alone = [turn_logprobs(model, collate([view]))[0][0] for view in views]
    for indices in (list(range(8)), list(range(15, -1, -1)), [3, 3, 9]):
        batch = collate([views[i] for i in indices])
        wide = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in batch.items()}
        wide["input_ids"][:, -5:] = 17  # what the padding holds must not matter
        for sums in (turn_logprobs(model, batch)[0], turn_logprobs(model, wide)[0]):
            for row, i in zip(sums, indices):
                assert torch.allclose(row[:len(alone[i])], alone[i], rtol=1e-5, atol=1e-5)
                assert (row[len(alone[i]):] == 0).all()


def test_batch_of_one_equals_batch_of_eight(model, trajectories, tokenizer):
    """Loss and gradient of eight pairs are the mean of eight losses of one pair."""
    initial, trained = model, perturbed(model, size=0.02)
    batch = [{"chosen": critic.critic_view(tokenizer, trajectories[i]),
              "rejected": critic.critic_view(tokenizer, trajectories[i + 8])} for i in range(8)]
    for side in ("chosen", "rejected"):
        for example, sums in zip(batch, reference_sums(initial, [e[side] for e in batch])):
            example[f"ref_{side}"] = sums
    for loss_fn in (lambda b: critic.loss_fn(trained, b, 1.0, 0.0, "turn")[0],
                    lambda b: actor.preference_loss(trained, b, 0.05, 0.0)[0]):
        whole = loss_fn(batch)
        single = sum(loss_fn([example]) for example in batch) / 8
        assert abs(float(whole.detach() - single.detach())) < 1e-5 and abs(float(whole.detach()) - LOG2) > 1e-3
        assert_same_gradients(gradients(whole, trained), gradients(single, trained), 1e-5)


def test_reference_sums_do_not_depend_on_the_batches(model64, trajectories, tokenizer):
    views = [critic.critic_view(tokenizer, t) for t in trajectories[:10]]
    one_by_one = [turn_logprobs(model64, collate([view]))[0][0].tolist() for view in views]
    for budget in (1, 300, 10 ** 6):
        result = reference_sums(model64, views, batch_tokens=budget)
        for ours, theirs, (_, turn_ids) in zip(result, one_by_one, views):
            assert len(ours) == max(turn_ids) and ours == pytest.approx(theirs, abs=1e-9)


def test_pad_turns():
    padded = pad_turns([[1.0], [2.0, 3.0], []], torch.ones(3, 2, requires_grad=True))
    assert padded.tolist() == [[1.0, 0.0], [2.0, 3.0], [0.0, 0.0]] and not padded.requires_grad


# ------------------------------------------------------------------ Eq. 2, 3, 4 by hand

SHAPES = [(1, 3), (4, 2), (2, 2), (10, 1)]


@pytest.mark.parametrize("name", ["model64", "grouped64"])
@pytest.mark.parametrize("beta, nll", [(0.1, 0.0), (1.0, 0.01), (2.0, 0.5)])
def test_critic_loss_and_gradient_by_hand(name, beta, nll, request):
    """Eq. 2 and 3: the critic's training loss in float64, and its gradient for every parameter."""
    initial = request.getfixturevalue(name)
    trained = perturbed(initial)
    pairs = pairs_of(SHAPES, initial.config.vocab_size)
    loss, _ = critic.loss_fn(trained, as_batch(initial, pairs), beta, nll, "turn")
    by_hand = hand_critic_loss(trained, initial, pairs, beta, nll)
    assert abs(float(loss.detach()) - float(by_hand.detach())) < 1e-6
    assert abs(float(by_hand.detach()) - LOG2) > 1e-3
    assert_same_gradients(gradients(loss, trained), gradients(by_hand, trained))


@pytest.mark.parametrize("name", ["model64", "grouped64"])
@pytest.mark.parametrize("beta, nll", [(0.1, 0.0), (1.0, 0.01)])
@pytest.mark.parametrize("shapes", [[(1, 1), (1, 1), (1, 1)], SHAPES])
def test_actor_loss_and_gradient_by_hand(name, beta, nll, shapes, request):
    """Eq. 4 on single turns and, as multi-turn DPO uses it, on whole trajectories."""
    initial = request.getfixturevalue(name)
    trained = perturbed(initial)
    pairs = pairs_of(shapes, initial.config.vocab_size, seed=4)
    loss, _ = actor.preference_loss(trained, as_batch(initial, pairs), beta, nll)
    by_hand = hand_actor_loss(trained, initial, pairs, beta, nll)
    assert abs(float(loss.detach()) - float(by_hand.detach())) < 1e-6
    assert_same_gradients(gradients(loss, trained), gradients(by_hand, trained))


def test_advantages_by_hand(model64):
    trained = perturbed(model64)
    rng = random.Random(8)
    dialogues = [dialogue(rng, model64.config.vocab_size, k) for k in (3, 1, 5)]
    batch = collate([flat(d) for d in dialogues])
    sums, lengths = turn_logprobs(trained, batch)
    advantages = critic.turn_advantages(sums, turn_logprobs(model64, batch)[0], lengths)
    for row, segments in zip(advantages.tolist(), dialogues):
        by_hand = [float(a.detach()) for a in hand_advantages(trained, model64, segments)]
        assert row == pytest.approx(by_hand + [0.0] * (5 - len(by_hand)), abs=1e-9)


def test_imitation_loss_is_minus_the_mean_log_prob_of_agent_tokens(model64):
    rng = random.Random(9)
    dialogues = [dialogue(rng, model64.config.vocab_size, k) for k in (2, 4)]
    trained = perturbed(model64)
    loss, _ = actor.imitation_loss(trained, [flat(d) for d in dialogues])
    by_hand = hand_mean_nll(trained, dialogues)
    assert abs(float(loss.detach() - by_hand.detach())) < 1e-9
    assert_same_gradients(gradients(loss, trained), gradients(by_hand, trained))


def test_losses_on_hand_worked_numbers():
    """-log sigmoid(x) = log(1 + e^-x)."""
    chosen, rejected = torch.tensor([[1.0, 2.0], [0.0, 0.5]]).double(), torch.tensor([[0.5, 0.5], [1.0, 0.0]]).double()
    want = (math.log(1 + math.exp(-0.5 * 2.0)) + math.log(1 + math.exp(0.5 * 0.5))) / 2
    assert float(critic.bradley_terry_loss(chosen, rejected, 0.5)) == pytest.approx(want, abs=1e-12)
    values = [torch.tensor(x).double() for x in ([-4.0, -9.0], [-6.0, -5.0], [-5.0, -9.5], [-5.0, -5.5])]
    want = (math.log(1 + math.exp(-0.2 * 2.0)) + math.log(1 + math.exp(-0.2 * 0.0))) / 2
    assert float(actor.dpo_loss(*values, 0.2)) == pytest.approx(want, abs=1e-12)


def test_each_rejected_is_compared_with_its_own_chosen():
    """A known fault compared every chosen with the rejected one of the first pair."""
    chosen, rejected = torch.zeros(3, 2).double(), torch.tensor([[0.0, 0.0], [4.0, 0.0], [-2.0, -3.0]]).double()
    want = sum(math.log(1 + math.exp(x)) for x in (0.0, 4.0, -5.0)) / 3
    assert float(critic.bradley_terry_loss(chosen, rejected, 1.0)) == pytest.approx(want, abs=1e-12)
    zero, sums = torch.zeros(3).double(), rejected.sum(-1)
    assert float(actor.dpo_loss(zero, sums, zero, zero, 1.0)) == pytest.approx(want, abs=1e-12)


def test_huge_margins_stay_finite():
    far = torch.tensor([[-4000.0]], requires_grad=True)
    loss = critic.bradley_terry_loss(far, -far.detach(), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(8000.0) and far.grad.item() == pytest.approx(-1.0)


def test_normalize_on_hand_worked_numbers():
    sums = torch.tensor([[-6.0, -2.0, 0.0], [-3.0, -8.0, -1.0]])
    reference = torch.tensor([[-8.0, -1.0, 0.0], [-3.0, -2.0, -2.0]])
    lengths = torch.tensor([[4.0, 2.0, 0.0], [1.0, 3.0, 2.0]])
    wanted = {"turn": [[0.5, -0.5, 0.0], [0.0, -2.0, 0.5]], "none": [[2.0, -1.0, 0.0], [0.0, -6.0, 1.0]],
              "trajectory": [[2 / 6, -1 / 6, 0.0], [0.0, -1.0, 1 / 6]]}
    for normalize, want in wanted.items():
        assert torch.allclose(critic.turn_advantages(sums, reference, lengths, normalize), torch.tensor(want))
    assert torch.equal(critic.turn_advantages(sums, reference, lengths),
                       critic.turn_advantages(sums, reference, lengths, "turn"))
    with pytest.raises(KeyError):
        critic.turn_advantages(sums, reference, lengths, "tokens")


# ------------------------------------------------------------------ step 0, absent turns

@pytest.mark.parametrize("normalize", ["turn", "none", "trajectory"])
def test_step_0_of_the_critic(model, trajectories, tokenizer, normalize):
    """Before the first update every advantage is 0 and every loss log 2."""
    batch = [{"chosen": critic.critic_view(tokenizer, trajectories[i]),
              "rejected": critic.critic_view(tokenizer, trajectories[i + 1])} for i in range(0, 24, 2)]
    for side in ("chosen", "rejected"):
        views = [e[side] for e in batch]
        for example, sums in zip(batch, reference_sums(model, views, batch_tokens=500)):
            example[f"ref_{side}"] = sums
        sums, lengths = turn_logprobs(model, collate(views))
        reference = pad_turns([e[f"ref_{side}"] for e in batch], sums)
        assert critic.turn_advantages(sums, reference, lengths, normalize).abs().max() < 1e-4
    for part in (batch, batch[:1], batch[5:8]):
        loss, metrics = critic.loss_fn(model, part, 1.0, 0.0, normalize)
        assert abs(float(loss.detach()) - LOG2) < 1e-4 and abs(metrics["margin"]) < 1e-4


def test_step_0_of_the_actor_and_of_multiturn_dpo(model, trajectories, tokenizer):
    turns = []
    for i in range(0, 20, 2):
        prompt = trajectories[i]["dialogue_history"][:1]
        turns.append({side: actor.turn_view(tokenizer, prompt, trajectories[j]["dialogue_history"][1])
                      for side, j in (("chosen", i), ("rejected", i + 1))})
    whole = [{"chosen": render(tokenizer, trajectories[i]["dialogue_history"]),
              "rejected": render(tokenizer, trajectories[i + 1]["dialogue_history"])} for i in range(0, 20, 2)]
    for batch in (turns, whole):
        for side in ("chosen", "rejected"):
            for example, sums in zip(batch, reference_sums(model, [e[side] for e in batch], batch_tokens=700)):
                example[f"ref_{side}"] = sums
        for part in (batch, batch[:1]):
            loss, metrics = actor.preference_loss(model, part, 1.0, 0.0)
            assert abs(float(loss.detach()) - LOG2) < 1e-4 and abs(metrics["margin"]) < 1e-3


def test_absent_turns_have_advantage_0_and_finite_gradients():
    sums = torch.tensor([[-4.0, 0.0], [-2.0, -3.0]], requires_grad=True)
    lengths = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    for normalize in ("turn", "none", "trajectory"):
        advantages = critic.turn_advantages(sums, torch.tensor([[-3.0, -7.0], [-2.5, -1.0]]), lengths, normalize)
        assert advantages[0, 1] == 0
        grad, = torch.autograd.grad(critic.bradley_terry_loss(advantages[:1], advantages[1:], 1.0), sums)
        assert torch.isfinite(grad).all() and grad[0, 1] == 0 and (grad[lengths > 0] != 0).all()


def test_a_cut_off_turn_of_zero_tokens(model64):
    """An empty turn adds nothing, in the middle or at the end, and its neighbours keep their own advantages."""
    trained = perturbed(model64)
    rng = random.Random(10)
    full, other = dialogue(rng, model64.config.vocab_size, 3), dialogue(rng, model64.config.vocab_size, 2)
    middle = [full[0], (full[1][0], []), full[2]]
    last = [full[0], full[1], (full[2][0], [])]
    for nll in (0.0, 0.1):
        pairs = [(middle, other), (other, last)]
        loss, metrics = critic.loss_fn(trained, as_batch(model64, pairs), 1.0, nll, "turn")
        by_hand = hand_critic_loss(trained, model64, pairs, 1.0, nll)
        assert abs(float(loss.detach() - by_hand.detach())) < 1e-9
        assert_same_gradients(gradients(loss, trained), gradients(by_hand, trained))
        assert all(math.isfinite(value) for value in metrics.values())


def test_the_margin_in_the_last_turn_after_an_empty_turn(model64):
    """margin_answers is the margin of the last turns; an empty turn before them does not shift them."""
    trained = perturbed(model64)
    rng = random.Random(11)
    full, other = dialogue(rng, model64.config.vocab_size, 3), dialogue(rng, model64.config.vocab_size, 2)
    gap = [full[0], (full[1][0], []), full[2]]
    _, metrics = critic.loss_fn(trained, as_batch(model64, [(gap, other)]), 1.0, 0.0, "turn")
    want = hand_advantages(trained, model64, gap)[-1] - hand_advantages(trained, model64, other)[-1]
    assert metrics["margin_answers"] == pytest.approx(float(want.detach()), abs=1e-9)


def test_a_dialogue_without_any_agent_token(model64):
    """All its turns were cut off at once: it counts as advantage 0 and stops nothing."""
    trained = perturbed(model64)
    rng = random.Random(12)
    empty, other = [([5, 6], []), ([7], [])], dialogue(rng, model64.config.vocab_size, 2)
    loss, _ = critic.loss_fn(trained, as_batch(model64, [(other, empty)]), 1.0, 0.0, "turn")
    by_hand = hand_critic_loss(trained, model64, [(other, empty)], 1.0, 0.0)
    assert abs(float(loss.detach() - by_hand.detach())) < 1e-9


# ------------------------------------------------------------------ one code path for training and ranking

def states_of(trajectories, tokenizer):
    """Each turn of each trajectory as a state with one candidate: the turn itself."""
    states = []
    for trajectory in trajectories:
        messages = trajectory["dialogue_history"]
        for t in range(1, len(messages), 2):
            ids = messages[t].get("output_ids")
            if ids is None:
                ids = tokenizer(messages[t]["content"], add_special_tokens=False).input_ids + [end_of_turn(tokenizer)]
            states.append({"task": trajectory["task"], "messages": messages[:t],
                           "candidates": [{"content": messages[t]["content"], "output_ids": ids}]})
    return states


@pytest.mark.parametrize("reference", [True, False])
def test_ranking_equals_training(model64, trajectories, tokenizer, reference):
    """The advantage of a candidate is that of the same turn in its trajectory, whichever turn it is."""
    trained = perturbed(model64)
    states = states_of(trajectories[:12], tokenizer)
    critic.score_reference(model64, tokenizer, states)
    critic.rank(trained, tokenizer, states, reference)
    views = [critic.critic_view(tokenizer, t, reference) for t in trajectories[:12]]
    sums, lengths = turn_logprobs(trained, collate(views))
    advantages = critic.turn_advantages(sums, turn_logprobs(model64, collate(views))[0], lengths)
    want = [a for row, n in zip(advantages.tolist(), lengths.tolist()) for a, length in zip(row, n) if length]
    assert len(want) == len(states) and max(abs(a) for a in want) > 0.1
    for state, advantage in zip(states, want):
        assert state["candidates"][0]["advantage"] == pytest.approx(advantage, abs=2e-5)


def test_rank_before_the_first_step_is_0_and_normalize_none_is_the_sum(model64, trajectories, tokenizer):
    states = states_of(trajectories[:6], tokenizer)
    critic.score_reference(model64, tokenizer, states)
    critic.rank(model64, tokenizer, states)
    assert all(abs(state["candidates"][0]["advantage"]) < 1e-4 for state in states)
    trained, found = perturbed(model64), {}
    for normalize in ("turn", "none", "trajectory"):
        critic.rank(trained, tokenizer, states, normalize=normalize)
        found[normalize] = [state["candidates"][0]["advantage"] for state in states]
    lengths = [len(state["candidates"][0]["output_ids"]) for state in states]
    assert found["none"] == pytest.approx([a * n for a, n in zip(found["turn"], lengths)], abs=1e-3)
    assert found["trajectory"] == found["turn"]


def test_rank_against_own_reads_the_reference_in_the_critic_only(model64, trajectories, tokenizer):
    trained, states = perturbed(model64), states_of(trajectories[:4], tokenizer)
    critic.score_reference(model64, tokenizer, states)
    critic.rank(trained, tokenizer, states, rank_against="own")
    for state in states:
        candidate = state["candidates"][0]
        total = 0.0
        for m, sign, reference in ((trained, 1, state["task"]["ground_truth"]), (model64, -1, None)):
            prefix, _ = render(tokenizer, state["messages"], reference)
            total += sign * float(sum(hand_turns(m, [(prefix, candidate["output_ids"])])[0]).detach())
        assert candidate["advantage"] == pytest.approx(total / len(candidate["output_ids"]), abs=2e-5)


def test_judge_turns_equals_rank(model64, trajectories, tokenizer):
    trained, trajectory = perturbed(model64), trajectories[1]
    states = states_of([trajectory], tokenizer)
    critic.score_reference(model64, tokenizer, states)
    critic.rank(trained, tokenizer, states)
    judged = critic.judge_turns((trained, tokenizer), model64, trajectory)
    assert judged == pytest.approx([s["candidates"][0]["advantage"] for s in states], abs=2e-5)


def test_critic_and_actor_read_the_same_turn(trajectories, tokenizer):
    """With c in front or without, as a turn of a trajectory, as a candidate, as half of a pair: the same ids."""
    for trajectory in trajectories:
        messages = trajectory["dialogue_history"]
        for k, t in enumerate(range(1, len(messages), 2), 1):
            ids, turn_ids = actor.turn_view(tokenizer, messages[:t], messages[t])
            turn = [i for i, n in zip(ids, turn_ids) if n == 1]
            assert ids[-len(turn):] == turn and set(turn_ids[:-len(turn)]) == {0}
            for use_reference in (True, False):
                full, numbers = critic.critic_view(tokenizer, trajectory, use_reference)
                assert [i for i, n in zip(full, numbers) if n == k] == turn
            state = {"task": trajectory["task"], "messages": messages[:t], "candidates": [{"output_ids": turn}]}
            (with_c, mask), = critic.candidate_views(tokenizer, state)
            assert with_c[-len(turn):] == turn and mask == [0] * (len(with_c) - len(turn)) + [1] * len(turn)
            assert len(with_c) > len(ids) and with_c[-len(ids) + 1:] == ids[1:]


# ------------------------------------------------------------------ heads that are more than a matrix

def gemma2_that_caps(vocab):
    return gemma2(vocab, final_logit_softcapping=2.0, sliding_window=4096)


def gemma2_as_made(vocab):
    """Logits so small that the cap does nothing to them, yet."""
    from transformers import Gemma2Config, Gemma2ForCausalLM
    return Gemma2ForCausalLM(Gemma2Config(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=256)).eval()


def cohere(vocab):
    from transformers import CohereConfig, CohereForCausalLM
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logit_scale=0.25, initializer_range=0.5, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


def llama_with_bias(vocab, size=1.0):
    made = tiny_llama(vocab, tie=False)
    made.lm_head.bias = torch.nn.Parameter(size * torch.linspace(-2.0, 2.0, vocab))
    return made


@pytest.mark.parametrize("make", [gemma2_that_caps, gemma2_as_made, cohere, llama_with_bias])
def test_heads_with_soft_capping_scale_or_bias(make, capsys):
    prefix.say_once.cache_clear()
    made = make(40)
    rng = random.Random(13)
    dialogues = [dialogue(rng, 40, k) for k in (2, 3)]
    sums, _ = turn_logprobs(made, collate([flat(d) for d in dialogues]))
    assert not head_is_plain(made) and "its own head" in capsys.readouterr().err
    by_hand = [[float(sum(turn).detach()) for turn in hand_turns(made, d)] for d in dialogues]
    for row, want in zip(sums.tolist(), by_hand):
        assert row[:len(want)] == pytest.approx(want, abs=1e-4)
    loss, _ = actor.imitation_loss(made, [flat(d) for d in dialogues])
    assert_same_gradients(gradients(loss, made), gradients(hand_mean_nll(made, dialogues), made), 1e-4)


def test_a_plain_head_is_seen_as_plain(model, grouped, model64):
    assert all(head_is_plain(copy.deepcopy(m)) for m in (model, grouped, model64))


def test_a_bias_that_is_still_zero_is_trained():
    """A bias that starts at 0 changes no logit yet, but its gradient is not 0."""
    made = llama_with_bias(40, size=0.0)
    segments = dialogue(random.Random(14), 40, 2)
    loss, _ = actor.imitation_loss(made, [flat(segments)])
    assert_same_gradients(gradients(loss, made), gradients(hand_mean_nll(made, [segments]), made), 1e-4)


def test_float64_stays_float64_with_its_own_head():
    made = llama_with_bias(40).double()
    sums, _ = turn_logprobs(made, collate([flat(dialogue(random.Random(15), 40, 2))]))
    assert sums.dtype == torch.float64
