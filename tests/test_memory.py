"""The arithmetic of docs/memory.md against models that are built, and tensors that autograd really keeps."""
import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import needs_peft
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from machinery.train import add_adapters

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("memory", ROOT / "docs/memory.py")
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)


def config_of(s, layers=None, heads=16):
    kind = Qwen2Config if s.bias else LlamaConfig
    size = s.D // heads
    return kind(hidden_size=s.D, intermediate_size=s.I, num_hidden_layers=layers or s.L, vocab_size=s.V,
                num_attention_heads=heads, num_key_value_heads=s.K // size, tie_word_embeddings=s.tied, head_dim=size)


@pytest.mark.parametrize("shape, heads", [*zip(memory.SHAPES, (14, 12, 16, 32))], ids=lambda x: getattr(x, "name", ""))
def test_parameters(shape, heads):
    """Counted on a model without storage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape, heads=heads))
    assert sum(p.numel() for p in model.parameters()) == shape.P
    assert abs(shape.P / 1e9 - float(shape.name.split("B")[0])) < 0.1


def test_parameters_of_adapters():
    needs_peft()
    shape = memory.Shape("small", 64, 160, 2, 300, 32, True, False)
    model = AutoModelForCausalLM.from_config(config_of(shape, heads=4))
    add_adapters(model, 4, seed=0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == shape.adapters(4)


def kept_bytes(model, ids):
    """Bytes of the activations that autograd keeps for the backward pass, each tensor once, parameters aside."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor keeps its address taken
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert out.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("lora", [0, 1])
@pytest.mark.parametrize("wide", [256, 512])
def test_activations_of_a_layer(wide, lora):
    """The difference between four layers and two, a token."""
    shape, tokens = memory.Shape("small", wide, 3 * wide, 2, 300, wide // 4, True, False), 128
    sizes = []
    for layers in (2, 4):
        model = AutoModelForCausalLM.from_config(config_of(shape, layers, heads=8), dtype=torch.bfloat16)
        if lora:
            needs_peft()
            add_adapters(model, memory.RANK, seed=0)
            model.get_input_embeddings().weight.requires_grad_(False)
        sizes.append(kept_bytes(model, torch.randint(300, (1, tokens))))
    measured = (sizes[1] - sizes[0]) / 2 / tokens
    assert memory.layer_bytes(shape, lora) == pytest.approx(measured, rel=0.2)


def test_the_document_holds_the_tables():
    assert memory.tables() in (ROOT / "docs/memory.md").read_text(encoding="utf-8")
