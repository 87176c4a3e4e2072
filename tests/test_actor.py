"""Sampling, playing, pairs, and the measures of agreement."""
import copy
import itertools
import json
import math
import random
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import tiny_llama

import actor
import critic
from env import ANSWER_MARKER, DialogueEnv, Task, end_of_turn, render
from kernels.logprob import collate, turn_logprobs
from machinery import sampling
from simulator import ScriptedHuman
from studies import credit
from worlds import backend as world


def biased(vocab, bias, **extra):
    """A tiny model whose head adds a bias to some tokens, so that turns end within a few tokens."""
    made = tiny_llama(vocab, tie=False, **extra)
    made.lm_head.bias = torch.nn.Parameter(torch.zeros(vocab))
    with torch.no_grad():
        for token, value in bias.items():
            made.lm_head.bias[token] = value
    return made


@pytest.fixture(scope="module")
def talker(tokenizer):
    """A policy that often ends its turn and sometimes writes a control token."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|user|>", "<|agent|>", "<|pad|>")}
    return biased(len(tokenizer), {end_of_turn(tokenizer): 5.0, ids["<|user|>"]: 2.5, ids["<|agent|>"]: 2.5,
                                   ids["<|pad|>"]: 2.5}, kv_heads=1)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    texts = ["a", "invoices and tides", "what?" * 9, "x" * 30, "loans", "an even longer request " * 4, "", "b"]
    return [render(tokenizer, [{"role": "user", "content": text}])[0] for text in texts]


# ------------------------------------------------------------------ picking a token

def kept_by_top_p(probs, top_p):
    """The smallest set of most likely tokens whose probability reaches top_p."""
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    for n in range(1, len(order) + 1):
        if math.fsum(probs[i] for i in order[:n]) >= top_p:
            return set(order[:n])
    return set(order)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.05])
def test_pick_follows_the_distribution(temperature, top_p):
    """With evenly spaced draws the shares are exact, up to one draw for each token."""
    logits = [0.3, -1.0, 2.0, 2.0, -4.0, 0.9, 1.1]
    probs = [math.exp(x / temperature) for x in logits]
    probs = [p / math.fsum(probs) for p in probs]
    kept = kept_by_top_p(probs, top_p)
    mass = math.fsum(probs[i] for i in kept)
    n = 20000
    tokens = sampling.pick(torch.tensor([logits]).expand(n, -1), (torch.arange(n) + 0.5) / n, temperature, top_p)
    counts = torch.bincount(tokens, minlength=len(logits)).tolist()
    for i, count in enumerate(counts):
        assert abs(count - (n * probs[i] / mass if i in kept else 0.0)) <= 2.0, (i, count)


def test_top_p_against_the_definition():
    """Every token that evenly spaced draws can reach, and no other, for random distributions."""
    rng, draws = random.Random(1), (torch.arange(4000) + 0.5) / 4000
    for _ in range(30):
        probs = [rng.random() ** 3 + 0.002 for _ in range(8)]
        probs = [p / math.fsum(probs) for p in probs]
        top_p = rng.random() * 0.98 + 0.01
        logits = torch.tensor([probs], dtype=torch.float64).log().expand(4000, -1)
        reached = set(sampling.pick(logits, draws, 1.0, top_p).tolist())
        assert reached == kept_by_top_p(probs, top_p)


def test_rows_are_picked_apart():
    logits = torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0], [0.0, 0.0, 50.0]])
    assert sampling.pick(logits, torch.tensor([0.1, 0.9, 0.5])).tolist() == [1, 0, 2]
    assert sampling.pick(logits, torch.tensor([0.1, 0.9, 0.5]), top_p=0.3).tolist() == [1, 0, 2]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_draw_of_zero_is_no_impossible_token(top_p):
    """The first token that has a probability, although the cumulative sum before it is 0 as well."""
    logits = torch.tensor([[-float("inf"), -9.0, 1.0, 4.0]])
    assert sampling.pick(logits, torch.zeros(1), 1.0, top_p).item() == (1 if top_p == 1.0 else 3)


def test_noise_belongs_to_its_key():
    keys = [(0, "rollout", 1, 2), (0, "rollout", 1, 3), "play"]
    rows = sampling.noise(keys, 5)
    assert torch.equal(sampling.noise(keys[::-1], 5).flip(0), rows)
    assert torch.equal(sampling.noise(keys[1:2], 5), rows[1:2])
    assert torch.equal(sampling.noise(keys, 3), rows[:, :3]) and len({tuple(row) for row in rows.tolist()}) == 3
    many = sampling.noise([(1, k) for k in range(200)], 50)
    assert 0 <= many.min() and many.max() < 1 and abs(many.mean() - 0.5) < 0.02


@pytest.mark.parametrize("top_p, want", [(1.0, 3), (0.6, 0), (0.7, 1)])
def test_the_largest_draw_is_a_token_too(monkeypatch, top_p, want):
    """Of probabilities .626, .230, .140, .004 the largest number below 1 in float64 gives the last that is kept."""
    class Largest:
        def random(self, n):
            return np.full(n, np.nextafter(1.0, 0.0))
    monkeypatch.setattr(sampling.np.random, "default_rng", lambda seed: Largest())
    logits = torch.tensor([[2.0, 1.0, 0.5, -3.0]])
    assert int(sampling.pick(logits, sampling.noise(["key"], 1)[:, 0], 1.0, top_p)) == want


# ------------------------------------------------------------------ sampling turns

def naive_turn(model, tokenizer, prompt, key, temperature, top_p, max_tokens):
    """One row, no padding, no cache, the distribution inverted by a loop in float64."""
    eot, ids, turn = end_of_turn(tokenizer), list(prompt), []
    draws = sampling.noise([key], max_tokens)[0].tolist()
    for draw in draws:
        with torch.no_grad():
            row = model(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature
        probs = (row - row.max()).exp()
        probs = (probs / probs.sum()).tolist()
        kept = kept_by_top_p(probs, top_p) if top_p < 1 else set(range(len(probs)))
        left = draw * math.fsum(probs[i] for i in kept)
        for token in sorted(kept):
            left -= probs[token]
            if left < 0:
                break
        if token in tokenizer.all_special_ids and token != eot:
            break
        turn.append(token)
        ids.append(token)
        if token == eot:
            break
    return turn


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9)])
def test_sample_against_one_row_without_padding_or_cache(talker, tokenizer, prompts, temperature, top_p):
    keys = [(7, i) for i in range(len(prompts))]
    turns = actor.sample(talker, tokenizer, prompts, keys, temperature=temperature, top_p=top_p, max_tokens=9)
    assert turns == [naive_turn(talker, tokenizer, p, k, temperature, top_p, 9) for p, k in zip(prompts, keys)]
    assert len({len(turn) for turn in turns}) > 2


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("gap", [False, True])
def test_ids_that_are_no_token_are_never_sampled(tokenizer, prompts, top_p, gap, monkeypatch):
    """A vocabulary padded by 24 rows, or with gaps, whose logits are the largest of all: the same turns as if they were
    not there."""
    extra = 24
    padded = tiny_llama(len(tokenizer) + extra, seed=2, tie=False)
    plain = copy.deepcopy(padded)
    unknown = list(range(len(tokenizer), len(tokenizer) + extra)) + [40, 41] * gap
    if gap:
        known = frozenset(tokenizer.get_vocab().values()) - {40, 41}
        monkeypatch.setattr(sampling, "known_ids", lambda tokenizer: known)
    with torch.no_grad():
        plain.lm_head.weight[unknown] = 0
        padded.lm_head.weight[unknown] *= 30
    keys = list(range(len(prompts)))

    def turns(model):
        return actor.sample(model, tokenizer, prompts, keys, top_p=top_p, max_tokens=12)
    found = turns(padded)
    assert found == turns(plain) and not {token for turn in found for token in turn} & set(unknown)
    logits = padded(input_ids=torch.tensor([prompts[0]])).logits[0, -1].float()
    assert logits.softmax(-1)[unknown].sum() > 0.99  # what they would be without it


def test_order_batch_size_and_company_do_not_matter(talker, tokenizer, prompts):
    keys = [("k", i) for i in range(len(prompts))]
    together = actor.sample(talker, tokenizer, prompts, keys, max_tokens=12)
    assert actor.sample(talker, tokenizer, prompts[::-1], keys[::-1], max_tokens=12)[::-1] == together
    alone = [actor.sample(talker, tokenizer, [p], [k], max_tokens=12)[0] for p, k in zip(prompts, keys)]
    assert alone == together
    some = [5, 0, 3]
    assert actor.sample(talker, tokenizer, [prompts[i] for i in some], [keys[i] for i in some],
                        max_tokens=12) == [together[i] for i in some]


def test_equal_prompts_are_read_once(talker, tokenizer, prompts):
    """The same turns as for each prompt on its own, and the first pass holds each different prompt once; then rows of
    at most two branches, because three and two and one are two in the mean."""
    many, seen = [prompts[i] for i in (0, 1, 0, 0, 1, 2)], []
    keys = [("copy", i) for i in range(6)]
    hook = talker.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    try:
        together = actor.sample(talker, tokenizer, many, keys, max_tokens=10)
    finally:
        hook.remove()
    assert seen[0] == (3, max(len(prompts[i]) for i in (0, 1, 2)) - 1) and seen[1] == (4, 2)
    assert all(rows <= 4 and tokens <= 2 for rows, tokens in seen[1:])
    assert together == [actor.sample(talker, tokenizer, [p], [k], max_tokens=10)[0] for p, k in zip(many, keys)]
    assert together[0] != together[2]


def test_how_turns_end(talker, tokenizer, prompts):
    """With the end token, or cut off: at max_tokens, or before a control token, which is not in the turn."""
    eot, many = end_of_turn(tokenizer), [prompts[i % 8] for i in range(64)]
    turns = actor.sample(talker, tokenizer, many, list(range(64)), max_tokens=6)
    control = set(tokenizer.all_special_ids) - {eot}
    ended = [turn for turn in turns if turn and turn[-1] == eot]
    short = [turn for turn in turns if len(turn) < 6 and eot not in turn]
    full = [turn for turn in turns if len(turn) == 6 and eot not in turn]
    assert ended and short and full and len(ended) + len(short) + len(full) == 64
    assert not any(control & set(turn) for turn in turns) and all(turn.count(eot) <= 1 for turn in turns)


def test_every_control_token_ends_a_turn(tokenizer, prompts):
    """Also those that the tokenizer marks as special without naming them (as Llama 3's headers)."""
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    core.add_special_tokens([AddedToken(name, special=True) for name in ("<E>", "<U>", "<A>", "<H>")])
    small = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<E>")
    small.chat_template = ("{% for m in messages %}{% if m.role == 'assistant' %}<A>{{ m.content }}<E>{% else %}<U>"
                           "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}")
    header = small.convert_tokens_to_ids("<H>")
    model = biased(len(small), {header: 60.0})
    prompt, _ = render(small, [{"role": "user", "content": "a"}])
    assert actor.sample(model, small, [prompt], ["k"], max_tokens=4) == [[]]


def test_greedy_equals_generate(tokenizer, prompts):
    """At a tiny temperature the turns are those of transformers' own greedy decoding."""
    eot = end_of_turn(tokenizer)
    bias = {i: -100.0 for i in tokenizer.all_special_ids} | {eot: 3.0}
    for seed in (0, 1):
        model = biased(len(tokenizer), bias, seed=seed)
        turns = actor.sample(model, tokenizer, prompts, list(range(len(prompts))), temperature=1e-4, max_tokens=8)
        for prompt, turn in zip(prompts, turns):
            out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                 do_sample=False, max_new_tokens=8, eos_token_id=eot, pad_token_id=eot)
            assert turn == out[0, len(prompt):].tolist()


def test_sampled_frequencies_follow_the_models_probabilities(talker, tokenizer, prompts):
    """First tokens of 4000 turns against the model's softmax: each within five standard errors."""
    n = 4000
    turns = actor.sample(talker, tokenizer, [prompts[1]] * n, [("freq", i) for i in range(n)], max_tokens=1)
    with torch.no_grad():
        probs = talker(input_ids=torch.tensor([prompts[1]])).logits[0, -1].softmax(-1).tolist()
    counts = [0] * len(probs)
    for turn in turns:
        if turn:
            counts[turn[0]] += 1
    control = set(tokenizer.all_special_ids) - {end_of_turn(tokenizer)}
    for token, p in enumerate(probs):
        if token not in control:
            assert abs(counts[token] - n * p) < 5 * math.sqrt(n * p) + 1


# ------------------------------------------------------------------ playing

def play(model, tokenizer, tasks, keys, max_turns=3):
    envs = [DialogueEnv(max_turns) for _ in tasks]
    for env, task in zip(envs, tasks):
        env.reset(task)
    actor.play_out(model, tokenizer, envs, ScriptedHuman(world.respond), keys, max_tokens=7)
    return envs


def test_play_out_keeps_what_was_sampled(talker, tokenizer, tasks):
    envs = play(talker, tokenizer, tasks, list(range(len(tasks))))
    for env in envs:
        assert env.answer is not None and env.turns <= 3 and len(env.messages) == 2 * env.turns
        json.dumps(env.messages)
        for t, message in enumerate(env.messages):
            if t % 2 == 0:
                assert set(message) == {"role", "content"} and message["role"] == "user"
                continue
            prompt, _ = render(tokenizer, env.messages[:t])
            assert message["input"] == tokenizer.decode(prompt)
            assert message["output"] == tokenizer.decode(message["output_ids"])
            assert message["content"] == message["output"].removesuffix("<|end|>") and len(message["output_ids"]) <= 7
    assert {env.turns for env in envs} == {3}


def test_the_log_prob_path_sees_the_sampled_tokens(talker, tokenizer, tasks):
    """The tokens of turn k in a rendered dialogue are output_ids, and their log-prob is that of each draw."""
    for env in play(talker, tokenizer, tasks[:4], list(range(4))):
        ids, turn_ids = render(tokenizer, env.messages)
        sums, lengths = turn_logprobs(talker, collate([(ids, turn_ids)]))
        for k in range(env.turns):
            sampled = env.messages[2 * k + 1]["output_ids"]
            assert [i for i, n in zip(ids, turn_ids) if n == k + 1] == sampled
            prompt, _ = render(tokenizer, env.messages[:2 * k + 1])
            total = 0.0
            for step, token in enumerate(sampled):
                with torch.no_grad():
                    row = talker(input_ids=torch.tensor([prompt + sampled[:step]])).logits[0, -1]
                total += float(row.double().log_softmax(-1)[token])
            if k < sums.shape[1]:
                assert float(sums[0, k].detach()) == pytest.approx(total, abs=1e-3) and lengths[0, k] == len(sampled)
            else:
                assert sampled == []


def test_play_out_does_not_depend_on_order_or_company(talker, tokenizer, tasks):
    keys = [("play", i) for i in range(6)]
    together = [env.messages for env in play(talker, tokenizer, tasks[:6], keys)]
    backwards = [env.messages for env in play(talker, tokenizer, tasks[5::-1], keys[::-1])]
    alone = [play(talker, tokenizer, [task], [key])[0].messages for task, key in zip(tasks, keys)]
    assert backwards[::-1] == together == alone[:6]


def test_play_tasks_gives_trajectories_in_colbench_format(talker, tokenizer, tasks):
    played = actor.play_tasks(talker, tokenizer, tasks[:3], ScriptedHuman(world.respond), [0, 1, 2],
                              actor.Rollout(max_turns=2, max_tokens=5))
    for trajectory, task in zip(played, tasks):
        assert set(trajectory) == {"task", "dialogue_history", "answer", "reward"}
        assert trajectory["task"] == task.to_record() and trajectory["reward"] == 0.0
        assert len(trajectory["dialogue_history"]) == 4 and isinstance(trajectory["answer"], str)
    bare = actor.bare(played[0]["dialogue_history"])
    assert set(bare[1]) == {"role", "content", "output_ids"} and bare[0] == played[0]["dialogue_history"][0]
    assert render(tokenizer, bare) == render(tokenizer, played[0]["dialogue_history"])


def test_candidates_are_different_and_not_empty(talker, tokenizer, tasks):
    def states():
        return [{"task": t.to_record(), "messages": DialogueEnv(4).reset(t)} for t in tasks[:3]]
    first, second = states(), states()[::-1]
    keys = [(0, "samples", i) for i in range(3)]
    actor.sample_candidates(talker, tokenizer, first, keys, 12, 3)
    actor.sample_candidates(talker, tokenizer, second, keys[::-1], 12, 3)
    assert first == second[::-1]
    for state in first:
        turns = [tuple(c["output_ids"]) for c in state["candidates"]]
        assert 1 < len(turns) == len(set(turns)) <= 12 and () not in turns
        for c in state["candidates"]:
            assert c["content"] == tokenizer.decode(c["output_ids"]).removesuffix("<|end|>")


def test_play_on_values_answers_by_their_reward(talker, tokenizer, tasks):
    """A right answer is worth 1 and a wrong one 0, however often it is played on."""
    task = tasks[0]
    right, wrong = f"{ANSWER_MARKER}\n{task.ground_truth}", f"{ANSWER_MARKER}\ndef f(): pass"
    state = {"task": task.to_record(), "messages": DialogueEnv(4).reset(task), "candidates": []}
    for text in (right, wrong, "a question?"):
        ids = tokenizer(text, add_special_tokens=False).input_ids + [end_of_turn(tokenizer)]
        state["candidates"].append({"content": text, "output_ids": ids})
    messages = list(state["messages"])
    credit.play_on(talker, tokenizer, [state], ScriptedHuman(world.respond), 3,
                  actor.Rollout(max_turns=3, max_tokens=4), seed=0)
    assert [c["returns"] for c in state["candidates"]] == [[1.0] * 3, [0.0] * 3, [0.0] * 3]
    assert state["messages"] == messages


# ------------------------------------------------------------------ pairs

def turn_pairs(advantages, n, rng):
    """Every candidate sampled once."""
    return actor.turn_pairs(advantages, [1] * len(advantages), n, rng)


def test_turn_pairs_are_different_strict_and_from_the_halves():
    rng = random.Random(0)
    for trial in range(300):
        advantages = [rng.choice([0.0, 0.5, 1.0, rng.random()]) for _ in range(rng.randint(1, 17))]
        n, half = rng.randint(1, 6), len(advantages) // 2
        pairs = turn_pairs(advantages, n, random.Random(trial))
        assert len(pairs) == len(set(pairs)) <= n
        for a, b in pairs:
            assert advantages[a] > advantages[b]
            assert sum(x > advantages[a] for x in advantages) < half
            assert sum(x < advantages[b] for x in advantages) < half
        if len(set(advantages)) == len(advantages):
            assert len(pairs) == min(n, half * half)
        assert turn_pairs(advantages, n, random.Random(trial)) == pairs


def test_turn_pairs_on_hand_made_advantages():
    rng = random.Random(0)
    assert set(turn_pairs([0.1, 0.9, -0.3, 0.4], 9, rng)) == {(1, 0), (1, 2), (3, 0), (3, 2)}
    assert set(turn_pairs([3.0, 2.0, 1.0], 9, rng)) == {(0, 2)}
    assert turn_pairs([0.5] * 16, 4, rng) == [] and turn_pairs([1.0], 4, rng) == []
    assert turn_pairs([], 4, rng) == []
    assert set(turn_pairs([1.0, 1.0, 1.0, 0.0], 9, rng)) == {(0, 3), (1, 3)}
    assert {pair for seed in range(60) for pair in turn_pairs([4, 3, 2, 1], 1, random.Random(seed))} == {
        (0, 2), (0, 3), (1, 2), (1, 3)}


def test_turn_pairs_halve_the_samples():
    rng = random.Random(0)
    # sampled 5, 1, 1, 1 times: the better half of the eight samples is the first candidate alone
    assert set(actor.turn_pairs([0.9, 0.5, 0.4, 0.3], [5, 1, 1, 1], 9, rng)) == {(0, 1), (0, 2), (0, 3)}
    assert set(actor.turn_pairs([0.9, 0.5, 0.4, 0.3], [1, 1, 1, 5], 9, rng)) == {(0, 3), (1, 3), (2, 3)}


def trajectory(problem, reward, name, reference="def f(): pass"):
    return {"task": {"problem_description": problem, "ground_truth": reference}, "reward": reward, "name": name}


def names_of(pairs):
    return {(a["name"], b["name"]) for a, b in pairs}


def test_trajectory_pairs_are_success_against_failure_on_one_task():
    played = [trajectory("p", 1.0, "p1"), trajectory("q", 0.0, "q1"), trajectory("p", 0.9, "p2"),
              trajectory("p", 0.0, "p3"), trajectory("q", 1.0, "q2"), trajectory("r", 1.0, "r1"),
              trajectory("p", 1.0, "p4"), trajectory("s", 0.4, "s1"), trajectory("s", 0.2, "s2")]
    pairs = critic.trajectory_pairs(played, 9, 0.0, random.Random(0))
    assert len(pairs) == 5
    assert names_of(pairs) == {("p1", "p2"), ("p1", "p3"), ("p4", "p2"), ("p4", "p3"), ("q2", "q1")}
    few = critic.trajectory_pairs(played, 2, 0.0, random.Random(0))
    assert len(few) == 3 and names_of(few) < names_of(pairs)
    assert critic.trajectory_pairs(played, 2, 0.0, random.Random(0)) == few
    assert critic.trajectory_pairs([], 2, 0.0, random.Random(0)) == []


def test_trajectory_pairs_with_a_margin():
    played = [trajectory("p", reward, str(reward)) for reward in (0.9, 0.75, 0.5, 0.45)]
    pairs = critic.trajectory_pairs(played, 99, 0.2, random.Random(0))
    assert names_of(pairs) == {("0.9", "0.5"), ("0.9", "0.45"), ("0.75", "0.5"), ("0.75", "0.45")}


def test_a_margin_of_a_tenth_is_met_by_a_tenth():
    """0.3 - 0.2 is a little less than 0.1 in floating point, and a difference of one test in ten all the same."""
    pairs = critic.trajectory_pairs([trajectory("p", 0.3, "a"), trajectory("p", 0.2, "b")], 9, 0.1, random.Random(0))
    assert names_of(pairs) == {("a", "b")}


def test_one_request_with_two_hidden_solutions_is_two_tasks():
    """Requests without a hint often read alike in the small world; dialogues about other solutions are no pair."""
    played = [trajectory("tidy the tides", 1.0, "a", "def f(): return 1"),
              trajectory("tidy the tides", 0.0, "b", "def f(): return 2")]
    assert critic.trajectory_pairs(played, 9, 0.0, random.Random(0)) == []


# ------------------------------------------------------------------ agreement

def brute_auc(good, bad):
    wins = [1.0 if g > b else 0.5 if g == b else 0.0 for g in good for b in bad]
    return sum(wins) / len(wins)


def test_area_under_curve():
    assert credit.area_under_curve([2.0, 3.0], [1.0]) == 1.0 and credit.area_under_curve([0.0], [1.0]) == 0.0
    assert credit.area_under_curve([1.0], [1.0]) == 0.5 and credit.area_under_curve([1.0, 3.0], [2.0]) == 0.5
    rng = random.Random(0)
    good, bad = ([rng.randint(0, 5) for _ in range(n)] for n in (17, 23))
    assert credit.area_under_curve(good, bad) == pytest.approx(brute_auc(good, bad))


def test_agreement_with_labels_is_within_states_and_kinds():
    rng = random.Random(1)
    states = [{"candidates": [{"advantage": rng.choice([0, 1, 2]), "kind": rng.choice(["question", "answer", "other"]),
                               "good": rng.random() < 0.4} for _ in range(rng.randint(0, 12))]} for _ in range(40)]
    for kind, found in credit.agreement_with_labels(states).items():
        areas = []
        for state in states:
            by_pair = []
            for one, other in itertools.product(("question", "answer"), repeat=2):
                good = [c["advantage"] for c in state["candidates"] if c["kind"] == one and c["good"]]
                bad = [c["advantage"] for c in state["candidates"] if c["kind"] == other and not c["good"]]
                if good and bad and kind == (one if one == other else "across"):
                    by_pair.append(brute_auc(good, bad))
            if by_pair:
                areas.append(sum(by_pair) / len(by_pair))
        assert found["auc"] == pytest.approx(sum(areas) / len(areas)) and found["states"] == len(areas) > 5
    empty = credit.agreement_with_labels([{"candidates": []}])
    assert empty == dict.fromkeys(("question", "answer", "across"), {"auc": None, "states": 0})
    # a large offset between states does not count: pairs are compared within a state only
    apart = [{"candidates": [{"advantage": base + x, "kind": "answer", "good": bool(x)} for x in (0, 1)]}
             for base in (0, 100)]
    assert credit.agreement_with_labels(apart)["answer"] == {"auc": 1.0, "states": 2}


def test_agreement_with_monte_carlo_on_hand_made_returns():
    def state(*candidates):
        return {"candidates": [{"advantage": a, "returns": returns} for a, returns in candidates]}
    always, never, half = [1.0] * 20, [0.0] * 20, [1.0, 0.0] * 10
    agreement = credit.agreement_with_monte_carlo
    assert agreement([state((0.5, always), (0.1, never))]) == {"accuracy": 1.0, "pairs": 1}
    assert agreement([state((0.1, always), (0.5, never))]) == {"accuracy": 0.0, "pairs": 1}
    assert agreement([state((0.5, always), (0.5, never))]) == {"accuracy": 0.5, "pairs": 1}
    assert agreement([state((0.5, half), (0.1, half))]) == {"accuracy": None, "pairs": 0}
    assert agreement([state((0.5, always)), state((0.1, never))]) == {"accuracy": None, "pairs": 0}
    assert agreement([state((3, always), (2, half), (1, never))]) == {"accuracy": 1.0, "pairs": 3}
    assert agreement([state((3, always), (1, half), (2, never))]) == {"accuracy": pytest.approx(2 / 3), "pairs": 3}
    # 3 of 4 against 1 of 4: the difference, 0.5, is less than two standard errors, about 0.66
    assert agreement([state((1, [1, 1, 1, 0]), (0, [1, 0, 0, 0]))]) == {"accuracy": None, "pairs": 0}


def test_all_pairs_of_a_state_are_compared_once():
    rng = random.Random(3)
    candidates = [{"advantage": rng.random(), "returns": [float(rng.random() < p) for _ in range(30)]}
                  for p in (0.0, 0.2, 0.5, 0.8, 1.0)]
    pairs = right = 0
    for a, b in combinations(candidates, 2):
        means = [sum(c["returns"]) / 30 for c in (a, b)]
        smooth = [(sum(c["returns"]) + 1) / 32 for c in (a, b)]
        error = math.sqrt(sum(m * (1 - m) / 30 for m in smooth))
        if abs(means[0] - means[1]) > 2 * error:
            pairs += 1
            right += (a["advantage"] > b["advantage"]) == (means[0] > means[1])
    assert credit.agreement_with_monte_carlo([{"candidates": candidates}]) == {
        "accuracy": pytest.approx(right / pairs), "pairs": pairs}


def test_turn_view_with_and_without_output_ids(tokenizer):
    prompt = [{"role": "user", "content": "a"}]
    ids, turns = actor.turn_view(tokenizer, prompt, {"content": "bc"})
    whole, turn_ids = render(tokenizer, prompt + [{"role": "assistant", "content": "bc"}])
    assert (ids, turns) == (whole, turn_ids) and turns.count(1) == 3
    ids, turns = actor.turn_view(tokenizer, prompt, {"content": "bc", "output_ids": [300, 301]})
    assert ids == whole[:-3] + [300, 301] and turns == [0] * (len(whole) - 3) + [1, 1]


def test_tasks_from_records_survive(tasks):
    assert [Task.from_record(json.loads(json.dumps(task.to_record()))) for task in tasks] == tasks


def test_nobody_is_asked_before_the_agent_has_spoken():
    """The first turn is the agent's: a human's `reply` is not called with empty lists."""
    class Human:
        def reply(self, tasks, dialogues):
            raise AssertionError((tasks, dialogues))
    env = DialogueEnv()
    env.reset(Task("p", "c"))
    actor.ask_human(Human(), [env])
    assert len(env.messages) == 1
