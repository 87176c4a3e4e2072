"""The page in what an agent wrote, found the way a person would.

Thoughts (<think> ... </think>), comments outside of the page and tags in backticks are passed over. Then, the first of
these that there is: the last whole <html> ... </html>; an <html> that was cut off; what stands in the last ``` block
of HTML; and what runs from the first tag that is meant as one to the last.

Exercised by `python -m pytest tests/test_frontend.py`.
"""
import re
from bisect import bisect

TEXT = re.S | re.I
THOUGHT = re.compile(r"<(think|thinking|thought|reasoning|scratchpad)>.*?(?:</\1>|\Z)", TEXT)
END_OF_THOUGHT = re.compile(r"</(?:think|thinking|thought|reasoning|scratchpad)>", re.I)
COMMENT = r"<!--.*?(?:-->|\Z)"
FENCE = re.compile(r"^[ \t]*```[ \t]*(?:html?|xml)?[ \t]*\n(.*?)^[ \t]*```", TEXT | re.M)
HEAD = r"(?:<!doctype[^<>]{0,300}>\s*(?:<!--(?:(?!-->).){0,500}-->\s*)?)?<html\b[^<>]*>?"
SCAN = re.compile(rf"(?P<aside>{COMMENT}|```+|`(?![^`\n]*</html>)[^`\n]*`)"
                  rf"|(?P<page>(?P<head>{HEAD})(?:{COMMENT}|.)*?(?P<end></html\s*>|\Z))", TEXT)
TAG = re.compile(r"<(/?)(!doctype\b|[a-z][\w-]*)[^<>]*>", re.I)


def blank(found):
    """Spaces in the place of a match, so that all offsets stay."""
    return " " * len(found[0])


def line_starts(text):
    """Where the first letter of each line stands."""
    return [line.end() for line in re.finditer(r"^[ \t]*", text, re.M)]


def fragment(text):
    """(start, end) of the markup in a text without <html>: from the first tag that is meant to the last; or None."""
    tags, starts = list(TAG.finditer(text)), line_starts(text)
    closings = {tag[2].lower(): tag.start() for tag in tags if tag[1]}  # the last of each name

    def line_start(tag):
        return starts[bisect(starts, tag.start()) - 1]

    def meant(tag):
        """Meant as a tag, not only spoken of: on a line of its own, or right before its text."""
        after, first_of_line = text[tag.end():tag.end() + 1], line_start(tag) == tag.start()
        tight = bool(after.strip()) and after not in ".,;:!?)'\""
        if closings.get(tag[2].lower(), -1) > tag.start():
            return first_of_line or tight
        return tag[2].lower() == "!doctype" or first_of_line and (tight or after in ("", "\n"))
    first = next((tag for tag in tags if not tag[1] and meant(tag)), None)
    if first is None:
        return None
    ends = [tag.end() for tag in tags if tag[1] or text[line_start(tag)] == "<"]
    return first.start(), max([first.end(), *ends])


def whole_pages(text):
    """Matches of SCAN that are pages, and not a word on the <html> tag."""
    starts = set(line_starts(text))
    for found in SCAN.finditer(text):
        if found["page"]:
            holds_tags = re.compile(r"\s*<").match(text, found.end("head"))
            if found["head"].startswith("<!") or found.start() in starts or holds_tags:
                yield found


def page_source(text):
    """The page in what an agent wrote, a part of the text; "" without one."""
    plain = THOUGHT.sub(blank, text)
    thought = max((end.end() for end in END_OF_THOUGHT.finditer(plain)), default=0)
    plain = " " * thought + plain[thought:]  # a thought whose beginning is not part of the text
    pages = list(whole_pages(plain))
    if pages:
        page = next((page for page in reversed(pages) if page["end"]), pages[-1])
        start, end = page.span()
        cut = -1 if page["end"] else plain.find("\n```", start)
        return text[start:end if cut < 0 else cut]
    plain = SCAN.sub(lambda found: blank(found) if found["aside"] and "```" not in found[0] else found[0], plain)
    for fence in reversed(list(FENCE.finditer(plain))):
        inside = fragment(fence[1])
        if inside:
            return text[fence.start(1) + inside[0]:fence.start(1) + inside[1]]
    inside = fragment(plain)
    return text[slice(*inside)] if inside else ""
