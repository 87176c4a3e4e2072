"""Files of a run: JSON lines that are whole or absent, and the one error that a user sees.

A stage writes whole lines to NAME.partial; a torn line is dropped when it goes on, with what follows it; the end is a
rename, after the bytes have reached the disk. So a file under its own name is complete, whatever happened while it was
written, loss of power included. Bad input becomes an `InputError`: one line that names the file, the line and field,
and what was expected. What a run can do without (a checkpoint, a list of seconds) is set aside where it cannot be read.

Text is cleaned where it enters and where it is written: see `clean`. Exercised by `python -m pytest tests/test_env.py
tests/test_records.py`.
"""
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
from pathlib import Path

from tqdm import tqdm

from kernels import ranks
from machinery.bars import note


class InputError(ValueError):
    """Bad input from the user: one line that names the file, the line and field, and what was expected."""


# ------------------------------------------------------------------ text

MAX_DEPTH = 100  # lists and objects within each other in a record; Python's own functions stop at some hundred


def clean(value, depth=MAX_DEPTH):
    """A text, or a JSON value with all texts in it, that can be encoded as UTF-8.

    JSON and Python strings can hold half of a surrogate pair ("\\ud83d", half an emoji), which tokenizers and files
    refuse: it becomes U+FFFD. Two halves that belong together become their character. RecursionError when lists and
    objects are nested too deep.
    """
    if isinstance(value, str):
        if value.isascii():  # most are; the way through bytes takes longer
            return value
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if depth == 0:
        raise RecursionError(f"more than {MAX_DEPTH} lists and objects within each other")
    if isinstance(value, list):
        return [item if type(item) is int else clean(item, depth - 1) for item in value]  # mostly token ids
    if isinstance(value, dict):
        return {clean(name): clean(item, depth - 1) for name, item in value.items()}
    return value


def may_need_cleaning(text):
    """Whether a line of JSON can hold what `clean` looks for: half a surrogate pair, or too many lists in each other.
    Most lines cannot, and this is quicker to see than to clean them."""
    return "\\u" in text or not text.isascii() or text.count("[") + text.count("{") > MAX_DEPTH


def forgive(*streams):
    """Let text streams (stdin, stdout) replace what they cannot decode or encode, where they would raise."""
    for stream in streams:
        # a notebook's streams are something else; one that was read from stays as it is, as Python wants it
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):
            stream.reconfigure(errors="replace")


PLACE = re.compile(r"\{(\w+)\}")  # where a prompt is to be filled in: {solution}


def fill(prompt, **values):
    """A prompt with each {name} replaced by its value; braces around anything else, and in values, stay."""
    return PLACE.sub(lambda place: values.get(place[1], place[0]), prompt)


def read_prompt(path, flag, needed=(), optional=()):
    """The text of a prompt file. InputError, naming the flag, where it cannot be read, or has other places to fill in
    than these names."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {path}: cannot be read as UTF-8 text ({error})") from None
    places = dict.fromkeys(PLACE.findall(text))
    faults = [f"{{{name}}} is missing" for name in needed if name not in places]
    faults += [f"{{{name}}} is not known" for name in places if name not in (*needed, *optional)]
    if faults or not text.strip():
        known = [f"{{{name}}}" for name in needed] + [f"{{{name}}} if wanted" for name in optional]
        raise InputError(f"{flag} {path}: {', '.join(faults) or 'is empty'}; expected a text with {', '.join(known)}")
    return clean(text)


# ------------------------------------------------------------------ files

def read_jsonl(path):
    """Yield (line number, record) from a JSON-lines file, one at a time, all text cleaned. InputError on what cannot be
    read. Empty lines and byte order marks are skipped; NaN and Infinity are numbers, as Python writes them."""
    try:
        file = open(path, "rb")  # as bytes: only a line feed ends a line then, not U+2028
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected one JSON object a line") from None
    with file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig", "surrogatepass").strip()
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: not UTF-8 (byte {error.start}); expected one JSON object a line") from None
            if not text:
                continue
            yield number, _read_object(text, where)


def read_lines(path):
    """Yield the records of a JSON-lines file."""
    return (record for _, record in read_jsonl(path))


def _read_object(text, where):
    """The JSON object in a line. InputError on anything else."""
    if text.startswith("["):
        raise InputError(f"{where}: expected one JSON object a line; this is one array (a list)")
    try:
        record = json.loads(text)
        if may_need_cleaning(text):
            record = clean(record)
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        raise InputError(f"{where}: not JSON ({error}); expected one object a line") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected one JSON object a line; this is {type(record).__name__}")
    return record


def to_disk(path):
    """Wait until the disk holds a file, or a folder's list of names where its file system can say so."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if os.path.isdir(path) else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put(partial, path):
    """Give a finished file, or a folder of them, its name. The bytes come to the disk before the name does: or a loss
    of power could leave the name with nothing behind it."""
    partial, path = Path(partial), Path(path)
    for part in [*partial.rglob("*"), partial]:
        to_disk(part)
    os.replace(partial, path)
    to_disk(path.parent)


@ranks.by_first
def put_text(path, text):
    """Write one text file, whole or not at all, in a folder that is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.partial").write_text(clean(text), encoding="utf-8")
    put(f"{path}.partial", path)


def set_aside(path, reason):
    """Rename what cannot be read, so that it is neither used nor lost, and say so."""
    names = (f"{path}.unreadable{number or ''}" for number in itertools.count())
    aside = next(name for name in names if not os.path.lexists(name))
    reason = " ".join(str(reason).split())[:120]
    try:
        os.replace(path, aside)
    except OSError:  # a folder that can only be read
        note(f"sweet: note: {path} cannot be read ({reason}): left out")
    else:
        note(f"sweet: note: {path} cannot be read ({reason}): set aside as {Path(aside).name}")


def read_json(path, default=None):
    """The content of a JSON file, or the default where there is none, or none of its kind: that is set aside."""
    try:
        value = json.loads(Path(path).read_bytes())
        if default is not None and type(value) is not type(default):
            raise ValueError(f"expected a {type(default).__name__}")
    except FileNotFoundError:
        return default
    except (ValueError, RecursionError, OSError) as error:
        set_aside(path, error)
        return default
    return value


def is_record(line):
    """Whether a line of a file is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


@ranks.by_first
def drop_torn(partial, group):
    """Leave in a partial file whole lines alone, a multiple of `group`; returns how many."""
    Path(partial).touch()
    lines = Path(partial).read_bytes().split(b"\n")[:-1]
    whole = list(itertools.takewhile(is_record, lines))
    done = len(whole) // group * group
    with open(partial, "r+b") as file:
        file.truncate(sum(len(line) + 1 for line in whole[:done]))
    return done


class JsonlWriter:
    """Write a JSON-lines file that is either whole or absent, and can go on after a kill.

    Whole lines go to PATH.partial; `close` renames it. A writer opened on an existing partial file drops a torn line
    and all behind it, keeps a multiple of `group` lines (work is done in groups, so that a resumed run computes the
    same batches) and says in `.done` how many are kept.
    """

    def __init__(self, path, group=1):
        self.path, self.partial = Path(path), Path(f"{path}.partial")
        self.done = drop_torn(self.partial, group)
        self.file = open(os.devnull if ranks.rank() else self.partial, "a", encoding="utf-8")

    def write(self, records):
        for record in records:
            line = json.dumps(record, ensure_ascii=False)
            self.file.write(clean(line) + "\n")
        self.file.flush()

    def close(self):
        self.file.close()
        ranks.by_first(put)(self.partial, self.path)


def write_lines(path, records):
    """Write a JSON-lines file, whole or not at all."""
    Path(f"{path}.partial").unlink(missing_ok=True)
    writer = JsonlWriter(path)
    writer.write(records)
    writer.close()


def write_groups(path, items, size, make, label, track=None):
    """Write make(items[i:i + size], i), one record an item, group by group, with a bar; goes on at a whole group.
    track(label, number of records, {"reward": mean of the group}): who else sees what the bar shows.
    Several processes make as many groups at a time.

    A record that is None could not be made now: the group's others are kept aside, the missing ones are listed there
    and in the InputError, and the next call asks for those alone.
    """
    writer = JsonlWriter(path, size)
    starts, at_a_time = range(writer.done, len(items), size), ranks.count()

    def aside(i):
        return Path(f"{path}.{i}-{min(i + size, len(items))}.unfinished")

    def group(i):
        part = items[i:i + size]
        records = read_json(aside(i), {"records": [None] * len(part)})["records"]
        todo = [j for j, record in enumerate(records) if record is None]
        made = make([part[j] for j in todo], i) if todo else ()
        for j, record in zip(todo, made):
            records[j] = record
        return records
    with tqdm(total=len(items), initial=writer.done, desc=f"{label:>12}", mininterval=0.5) as bar:
        for first in range(0, len(starts), at_a_time):
            several, left = starts[first:first + at_a_time], ""
            for i, records in zip(several, ranks.share_out(group, several)):
                missing = [item for item, record in zip(items[i:i + size], records) if record is None]
                if missing or left:
                    write_json(aside(i), {"missing": missing, "records": records})
                    left = left or (f"{aside(i)}: {len(missing)} of {len(records)} unfinished: "
                                    f"{', '.join(map(str, missing))}; the others are kept there, and the same command "
                                    "goes on with these")
                    continue
                writer.write(records)
                aside(i).unlink(missing_ok=True)
                bar.update(len(records))
                if "reward" in records[0]:
                    reward = sum(record["reward"] for record in records) / len(records)
                    bar.set_postfix(reward=f"{reward:.3f}", refresh=False)
                    if track:
                        track(label, i + len(records), {"reward": reward})
            if left:
                raise InputError(left)
    writer.close()


def write_json(path, value):
    """Write one JSON file, whole or not at all."""
    put_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def holds_something(path):
    """Whether a file has content, or a folder files."""
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0


def split_specs(specs):
    """The parts of SPEC,SPEC,...: a path that is there is one of its own, whatever its name."""
    return [specs] if os.path.exists(specs) else specs.split(",")


def fingerprint(setting):
    """A setting in the words in which runs are compared: a file by name and content, what is not given as None."""
    if setting and Path(setting).is_file():
        digest = hashlib.sha256()
        with open(setting, "rb") as file:
            for block in iter(lambda: file.read(2 ** 20), b""):
                digest.update(block)
        setting = f"{Path(setting).name} (sha256 {digest.hexdigest()[:12]})"
    return clean(setting) or None
