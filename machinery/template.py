"""What a chat template writes around messages, and what a message's text is in token ids.

Models are trained on dialogues in a format of their own, and the format is a template: a program that turns messages
into text with control tokens between them. Nobody but the template may write a control token. So the template is
rendered once, on placeholders; what it puts around them is kept (`scaffold`), and contents are encoded by themselves,
as mere text (`encode_text`). `env.render` puts the two together.

Place in the data flow: a tokenizer -> its scaffold -> env.render, and where turns end in sampling and in saved models.
Exercised by `python -m pytest tests/test_templates.py`.
"""
import copy
import functools
import re
from typing import NamedTuple

from jinja2 import TemplateError
from tokenizers import AddedToken

from machinery.files import clean, note

# Templates that write today's date write this one: the ids of a dialogue must be the same tomorrow.
FIXED_DATE = ('{% macro strftime_now(form) %}{{ form.replace("%d", "26").replace("%b", "Jul").replace("%B", "July")'
              '.replace("%m", "07").replace("%Y", "2024") }}{% endmacro %}{{ "" }}')


class Piece(NamedTuple):
    """What stands on one side of a human's message: control tokens, and text that is encoded with the message, because
    a tokenizer may have one token for a line break of the template and what the message begins with."""
    ids: list
    text: str


class Scaffold(NamedTuple):
    """What the template writes around the messages of a dialogue."""
    first: Piece    # before the human's first message
    later: Piece    # before a later one: the end of the agent's turn comes first
    opening: Piece  # behind the human's message, up to where the agent's turn begins
    end: int        # the id of the end of an agent's turn


@functools.lru_cache(maxsize=8)
def scaffold(tokenizer):
    """The Scaffold of a tokenizer's chat template. ValueError where it cannot be used.

    The template is rendered once, on two turns with a placeholder for each content, so contents can never be mistaken
    for template, nor be trimmed or stripped by it. The opening is that of the last turn, because that is what the agent
    reads when it speaks: some templates write earlier turns in another way.
    """
    messages = []
    for i in range(4):
        messages.append({"role": ("user", "assistant")[i % 2], "content": f"\ue000{i}\ue001"})

    def pieces(n_messages):
        """What the template writes before, between and after the first messages."""
        text = tokenizer.apply_chat_template(
            messages[:n_messages],
            chat_template=FIXED_DATE + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=n_messages % 2 == 1)
        parts = re.split("\ue000(\\d+)\ue001", text)
        found, placeholders = parts[::2], parts[1::2]
        if placeholders != [str(i) for i in range(n_messages)]:
            raise ValueError("the chat template does not show every message once and in order")
        return found
    try:
        before, _, between, opening, after = pieces(4)
        prompt = pieces(3)[-1]
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a dialogue of user and assistant: {error}") from None
    if opening.rstrip() == prompt.rstrip():
        opening = prompt  # white space in front of a turn is for the agent to write, or not
    else:
        note(f"note: the chat template asks for a turn with {prompt!r} but writes one with {opening!r}: using this")
    between = between.lstrip()
    after = after.lstrip() or between

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)
    _check_ends(tokenizer, encode(before), encode(opening), encode(between), encode(after))

    def in_front(text):
        """A piece before a message: the text is what follows the last control token."""
        _, end = _control_span(tokenizer, text)
        return Piece(encode(text[:end]), text[end:])
    start, _ = _control_span(tokenizer, opening)
    behind = Piece(encode(opening[start:]), opening[:start])
    return Scaffold(in_front(before), in_front(between), behind, encode(after)[0])


def _check_ends(tokenizer, before, opening, between, after):
    """ValueError unless the template's pieces, as token ids, say where the agent's turns end."""
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    if not after or after[0] not in control:
        raise ValueError("the chat template ends an agent's turn without a control token that could stop sampling")
    if between[:1] == after[:1]:  # earlier turns end as the last one does
        return
    # or they have no end of their own, and the control token that begins every message ends them
    begins_a_message = between and between[:1] == opening[:1] and between[0] in control
    if not begins_a_message or between[0] in before[:2]:
        raise ValueError("the chat template ends an agent's earlier turns in another way than its last one")


def _control_span(tokenizer, piece):
    """Where the first control token of a piece begins and the last one ends; without one, (its length, 0). White space
    that a control token takes in belongs to it."""
    patterns = []
    for token in sorted(tokenizer.added_tokens_decoder.values(), key=lambda token: -len(token.content)):
        pattern = re.escape(token.content)
        if token.lstrip:
            pattern = r"\s*" + pattern
        if token.rstrip:
            pattern += r"\s*"
        patterns.append(pattern)
    spans = [match.span() for match in re.finditer("|".join(patterns), piece) if match[0]]
    if not spans:
        return len(piece), 0
    return spans[0][0], spans[-1][1]


@functools.lru_cache(maxsize=8)
def _text_tokenizer(tokenizer):
    """A copy that takes no text for a control token, neither for a special one nor for one like <think>."""
    plain = copy.deepcopy(tokenizer)
    control = [AddedToken(str(token), special=True) for token in tokenizer.added_tokens_decoder.values()]
    plain.add_tokens(control, special_tokens=True)
    return plain


@functools.lru_cache(maxsize=8)
def known_ids(tokenizer):
    """The ids of all tokens. A vocabulary may have gaps, and a model's logits may go on behind it."""
    return frozenset(tokenizer.get_vocab().values())


@functools.lru_cache(maxsize=2 ** 16)
def encode_text(tokenizer, text):
    """Token ids of a message's text. What looks like a control token is encoded as text: nobody can forge a turn."""
    encoded = _text_tokenizer(tokenizer)(clean(text), add_special_tokens=False, split_special_tokens=True)
    return tuple(encoded.input_ids)


def end_of_turn(tokenizer):
    """The id of the token that the chat template writes right after an agent's turn."""
    return scaffold(tokenizer).end


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer):
    """The ids of all special tokens but the end of a turn: they have no place in a turn."""
    control = set(tokenizer.all_special_ids)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            control.add(token_id)
    return sorted(control - {end_of_turn(tokenizer)})
