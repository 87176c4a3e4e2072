"""A local language model that answers: always its likeliest next token, and nothing else.

A model's own `generation_config.json` is made for chat: it may penalise, forbid or force tokens, sample, or search with
beams. None of it is used here but the tokens that end a reply, so that the same prompt always has the same reply.

Used by `simulator.ModelHuman`. Exercised by `python -m pytest tests/test_humans.py`.
"""
import torch
from transformers import GenerationConfig

from machinery.thoughts import MARK, OPEN_AT_END


class Greedy:
    """A causal language model with its tokenizer. eot: the id that ends a turn in its chat template, often not its
    EOS; both end a reply."""

    def __init__(self, model, tokenizer, eot, max_tokens):
        self.model = model
        self.tokenizer = tokenizer
        eos = model.generation_config.eos_token_id
        ends = {eot, tokenizer.eos_token_id}
        ends.update(eos if isinstance(eos, list) else [eos])
        ends.discard(None)
        self.config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=eot,
            eos_token_id=sorted(ends),
        )
        model.generation_config = self.config  # what is not set in the one that is passed would come from the model's
        special = ends.union(tokenizer.all_special_ids)
        special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.unsaid = {i for i in special if not MARK.search(tokenizer.decode([i]))}

    def decode(self, ids):
        """Text without the special tokens, but with those that mark thoughts (`machinery.thoughts`)."""
        return self.tokenizer.decode([i for i in ids if i not in self.unsaid])

    def complete(self, ids):
        """The text that follows these token ids, behind the mark of a thought if they end with one."""
        prompt = torch.tensor([ids], device=self.model.device)
        out = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=self.config)
        text = self.decode(out[0, len(ids):].tolist())
        begun = OPEN_AT_END.search(self.decode(ids[-32:]))  # some templates begin a turn with a thought
        return begun[0] + text if begun else text
