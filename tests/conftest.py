"""Fixtures: tiny random models in float32 and float64, the world's tokenizer, and dialogues written by hand."""
import copy

import pytest
import torch

from env import end_of_turn
from worlds import backend as world

torch.set_num_threads(1)


def tiny_llama(vocab_size, seed=0, layers=2, kv_heads=2, tie=True, spread=0.3, **extra):
    """A random LlamaForCausalLM of width 16 whose logits are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
                         num_attention_heads=2, num_key_value_heads=kv_heads, max_position_embeddings=1024,
                         tie_word_embeddings=tie, initializer_range=spread, bos_token_id=None, eos_token_id=None,
                         **extra)
    return LlamaForCausalLM(config).eval()


def perturbed(model, seed=1, size=0.1):
    """A copy of a model with other weights: what the model might be after some steps."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (size * noise).to(parameter.dtype)
    return changed


@pytest.fixture(scope="session")
def tokenizer():
    return world.make_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    """float32, tied head, as many key heads as query heads."""
    return tiny_llama(len(tokenizer))


@pytest.fixture(scope="session")
def grouped(tokenizer):
    """float32, untied head, grouped-query attention."""
    return tiny_llama(len(tokenizer), seed=3, layers=1, kv_heads=1, tie=False)


@pytest.fixture(scope="session")
def model64(model):
    return copy.deepcopy(model).double()


@pytest.fixture(scope="session")
def grouped64(grouped):
    return copy.deepcopy(grouped).double()


@pytest.fixture(scope="session")
def tasks():
    return world.make_tasks(12, seed=5)


@pytest.fixture(scope="session")
def trajectories(tokenizer):
    """Dialogues of 1 to 4 turns with rewards, some of their turns with output_ids, one of them cut off."""
    result = []
    for i, (messages, _) in enumerate(world.documents(24, seed=7)):
        messages = [dict(message) for message in messages]
        topic = messages[0]["content"].split("def tidy_")[1].split("(")[0]
        values = {step: i % 4 for step in world.TOPIC_STEPS[topic]}
        if i % 3 == 0:
            for message in messages[1::2]:
                ids = tokenizer(message["content"], add_special_tokens=False).input_ids
                message["output_ids"] = ids + [end_of_turn(tokenizer)]
        if i == 6:
            messages[1]["output_ids"] = messages[1]["output_ids"][:2]
        request = messages[0]["content"].split("takes one of them.\n\n")[1]
        result.append({"task": {"problem_description": request, "ground_truth": world.write_function(topic, values),
                                "test_cases": {"test1": f"tidy_{topic}([3, 1, 2])"}},
                       "dialogue_history": messages, "answer": messages[-1]["content"], "reward": float(i % 2)})
    return result


def byte_tokenizer(template, control=(), plain=(), eos=None, bos=None, **extra):
    """A byte-level tokenizer with 256 letters and no merges: `control` are special tokens, `plain` added ones that are
    not special (as <think> is in many families)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    core.add_tokens([AddedToken(token, normalized=False) for token in plain])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos, **extra)
    made.chat_template = template
    return made
