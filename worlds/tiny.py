"""The tiny language model of the small worlds: a tokenizer that has one token for each phrase, and an untrained Llama.

Exercised by `python -m pytest tests/test_world.py`.
"""
from dataclasses import dataclass

from machinery.train import arg


def make_tokenizer(texts):
    """Unigram over a world's phrases (fewest tokens win), with letters and bytes below them so that any text can be
    encoded."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    vocab = [("<unk>", -1000.0)] + [(f"<0x{byte:02X}>", -1000.0) for byte in range(256)]
    vocab += [(chr(code), -20.0) for code in range(32, 127) if chr(code) not in texts]
    vocab += [(text, -1.0) for text in texts]
    core = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|agent|>"], model_max_length=4096)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|agent|>{{ m.content }}<|end|>"
        "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|agent|>{% endif %}")
    return tokenizer


@dataclass(frozen=True)
class Base:
    """Hyper-parameters of the base policy."""
    documents: int = arg(16000, least=0)
    """Dialogues of the demonstrator to imitate. Named beside --model: it is fine-tuned on so many that show no
    reference (a learning rate of 2e-4 and one epoch will do); 0, or not named: it is taken as it is."""
    epochs: int = 2
    """Passes over them."""
    batch_size: int = 24
    """Dialogues a step."""
    lr: float = 6e-3
    """Learning rate; the default is for the tiny model, 2e-4 suits a pretrained one."""
    hidden: int = 64
    """Width of the model."""
    layers: int = 2
    """Layers of the model."""


def new_model(cfg, seed, tokenizer):
    """A tiny untrained Llama for a tokenizer. cfg: a Base."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=cfg.hidden, intermediate_size=2 * cfg.hidden,
        num_hidden_layers=cfg.layers, num_attention_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.08))  # the usual 0.02 learns nothing at this width
