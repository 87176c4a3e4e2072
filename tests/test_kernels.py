"""Shared prefixes against full sequences, and the Triton kernel against float64: values, gradients, sampled tokens."""
import copy
import inspect
import math
import random

import pytest
import torch
from conftest import eager, gemma2, perturbed, tiny_llama
from test_actor import biased
from test_losses import assert_same_gradients, as_batch, flat, gradients, hand_turns

import actor
import critic
from env import DialogueEnv, end_of_turn, render
from machinery import sampling
from machinery.files import InputError
from machinery.train import check_context, enable_checkpointing
from kernels import logprob, prefix
from kernels.logprob import collate, lay_out, reference_sums, turn_logprobs
from kernels.prefix import Tree, can_share, head_is_plain


@pytest.fixture
def plain(monkeypatch):
    """A function that computes something the plain way: every sequence in full, the model's own logits everywhere, and
    sampling in rows of their own."""
    def compute(work, *args, **kwargs):
        with monkeypatch.context() as patch:
            for module in (prefix, logprob):
                patch.setattr(module, "can_share", lambda model: False)
                patch.setattr(module, "head_is_plain", lambda model: False)
            return work(*args, **kwargs)
    return compute


@pytest.fixture(params=["outside", "inside"])
def trees(request, monkeypatch):
    """Trees whether or not they are worth it; prefixes in a pass of their own, or in that of their branches."""
    monkeypatch.setattr(logprob, "WORTH", 1e9)
    monkeypatch.setattr(logprob, "SHORT", {"outside": -1, "inside": 128}[request.param])
    return request.param


@pytest.fixture
def said():
    """Nothing has been said so far."""
    prefix.say_once.cache_clear()


def ids(rng, vocab, low, high):
    return [rng.randrange(vocab) for _ in range(rng.randint(low, high))]


def forest(vocab, shape, seed=0, longest=9):
    """Dialogues (segments of context and turn) in groups that share their first context: shape[g] dialogues in group
    g, of 1 to 3 turns each, in shuffled order."""
    rng, result = random.Random(f"{seed} {shape}"), []
    for n in shape:
        context = ids(rng, vocab, 1, longest)
        for _ in range(n):
            rest = [(ids(rng, vocab, 1, 4), ids(rng, vocab, 1, 5)) for _ in range(rng.randint(0, 2))]
            result.append([(context, ids(rng, vocab, 1, 6)), *rest])
    rng.shuffle(result)
    return result


# ------------------------------------------------------------------ the tree

def test_what_the_docstring_says(model):
    """The picture in Tree's docstring: who sees whom, and positions, written out by hand."""
    tree = Tree(model, [(10, 11)], [0, 0])
    inputs = tree.inputs(torch.tensor([[12, 13, 14, 12, 15, 16]]), torch.tensor([[1, 1, 1, 2, 2, 2]]))
    see = (inputs["attention_mask"][0, 0] == 0).int().tolist()
    assert see == [[1, 1, 1, 0, 0, 0, 0, 0],
                   [1, 1, 1, 1, 0, 0, 0, 0],
                   [1, 1, 1, 1, 1, 0, 0, 0],
                   [1, 1, 0, 0, 0, 1, 0, 0],
                   [1, 1, 0, 0, 0, 1, 1, 0],
                   [1, 1, 0, 0, 0, 1, 1, 1]]
    assert inputs["position_ids"].tolist() == [[2, 3, 4, 2, 3, 4]]


def test_padding_is_seen_by_nobody(model):
    tree = Tree(model, [(10,), (10, 11, 12)], [0, 1, 0])
    inputs = tree.inputs(torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([[1, 3, 3], [2, -1, -1]]))
    see = (inputs["attention_mask"][:, 0] == 0).int().tolist()
    assert see[0] == [[1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1]]
    assert see[1][0] == [1, 1, 1, 1, 0, 0]
    assert inputs["position_ids"][0].tolist() == [1, 1, 2] and inputs["position_ids"][1, 0] == 3


@pytest.mark.parametrize("name", ["model64", "grouped64"])
@pytest.mark.parametrize("shape", [(2, 2, 2), (5, 1, 3), (16,), (1, 1, 4)])
def test_turn_sums_against_a_loop_over_tokens(name, shape, trees, request):
    model = request.getfixturevalue(name)
    dialogues = forest(model.config.vocab_size, shape)
    batch = lay_out(model, [flat(d) for d in dialogues])
    most = sum(shape) // len(shape)  # branches of one row
    assert len(batch["input_ids"]) == sum(math.ceil(n / most) for n in shape)
    assert any(batch["prefixes"]) == (trees == "outside")
    sums, lengths = turn_logprobs(model, batch)
    for row, counts, segments in zip(sums, lengths, dialogues):
        want = [float(sum(turn).detach()) for turn in hand_turns(model, segments)]
        assert row[:len(want)].tolist() == pytest.approx(want, abs=1e-10)
        assert counts[:len(want)].tolist() == [len(turn) for _, turn in segments]
        assert not row[len(want):].any() and not counts[len(want):].any()


@pytest.mark.parametrize("name", ["model", "grouped"])
@pytest.mark.parametrize("longest", [2, 40])
def test_values_and_gradients_equal_the_plain_path(name, longest, request, trees, plain):
    model = request.getfixturevalue(name)
    examples = [flat(d) for d in forest(model.config.vocab_size, (2, 7, 1, 3), longest=longest)]
    weights = torch.randn(len(examples), 3, generator=torch.Generator().manual_seed(0))

    def work():
        sums, lengths = turn_logprobs(model, lay_out(model, examples))
        return sums, lengths, gradients((weights * sums).sum() / 10, model)
    (ours, lengths, grads), (theirs, counts, want) = work(), plain(work)
    assert torch.equal(lengths, counts) and (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert_same_gradients(grads, want, 1e-5)


@pytest.mark.parametrize("name", ["model64", "grouped64"])
@pytest.mark.parametrize("loss", ["dpo", "critic"])
def test_losses_and_gradients_equal_the_plain_path(name, loss, request, trees, plain):
    """Ragged pairs with a shared prompt each, among them two pairs of the same prompt."""
    initial = request.getfixturevalue(name)
    trained, dialogues = perturbed(initial), forest(initial.config.vocab_size, (2, 2, 4, 2), seed=5, longest=30)
    dialogues.sort(key=lambda d: d[0][0])
    batch = as_batch(initial, list(zip(dialogues[::2], dialogues[1::2])))
    loss_fn = {"dpo": lambda: actor.preference_loss(trained, batch, 0.3, 0.1),
               "critic": lambda: critic.loss_fn(trained, batch, 0.3, 0.1, "turn")}[loss]

    def work():
        value, metrics = loss_fn()
        return value, metrics, gradients(value, trained)
    (ours, metrics, grads), (theirs, others, want) = work(), plain(work)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-10)
    assert metrics == pytest.approx(others, abs=1e-10)
    assert_same_gradients(grads, want, 1e-6)  # norms compute in float32


def test_padding_stays_within_the_context(trees, plain):
    """Positions that are learned: a row of many branches beside short ones, at the end of the model's context."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2,
                                       initializer_range=0.5)).double().eval()
    rng = random.Random(4)
    examples = [(first + rest, [0] * len(first) + [1] * len(rest)) for first, n in (([3] * 10, 12), ([5], 2), ([7], 1))
                for rest in (ids(rng, 40, 6, 6) for _ in range(n))]
    assert can_share(model)
    ours, theirs = (f(lambda: turn_logprobs(model, lay_out(model, examples))[0]) for f in (lambda w: w(), plain))
    assert torch.allclose(ours, theirs, atol=1e-10)


def test_long_branches_do_not_share_a_row(model, plain):
    """A row's branches together have as many tokens as the prefix, or 512; its prefix is read once all the same."""
    examples = [([7] * 400 + ids(random.Random(k), 40, 200, 200), [0] * 400 + [1] * 200) for k in range(6)]
    batch = lay_out(model, examples)
    assert batch["input_ids"].shape == (3, 2 * 201)
    assert torch.allclose(turn_logprobs(model, batch)[0],
                          plain(lambda: turn_logprobs(model, lay_out(model, examples))[0]), rtol=1e-5)


def test_reference_sums_equal_the_plain_path(model64, trees, plain):
    examples = [flat(d) for d in forest(model64.config.vocab_size, (1, 9, 4, 2, 1, 16), longest=20)]
    examples += [(list(ids), list(turns)) for ids, turns in examples[3:8]]  # equal ones are computed once
    examples.append((examples[0][0], [2 * turn for turn in examples[0][1]]))  # equal in their tokens only
    want = [plain(turn_logprobs, model64, collate([example]))[0][0].tolist() for example in examples]
    for batch_tokens in (1, 60, 16384):
        found = reference_sums(model64, examples, batch_tokens)
        assert [len(row) for row in found] == [len(row) for row in want]
        for row, other in zip(found, want):
            assert row == pytest.approx(other, abs=1e-10)


def test_odd_examples(model64, trees, plain):
    """An agent token at the very start (nothing predicts it), no agent token at all, a prompt of one token."""
    examples = [([5, 6, 7], [1, 1, 0]), ([5, 8], [1, 1]), ([3, 4, 5], [0, 0, 0]), ([3, 4, 9], [0, 0, 1]),
                ([3, 4, 5], [0, 0, 0]), ([3], [0]), ([3, 7], [0, 1]), ([3, 9], [0, 2])]
    ours, lengths = turn_logprobs(model64, lay_out(model64, examples))
    theirs, counts = plain(lambda: turn_logprobs(model64, lay_out(model64, examples)))
    assert torch.equal(lengths, counts) and torch.allclose(ours, theirs, atol=1e-10)
    assert counts.sum(-1).tolist() == [1, 1, 0, 1, 0, 0, 1, 1]


def tokens_read(model, work):
    """How many tokens (padding included) go through the body of the model, and what work returns."""
    count = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: count.append(kwargs["input_ids"].numel()), with_kwargs=True)
    try:
        return work(), sum(count)
    finally:
        hook.remove()


def test_a_prefix_is_read_once(model, tokenizer):
    """16 branches of 3 tokens on a prompt of 50, as candidates, and as samples of 3 tokens."""
    can_share(model), head_is_plain(model)  # these read a little, once
    rng = random.Random(0)
    prompt = ids(rng, len(tokenizer), 50, 50)
    examples = [(prompt + ids(rng, len(tokenizer), 3, 3), [0] * 50 + [1] * 3) for _ in range(16)]
    _, n = tokens_read(model, lambda: reference_sums(model, examples))
    assert n == 49 + 16 * 4
    turns, n = tokens_read(model, lambda: actor.sample(model, tokenizer, [prompt] * 16, range(16), max_tokens=3))
    assert 49 + 16 < n <= 49 + 16 * 3 and len(turns) == 16


def rename_cache(module, name, strict):
    """Let a module's forward know the cache by this name; strict: by no other, whoever calls."""
    inner, other = module.forward, {"cache": "past_key_values", "past_key_values": "cache"}[name]
    signature = inspect.signature(inner)
    native = name if name in signature.parameters else other

    def forward(*args, **given):
        if given.get(other) is not None and strict:
            raise TypeError(f"unexpected argument {other}")
        return inner(*args, **{native if key in (name, other) else key: value for key, value in given.items()})
    forward.__signature__ = signature.replace(parameters=[
        parameter.replace(name=name) if parameter.name == native else parameter
        for parameter in signature.parameters.values()])
    module.forward = forward


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("path", ["tree", "rows"])
def test_either_name_of_the_cache(tokenizer, model, name, path, monkeypatch):
    """Later releases of transformers renamed the argument; whichever one a model knows is the one that it gets."""
    can_share = prefix.can_share if path == "tree" else lambda model: False
    monkeypatch.setattr(prefix, "can_share", can_share)
    prompts = [ids(random.Random(i), len(tokenizer), 20, 30) for i in range(4)]
    expected = actor.sample(model, tokenizer, prompts, range(4), max_tokens=8)
    renamed = copy.deepcopy(model)
    rename_cache(renamed, name, strict=True)
    rename_cache(renamed.model, name, strict=path == "tree")  # in rows, its own head calls it
    assert actor.sample(renamed, tokenizer, prompts, range(4), max_tokens=8) == expected
    assert path == "rows" or can_share(renamed)


def test_nothing_to_share_is_a_plain_batch(model):
    examples = [flat(d) for d in forest(model.config.vocab_size, (1, 1, 1), seed=2)]
    batch = lay_out(model, examples)
    assert {name: t.tolist() for name, t in batch.items()} == {n: t.tolist() for n, t in collate(examples).items()}


# ------------------------------------------------------------------ sampling

@pytest.mark.parametrize("head", ["plain", "biased"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.8, 0.9)])
def test_the_same_tokens_as_the_plain_path(tokenizer, plain, head, kv_heads, temperature, top_p):
    """Ragged prompts, several samples of each in any order; turns and whole rows that end at different steps."""
    model = tiny_llama(len(tokenizer), seed=9, kv_heads=kv_heads, spread=0.5, tie=False)
    end = end_of_turn(tokenizer)
    if head == "biased":
        model = biased(len(tokenizer), {end: 3.0}, kv_heads=kv_heads)
    else:
        model.get_output_embeddings().weight.data[end] *= 3.0
    assert head_is_plain(model) == (head == "plain")
    rng = random.Random(3)
    prompts = [p for n in (1, 2, 17, 40, 5, 5, 9) for p in [ids(rng, len(tokenizer), n, n)] * rng.choice((1, 2, 12))]
    rng.shuffle(prompts)
    how = {"temperature": temperature, "top_p": top_p, "max_tokens": 40}
    ours = actor.sample(model, tokenizer, prompts, range(len(prompts)), **how)
    assert ours == plain(actor.sample, model, tokenizer, prompts, range(len(prompts)), **how)
    lengths = {}
    for prompt, turn in zip(prompts, ours):
        lengths[tuple(prompt)] = max(lengths.get(tuple(prompt), 0), len(turn))
    assert len(set(lengths.values())) > 3  # the rows ended at different steps


class Chatter:
    """A human whose replies are of ragged length, and who leaves some dialogues, at different turns."""

    def reply(self, tasks, dialogues):
        replies = []
        for task, messages in zip(tasks, dialogues):
            rng = random.Random(f"{task.problem_description} {len(messages)}")
            text = " ".join(rng.choice(["tides", "no", "the last loan", "x"]) for _ in range(rng.choice((1, 2, 30))))
            replies.append(None if rng.random() < 0.1 else text)
        return replies


def dialogues_of(model, tokenizer, tasks, copies, top_p=1.0, max_turns=6):
    envs = [DialogueEnv(max_turns) for _ in range(copies) for _ in tasks]
    for env, task in zip(envs, tasks * copies):
        env.reset(task)
    actor.play_out(model, tokenizer, envs, Chatter(), range(len(envs)), top_p=top_p, max_tokens=15)
    return [[m.get("output_ids") for m in env.messages] for env in envs]


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_dialogues_that_remember_say_the_same(tokenizer, tasks, plain, kv_heads, top_p):
    """Over six turns, with a cache that is kept between them, against the history read in full in every turn: the same
    tokens, among them turns that are cut off (at max_tokens, at a control token, at once)."""
    control = tokenizer.convert_tokens_to_ids("<|user|>")
    model = biased(len(tokenizer), {end_of_turn(tokenizer): 4.0, control: 2.0}, kv_heads=kv_heads)

    def work():
        return dialogues_of(model, tokenizer, tasks[:6], 3, top_p)
    (ours, few), (theirs, many) = tokens_read(model, work), plain(tokens_read, model, work)
    assert ours == theirs and few < many
    assert len({len(d) for d in ours}) > 2  # dialogues ended at different turns
    turns = [turn for d in ours for turn in d[1::2]]
    assert [] in turns and {len(turn) for turn in turns} >= {0, 1, 5, 15}


def test_a_human_who_changes_the_past_is_stopped(model, tokenizer, tasks):
    class Editor:
        def reply(self, tasks, dialogues):
            for messages in dialogues:
                messages[0]["content"] = "something else"
            return ["yes"] * len(dialogues)
    env = DialogueEnv(6)
    env.reset(tasks[0])
    with pytest.raises(InputError, match="changed what was said"):
        actor.play_out(model, tokenizer, [env], Editor(), [0], max_tokens=5)


def test_a_history_is_read_once(model, tokenizer, tasks):
    """One dialogue of six turns: the body reads each token but the last of a turn that nobody answers, once."""
    can_share(model), head_is_plain(model)  # these read a little, once
    [dialogue], n = tokens_read(model, lambda: dialogues_of(model, tokenizer, tasks[1:2], 1))
    assert len(dialogue) == 12
    env = DialogueEnv(6)
    env.reset(tasks[1])
    actor.play_out(model, tokenizer, [env], Chatter(), [0], max_tokens=15)
    whole, _ = render(tokenizer, env.messages)
    assert n == len(whole) - 1


# ------------------------------------------------------------------ models that cannot share

def mistral(vocab, window):
    from transformers import MistralConfig, MistralForCausalLM
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=window, initializer_range=0.5,
        max_position_embeddings=256)).eval()


def lfm2(vocab):
    """A hybrid: convolutions, whose cache is a state, beside attention."""
    from transformers import Lfm2Config, Lfm2ForCausalLM
    torch.manual_seed(0)
    return Lfm2ForCausalLM(Lfm2Config(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["conv", "full_attention", "conv"], initializer_range=0.5, pad_token_id=0,
        bos_token_id=None, eos_token_id=None)).eval()


def bloom(vocab):
    from transformers import BloomConfig, BloomForCausalLM
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=vocab, hidden_size=16, n_layer=1, n_head=2)).eval()


def falcon(vocab):
    """Attention that leans on distance (ALiBi): it makes its own use of the mask."""
    from transformers import FalconConfig, FalconForCausalLM
    torch.manual_seed(0)
    return FalconForCausalLM(FalconConfig(vocab_size=vocab, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                          alibi=True, initializer_range=0.5)).eval()


def gpt_neo(vocab):
    """A window that its cache does not tell of."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM
    torch.manual_seed(0)
    return GPTNeoForCausalLM(GPTNeoConfig(vocab_size=vocab, hidden_size=16, num_layers=2, num_heads=2, window_size=4,
                                          attention_types=[[["global", "local"], 1]], initializer_range=0.5)).eval()


def mamba(vocab):
    """No attention: a state, and no cache in its output."""
    from transformers import MambaConfig, MambaForCausalLM
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=vocab, hidden_size=16, num_hidden_layers=2, state_size=4,
                                        initializer_range=0.5)).eval()


def recurrent_gemma(vocab):
    """States that padding goes through: its biases are not zero here."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM
    torch.manual_seed(0)
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, head_dim=8,
        attention_window_size=16))
    return perturbed(model, size=0.3).eval()


def minimax(vocab):
    """A cache of its own that takes no other."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM
    torch.manual_seed(0)
    return MiniMaxForCausalLM(MiniMaxConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, initializer_range=0.5, bos_token_id=None,
        eos_token_id=None, layer_types=["linear_attention", "full_attention"])).eval()


def check_fallback(model, word, capsys):
    examples = [flat(d) for d in forest(model.config.vocab_size, (3, 2), longest=20)]
    for _ in range(2):
        sums, _ = turn_logprobs(model, lay_out(model, examples))
    error = capsys.readouterr().err
    assert not can_share(model) and error.count("cannot share a prefix") == 1 and word in error
    for row, segments in zip(sums.tolist(), forest(model.config.vocab_size, (3, 2), longest=20)):
        want = [float(sum(turn).detach()) for turn in hand_turns(model, segments)]
        assert row[:len(want)] == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("make, word", [
    (lambda: mistral(40, 6), "Sliding"), (lambda: gemma2(40), "Sliding"), (lambda: bloom(40), "positions"),
    (lambda: lfm2(40), "LinearAttention"), (lambda: mamba(40), "LinearAttention"), (lambda: falcon(40), "it fails"),
    (lambda: gpt_neo(40), "local")])
def test_models_that_cannot_share_say_so_once_and_are_computed_in_full(make, word, capsys, said):
    check_fallback(make(), word, capsys)


def test_a_model_that_ignores_the_mask_is_caught_by_the_probe(capsys, said, monkeypatch):
    model = tiny_llama(40)
    forward = model.base_model.forward

    def deaf(*args, position_ids=None, attention_mask=None, **kwargs):
        return forward(*args, position_ids=position_ids, **kwargs)
    monkeypatch.setattr(model.base_model, "forward", deaf)
    check_fallback(model, "probe", capsys)


@pytest.mark.parametrize("make", [lambda vocab: mistral(vocab, 6), lfm2, mamba, falcon, gpt_neo,
                                  recurrent_gemma, minimax])
def test_what_cannot_share_samples_the_plain_way(make, tokenizer, said):
    """Longer than the sliding window, and with a recurrent state, against one row without padding or cache."""
    model = make(len(tokenizer))
    prompt = ids(random.Random(1), len(tokenizer), 12, 12)
    turns = actor.sample(model, tokenizer, [prompt, prompt[:5], prompt], ["a", "b", "c"], max_tokens=8)
    for key, start, turn in zip("abc", (prompt, prompt[:5], prompt), turns):
        draws, sequence = sampling.noise([key], 8)[0], list(start)
        for token, draw in zip(turn, draws):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([sequence])).logits[:, -1]
            assert int(sampling.pick(logits, draw[None])) == token
            sequence.append(token)


def test_beyond_its_original_context_longrope_is_refused(tokenizer):
    """There the numbers of a sequence depend on what else is in the batch."""
    model = tiny_llama(len(tokenizer), rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 8.0,
        "original_max_position_embeddings": 16})
    check_context(model, 16, "a dialogue")
    with pytest.raises(InputError, match="17 tokens are more than the 16"):
        check_context(model, 17, "a dialogue")


def test_a_probe_that_fails_leaves_no_hook(monkeypatch):
    model = tiny_llama(40)
    monkeypatch.setattr(model.base_model, "norm", None)
    with pytest.raises(TypeError):
        head_is_plain(model)
    assert not model.base_model._forward_hooks and not model.get_output_embeddings()._forward_hooks


def test_gradient_checkpointing_is_computed_in_full_and_says_so(model64, trees, capsys, said, plain):
    examples = [flat(d) for d in forest(model64.config.vocab_size, (2, 3))]
    trained = copy.deepcopy(model64).train()
    enable_checkpointing(trained)

    def work(m):
        return gradients(turn_logprobs(m, lay_out(m, examples))[0].sum() / 10, m)
    grads, again = work(trained), work(trained)
    assert capsys.readouterr().err.count("gradient checkpointing") == 1
    assert_same_gradients(grads, plain(work, model64), 1e-6)
    assert_same_gradients(again, grads, 0.0)
    assert can_share(trained.eval())


def test_eager_attention_shares_too(trees, plain):
    model = tiny_llama(40, kv_heads=1, attn_implementation="eager").double()
    examples = [flat(d) for d in forest(40, (4, 2))]
    assert model.config._attn_implementation == "eager" and "prefixes" in lay_out(model, examples)
    ours, theirs = (f(lambda: turn_logprobs(model, lay_out(model, examples))[0]) for f in (lambda w: w(), plain))
    assert torch.allclose(ours, theirs, atol=1e-10)


def test_bf16_shares_within_its_rounding(trees, plain):
    model = tiny_llama(40).bfloat16()
    examples = [flat(d) for d in forest(40, (4, 2))]
    assert can_share(model)
    ours, theirs = (f(lambda: turn_logprobs(model, lay_out(model, examples))[0]) for f in (lambda w: w(), plain))
    exact = turn_logprobs(copy.deepcopy(model).double(), collate(examples))[0]
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


# ------------------------------------------------------------------ the Triton kernel

@pytest.fixture
def fused():
    """The fused kernel, on the CPU under Triton's interpreter with small blocks (as it is where there is a GPU)."""
    kernel = pytest.importorskip("kernels.triton_logprob", reason="needs Triton (pip install triton)")
    if not torch.cuda.is_available():
        kernel.BLOCKS.update(BN=16, BV=32, BD=16)
        kernel.SLICE = 96
    return kernel.fused_logprobs


def head_inputs(n, d, v, dtype, seed=0):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(rows, d, generator=generator).to(device, dtype) for rows in (n, v))
    targets = torch.randint(v, (n,), generator=generator)
    targets[-1] = v - 1  # the last token of the vocabulary, in the last tile
    return hidden, weight, targets.to(device), torch.randn(n, generator=generator).to(device)


def forward_and_gradients(logprobs, hidden, weight, targets, upstream):
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    out = logprobs(hidden, weight, targets)
    return out.detach(), *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, d, v", [
    (16, 8, 32), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in (
        (1, 16, 33), (37, 50, 170), (33, 17, 97), (5, 64, 300)))])
def test_triton_error_is_no_worse_than_eager(fused, n, d, v, dtype):
    """Values and both gradients against float64, on shapes that fill no block: at most 1.5 times eager's own error, in
    the mean over several seeds (more where there is one row: on 96 the ratio is 0.9 to 1.3, on one anything)."""
    errors = torch.zeros(2, 3)  # [ours, eager's] x [log-probs, gradient of hidden, gradient of weight]
    for seed in range(96 if n == 1 else 2):
        inputs = head_inputs(n, d, v, dtype, seed)
        hidden, weight, targets, upstream = inputs
        exact = forward_and_gradients(eager, hidden.double(), weight.double(), targets, upstream.double())
        for total, logprobs in zip(errors, (fused, eager)):
            found = forward_and_gradients(logprobs, *inputs)
            total += torch.tensor([float((value.double() - want).norm()) for value, want in zip(found, exact)])
    ours, eagers = errors
    assert bool((ours <= 1.5 * eagers).all()), errors.tolist()


def test_triton_far_apart_logits_and_no_rows(fused):
    """Logits of several hundred overflow nothing; no rows give no log-probs and zero gradients."""
    hidden, weight, targets, upstream = head_inputs(9, 24, 70, torch.float32)
    exact = forward_and_gradients(eager, 50 * hidden.double(), weight.double(), targets, upstream.double())
    found = forward_and_gradients(fused, 50 * hidden, weight, targets, upstream)
    assert exact[0].min() < -300
    for ours, want in zip(found, exact):
        assert torch.allclose(ours.double(), want, rtol=1e-5, atol=1e-4)
    out, grad_hidden, grad_weight = forward_and_gradients(fused, hidden[:0], weight, targets[:0], upstream[:0])
    assert out.shape == (0,) and grad_hidden.shape == (0, 24) and not grad_weight.any()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_triton_with_a_frozen_input(fused, frozen):
    hidden, weight, targets, upstream = head_inputs(9, 24, 70, torch.float32)
    _, grad_hidden, grad_weight = forward_and_gradients(eager, hidden, weight, targets, upstream)
    (hidden if frozen == "weight" else weight).requires_grad_()
    (fused(hidden, weight, targets) * upstream).sum().backward()
    free, want = (hidden, grad_hidden) if frozen == "weight" else (weight, grad_weight)
    assert torch.allclose(free.grad, want, atol=1e-5)


def test_triton_reads_tensors_that_are_not_contiguous(fused):
    hidden, weight, targets, upstream = head_inputs(9, 24, 70, torch.float32)
    want = forward_and_gradients(fused, hidden, weight, targets, upstream)
    turned = forward_and_gradients(lambda h, w, y: fused(h.T.contiguous().T, w.T.contiguous().T, y), hidden, weight,
                                   targets, upstream)
    assert all(torch.equal(a, b) for a, b in zip(want, turned))


@pytest.mark.slow
def test_a_whole_model_through_the_triton_kernel(fused, model, monkeypatch):
    """turn_logprobs with the kernel in the place of plain PyTorch: the same sums and gradients."""
    examples = [flat(d) for d in forest(model.config.vocab_size, (2, 1))]

    def work():
        sums, _ = turn_logprobs(model, lay_out(model, examples))
        return sums, gradients(sums.sum() / 10, model)
    sums, grads = work()
    calls = []
    monkeypatch.setattr("kernels.triton_logprob.fused_logprobs", lambda *a: calls.append(1) or fused(*a))
    monkeypatch.setattr(logprob, "_use_triton", lambda *tensors: True)
    others, want = work()
    assert calls and torch.allclose(sums, others, atol=1e-4)
    assert_same_gradients(grads, want, 1e-5)
