"""Files of tasks and dialogues by their name on the Hugging Face hub: OWNER/NAME, or OWNER/NAME:FILE.

A path that is there wins. What is fetched once lies in the hub's own cache, and a run remembers that file, not the
name: so it needs no network again, and a new version of the data does not change a run.

Place in the data flow: the flags of a command -> `local_file` -> paths. Exercised by `python -m pytest
tests/test_hub.py`.
"""
import os
import re

from machinery.files import InputError
from machinery.optional import first_line

NAME = re.compile(r"(\w[\w.-]*/[\w.-]+)(?::(.+))?")


def local_file(value, flag):
    """The path of a file of JSON lines, fetched where `value` names a dataset of the hub. InputError, naming the flag,
    where it is not to be had, or where it is open which file is meant."""
    match = NAME.fullmatch(value)
    if os.path.exists(value) or not match:
        return value
    if value.endswith((".json", ".jsonl")) and not match[2]:
        return value  # a path with a mistake in it
    from huggingface_hub import HfApi, hf_hub_download
    repo, file = match.groups()
    try:
        if not file:
            names = HfApi().list_repo_files(repo, repo_type="dataset")
            lines = [name for name in names if name.endswith(".jsonl")]
            if len(lines) != 1:
                known = ", ".join(lines or names)
                raise InputError(f"{flag} {value}: which file? Expected {repo}:FILE, one of {known}")
            file, = lines
        return hf_hub_download(repo, file, repo_type="dataset")
    except InputError:
        raise
    except Exception as error:  # the hub's package hands on those of the package that it speaks through
        raise InputError(f"{flag} {value}: no such file here, and not to be had from the Hugging Face hub "
                         f"({first_line(error)})") from None
