"""Bars that move, and lines between them that leave them whole.

A stage has one bar; a part of its work that takes some seconds (the turns of a group of dialogues, the tokens of a
turn, the micro-batches of a step) has one of its own below it, for as long as it takes.

Exercised by `python -m pytest tests/test_command.py`.
"""
import contextlib
import logging
import sys
import warnings

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

DELAY = 2  # seconds of work from which on a part has a bar


def note(text):
    """A line on stderr."""
    tqdm.write(text, file=sys.stderr)


def progress(items, label):
    """Iterate over a part of a stage's work."""
    return tqdm(items, desc=f"{label:>12}", delay=DELAY, leave=False, mininterval=0.5, disable=len(items) < 2)


@contextlib.contextmanager
def whole_bars():
    """While here, warnings and the libraries' logs are lines between the bars, too."""
    def show(message, category, filename, line, file=None, text=None):
        said = warnings.formatwarning(message, category, filename, line, text)
        tqdm.write(said, file=file or sys.stderr, end="")
    libraries = [logging.getLogger(name) for name in (None, "transformers", "huggingface_hub")]
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()  # a bar for each of the small files of the small world says nothing
    with warnings.catch_warnings(), logging_redirect_tqdm(libraries):
        warnings.showwarning = show
        yield
