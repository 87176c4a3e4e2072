"""How many lines of code the five core files have, without docstrings, comments and blank lines.

    python -m bench.lines
"""
import ast
import io
import tokenize
from pathlib import Path

CORE = ("sweet.py", "critic.py", "actor.py", "env.py", "simulator.py")
ROOT = Path(__file__).resolve().parent.parent
WITHOUT_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def docstring_lines(source):
    """The lines of all strings that stand for themselves: docstrings, of fields too."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def lines_of_code(source):
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in WITHOUT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(source))


if __name__ == "__main__":
    counts = {name: lines_of_code((ROOT / name).read_text(encoding="utf-8")) for name in CORE}
    for name, count in counts.items():
        print(f"{count:6} {name}")
    print(f"{sum(counts.values()):6} in all")
