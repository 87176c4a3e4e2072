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
NEXT_TAG = re.compile(r"\s*<")
TAG = re.compile(r"<(/?)(!doctype\b|[a-z][\w-]*)[^<>]*>", re.I)


def blank(found):
    """Spaces in the place of a match, so that all offsets stay."""
    return " " * len(found[0])


def line_starts(text):
    """Where the first letter of each line stands."""
    return [line.end() for line in re.finditer(r"^[ \t]*", text, re.M)]


def fragment(text):
    """(start, end) of the markup in a text without <html>: from the first tag that is meant to the last; or None."""
    tags = list(TAG.finditer(text))
    starts = line_starts(text)
    closings = {}  # the last of each name
    for tag in tags:
        if tag[1]:
            closings[tag[2].lower()] = tag.start()

    def line_start(tag):
        return starts[bisect(starts, tag.start()) - 1]

    def meant(tag):
        """Meant as a tag, not only spoken of: on a line of its own, or right before its text."""
        name = tag[2].lower()
        first_of_line = line_start(tag) == tag.start()
        after = text[tag.end():][:1]
        tight = bool(after.strip()) and after not in ".,;:!?)'\""
        if closings.get(name, -1) > tag.start():
            return first_of_line or tight
        if name == "!doctype":
            return True
        return first_of_line and (tight or after in ("", "\n"))
    begins = [tag for tag in tags if not tag[1] and meant(tag)]
    if not begins:
        return None
    ends = [begins[0].end()]
    for tag in tags:
        if tag[1] or text[line_start(tag)] == "<":
            ends.append(tag.end())
    return begins[0].start(), max(ends)


def whole_pages(text):
    """Matches of SCAN that are pages, and not a word on the <html> tag."""
    starts = set(line_starts(text))
    for found in SCAN.finditer(text):
        if found["page"]:
            holds_tags = NEXT_TAG.match(text, found.end("head"))
            if found["head"].startswith("<!") or found.start() in starts or holds_tags:
                yield found


def page_source(text):
    """The page in what an agent wrote, a part of the text; "" without one."""
    plain = THOUGHT.sub(blank, text)
    for end_of_thought in list(END_OF_THOUGHT.finditer(plain))[-1:]:  # its beginning is not part of the text
        thought = end_of_thought.end()
        plain = " " * thought + plain[thought:]

    pages = list(whole_pages(plain))
    ended = [page for page in pages if page["end"]]
    if ended:
        return text[slice(*ended[-1].span())]
    if pages:  # cut off, perhaps by the end of a block
        start, end = pages[-1].span()
        fence = plain.find("\n```", start)
        return text[start:end if fence < 0 else fence]

    def without_asides(found):
        return blank(found) if found["aside"] and "```" not in found[0] else found[0]
    plain = SCAN.sub(without_asides, plain)
    for fence in reversed(list(FENCE.finditer(plain))):
        if inside := fragment(fence[1]):
            start, end = inside
            return text[fence.start(1):][start:end]
    inside = fragment(plain)
    return text[slice(*inside)] if inside else ""
