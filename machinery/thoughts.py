"""What a language model says, without what it thinks.

Reasoning models write down their thoughts before they speak. Some servers take them out, others leave them in the text;
and a simulated human thinks about the solution, in the solution's own words. The families mark thoughts in different
ways:

    <think> ... </think>        also thinking, thought, reasoning, and with a prefix (<seed:think>)
    [THINK] ... [/THINK]        Magistral          ◁think▷ ... ◁/think▷                         Kimi
    <|START_THINKING|> ... <|END_THINKING|>        Command A; <|begin_of_thought|> ... <|end_of_thought|>  OpenThinker
    <|channel|>analysis<|message|> ... <|channel|>final<|message|>   gpt-oss; without its special tokens:
    analysis ... assistantfinal                    <|channel>thought ... <channel|>              Gemma

Used by `simulator`. Exercised by `python -m pytest tests/test_humans.py`.
"""
import re

NAME = r"(?:\w{1,20}[:_])?(?:think(?:ing)?|thoughts?|reasoning|reflection|scratchpad)(?:_\w{1,20})?"
TAG = rf"{NAME}(?:\s[^<>=]{{0,99}}=[^<>]{{0,999}})?\s{{0,9}}"  # `a < thought and b > c` has no attribute: no tag
CLOSING = re.compile(rf"""<\s?/\s?{TAG}> | <\s?{TAG}/\s?>  # <think/> is a thought of no words
    | (?-i:\[/THINK\]) | ◁/think▷ | <\|/{NAME}\|> | <\|end_(?:of_)?{NAME}\|> | <channel\|>
    | <\|channel\|>\s?final\b[^<]{{0,99}}(?:<\|constrain\|>[^<]{{0,99}})?<\|message\|> | assistantfinal""", re.I | re.X)
OPENING = re.compile(rf"""<\s?{TAG}> | (?-i:\[THINK\]) | ◁think▷ | <\|{NAME}\|> | <\|(?:start|begin)_(?:of_)?{NAME}\|>
    | <\|channel> | <\|channel\|> | \A\s?(?-i:analysis(?=[A-Z"']))""", re.I | re.X)
OPEN_AT_END = re.compile(rf"(?:{OPENING.pattern})\s*\Z", re.I | re.X)
MARK = re.compile("think|thought|reason|reflect|channel|message", re.I)  # special tokens that may mark a thought


def spoken(text):
    """What stands behind the thoughts of a reply; "" if nothing does. A thought ends where its mark says so, even if it
    began in the prompt; one without an end was cut off, and all that follows is thought."""
    behind = CLOSING.split(text)[-1]
    said = OPENING.split(behind)[0]
    return re.split(r"<\|(?:end|return|start)\|>", said)[0].strip()
