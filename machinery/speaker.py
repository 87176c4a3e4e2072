"""A local language model that answers many conversations side by side.

A model's own `generation_config.json` is made for chat: it may penalise, forbid or force tokens, sample, or search with
beams. None of it is used here but the tokens that end a reply, so that the same prompt always has the same reply.

Used by `simulator.ModelHuman`. Exercised by `python -m pytest tests/test_humans.py`.
"""
from kernels.prefix import branches, common_prefixes
from machinery.sampling import sample
from machinery.template import end_of_turn
from machinery.thoughts import MARK, OPEN_AT_END


class Speaker:
    """A causal language model with its tokenizer. A reply ends at the end of a turn in its chat template, or at its
    EOS, which is often another token."""

    def __init__(self, model, tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        eos = model.generation_config.eos_token_id
        ends = {end_of_turn(tokenizer), tokenizer.eos_token_id}
        ends.update(eos if isinstance(eos, list) else [eos])
        ends.discard(None)
        self.ends = sorted(ends)
        special = ends.union(tokenizer.all_special_ids)
        special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.unsaid = {i for i in special if not MARK.search(tokenizer.decode([i]))}

    def decode(self, ids):
        """Text without the special tokens, but with those that mark thoughts (`machinery.thoughts`)."""
        return self.tokenizer.decode([i for i in ids if i not in self.unsaid])

    def complete(self, prompts, keys, groups, temperature, max_tokens):
        """The texts that follow these prompts (tuples of token ids), behind the mark of a thought if they end with one.
        keys: what the randomness of each is seeded with; groups: what each shares with others, its beginning too. At
        most max_tokens each."""
        memory = branches(self.model, prompts, prefixes=common_prefixes(prompts, groups))
        turns = sample(self.model, self.tokenizer, prompts, keys, temperature=temperature, max_tokens=max_tokens,
                       memory=memory, stop=self.ends)
        texts = []
        for prompt, turn in zip(prompts, turns):
            begun = OPEN_AT_END.search(self.decode(prompt[-32:]))  # some templates begin a turn with a thought
            texts.append((begun[0] if begun else "") + self.decode(turn))
        return texts
