"""What a chat template writes around messages, and what a message's text is in token ids.

Models are trained on dialogues in a format of their own, and the format is a template: a program that turns messages
into text with control tokens between them. Nobody but the template may write a control token. So the template is
rendered once, on placeholders; what it puts around them is kept (`scaffold`), and contents are encoded by themselves,
as mere text (`encode_text`). `env.render` puts the two together.

Place in the data flow: a tokenizer -> its scaffold -> env.render, and where turns end in sampling and in saved models.
Exercised by `python -m pytest tests/test_templates.py`.
"""
import contextlib
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
    before, _, between, opening, after = _pieces(tokenizer, "user", "assistant", "user", "assistant")
    prompt = _pieces(tokenizer, "user", "assistant", "user")[-1]
    if opening.rstrip() == prompt.rstrip():
        opening = prompt  # white space in front of a turn is for the agent to write, or not
    else:
        note(f"note: the chat template asks for a turn with {prompt!r} but writes one with {opening!r}: using this")
    between = between.lstrip()
    after = after.lstrip() or between

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)
    _check_ends(tokenizer, encode(before), encode(opening), encode(between), encode(after))
    start, _ = _control_span(tokenizer, opening)
    behind = Piece(encode(opening[start:]), opening[:start])
    return Scaffold(_in_front(tokenizer, before), _in_front(tokenizer, between), behind, encode(after)[0])


def _pieces(tokenizer, *roles):
    """What a template writes before, between and after messages of these roles. ValueError where it refuses them."""
    messages = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=FIXED_DATE + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=roles[-1] == "user")
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a dialogue of {' and '.join(dict.fromkeys(roles))}: {error}"
                         ) from None
    parts = re.split("\ue000(\\d+)\ue001", text)
    found, placeholders = parts[::2], parts[1::2]
    if placeholders != [str(i) for i in range(len(roles))]:
        raise ValueError("the chat template does not show every message once and in order")
    return found


def _in_front(tokenizer, text):
    """A piece before a message: its text is what follows the last control token."""
    _, end = _control_span(tokenizer, text)
    return Piece(tokenizer.encode(text[:end], add_special_tokens=False), text[end:])


@functools.lru_cache(maxsize=8)
def system_pieces(tokenizer):
    """(what the template writes before a system message's text, what it writes between that and the user's); None, and
    a note, where it has no system role: it refuses one, moves it, or writes it like another role's message."""
    found = []
    for role in ("system", "user", "assistant"):
        with contextlib.suppress(ValueError):
            found.append((role, _pieces(tokenizer, role, "user", "assistant", "user")))
    pieces = dict(found)
    system = pieces.pop("system", None)
    if system is None or system in pieces.values():
        note("note: the chat template has no system role: a system message's text stands in front of the user's first")
        return None
    return system[0], system[1]


def in_front_of_user(tokenizer, system):
    """(control tokens, text) before the human's first message, the text of a system message included."""
    pieces = system_pieces(tokenizer)
    if pieces is None:
        ids, text = scaffold(tokenizer).first
        return ids, f"{text}{system}\n\n"
    ids, text = _in_front(tokenizer, pieces[0])
    text += system
    start, end = _control_span(tokenizer, pieces[1])
    if end == 0:  # nothing ends the system's text: it and the human's are one
        return ids, text + pieces[1]
    control = tokenizer.encode(pieces[1][start:end], add_special_tokens=False)
    said = encode_text(tokenizer, text + pieces[1][:start])
    return [*ids, *said, *control], pieces[1][end:]


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
