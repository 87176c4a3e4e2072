"""Find the program in what an agent wrote, the way a person would: try what could be meant, and take what works.

    find_program(answer, calls) -> the first candidate that compiles and defines what the calls call

The candidates, in order: the whole text, where it begins as a program does; its fenced Markdown blocks; all its parts
that are Python, wherever fences or tags stand, without prose and without drafts that do not compile, joined and one by
one; and the same for the text without quote marks, prompts and characters that nobody sees.

Place in the data flow: an answer -> its program -> machinery/sandbox_worker.py runs it. The text of this file is handed
to the far side of the sandbox and works there, because compiling what a stranger wrote can end a process. It imports
nothing but what the worker can afford. Exercised by `python -m pytest tests/test_program.py`.
"""
import builtins
import dis
import keyword
import re

FENCE = re.compile(r"^ {0,3}(```+|~~~+)[ \t]*(?![ \t])([\w+-]*)(?![\w+-])[^\n`]*\n(.*?)(?:^ {0,3}\1[`~]*[ \t]*$|\Z)",
                   re.M | re.S)
CODE = r"(?:async )?def |class |import |from |@|\w+ = "
INFO = rf"[ \t]*(?:[\w+.-]+[ \t]+)?(?={CODE})"  # behind a fence, a language at most, and then code in the same line
STOP = r"(?!`{3}|~{3}|</?[A-Za-z])"
WORD = rf"\b(?!(?:{'|'.join(keyword.kwlist + keyword.softkwlist)})\b)[^\W\d_][\w'’-]{{0,30}}"
OUTSIDE = rf"(?:{STOP}[^\"'#\n]|(?<=\w\w)'(?=\w)|(?<=\bI)'(?=\w))"  # of strings and comments; "it's" is no string
PROSE = "|".join((
    rf"(?![ \t@]){OUTSIDE}*?{WORD} +{WORD}\b(?:{STOP}.)*",  # two words in a row are no Python
    r"\W{0,4}[A-Z][^=(\[{:@`~<\n]*:?\W{0,3}$",  # Sure! **Explanation:**
    rf"(?:[-*+•]|\d+[.)]) (?:{STOP}.)*",  # an item of a list
    r"[-=*_]{3,}[ \t]*$"))  # a line across the page
MARK = rf"(?m)(?:`{{3,}}|~{{3,}}|</?[A-Za-z][^<>\n]*>)(?:{INFO}|(?:{STOP}.)*)|(?:^(?:{PROSE})\n*)+"  # rarely compiled
MOST_MARKS = 60  # the number of tries grows with its square
MARGIN = re.compile(r"(?:[ \t]*\n)*([ \t]*)")
PLAIN = re.compile(rf"{CODE}|['\"#]")  # how programs begin: no need to look for fences, which stand in their strings
CALLED = re.compile(r"(?<![\w.])([^\W\d]\w*)\s*\(")
BUILTINS = set(dir(builtins))
STORES = dis.opmap["STORE_NAME"], dis.opmap["STORE_GLOBAL"]

QUOTE = r"(?m)^[ \t]*(?:(?:> ?)+|\.\.\. )"  # a quotation, or the prompt of a session
UNSEEN = {**dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff")),
          **dict.fromkeys(map(ord, "\u00a0\u202f\u3000"), " ")}


def dedent(code):
    """Remove the first line's indentation from all lines that have it (textwrap.dedent changes strings)."""
    margin = MARGIN.match(code)[1]
    return re.sub(f"(?m)^{margin}", "", code) if margin else code


def extract_code(answer):
    """The program in an answer: its fenced Markdown blocks (those marked as Python, if some are), or all of it."""
    answer = answer.lstrip("\ufeff").replace("\r\n", "\n")
    blocks = [(kind.lower(), dedent(body))
              for _, kind, body in FENCE.findall(answer) if body.strip()]
    python = [body for kind, body in blocks if kind in ("python", "py", "python3", "py3", "ipython", "code")]
    code = "\n".join(python or [body for kind, body in blocks if not kind])
    return code or re.sub(rf"(?m)^ {{0,3}}(```+|~~~+)({INFO}|.*$)", "", answer)


def compiles(code):
    try:
        compile(code, "<answer>", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError):
        return False
    return True


def python_parts(text):
    """Yield the parts of a text that are Python: each lies between two marks (fences, tags, prose) or the text's ends.

    The longest comes first: marks inside of what compiles stand in its strings and comments, and end nothing.
    """
    marks = [mark.span() for mark in re.finditer(MARK, text)][:MOST_MARKS]
    starts = [0, *(end for _, end in marks)]
    ends = [*(start for start, _ in marks), len(text)]
    i = 0
    while i < len(starts):
        for last in reversed(range(i, len(ends))):
            part = dedent(text[starts[i]:ends[last]])
            if compiles(part):
                yield part
                i = last
                break
        i += 1


def candidates(answer):
    """Yield all texts that could be an answer's program, the most likely first."""
    if PLAIN.match(answer):
        yield answer
    yield extract_code(answer)
    text = re.sub("\r\n?", "\n", answer)
    for version in (text, re.sub(QUOTE, "", text.translate(UNSEEN))):
        yield version
        parts = list(python_parts(version))
        yield "\n".join(parts)
        yield from reversed(parts)


def bound(code):
    """The names that a program's top level binds: by definitions, imports and assignments."""
    steps = zip(code.co_code[::2], code.co_code[1::2])  # (behind EXTENDED_ARG, the 257th name passes for another)
    return {code.co_names[name] for step, name in steps if step in STORES}


def find_program(answer, calls):
    """(source, code) of the program in an answer: of the first candidate that compiles and binds all names that the
    calls call, or else most of them. An exception says why there is none."""
    wanted = set(CALLED.findall("\n".join(calls))) - BUILTINS
    best, most, failure = None, 0 if wanted else -1, None
    for source in candidates(answer):
        try:
            code = compile(source, "<answer>", "exec")
        except Exception as error:  # SyntaxError, ValueError, MemoryError, ...
            failure = failure or error
            continue
        found = len(wanted & bound(code))
        if found > most or not (best or failure):
            best, most = (source, code), found
        if found == len(wanted):
            break
    if best is None:
        raise failure
    return best
