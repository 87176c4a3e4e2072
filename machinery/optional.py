"""Packages that only some flags need: missing, or unfit for what else is installed, they are one line before any work.

`.ci/constraints.txt` is the one place that says which versions were tried together. `requirements.txt` and
`requirements-dev.txt` install from it, CI installs exactly that, and the pip command in a message here is read from it.

Exercised by `python -m pytest tests/test_install.py`.
"""
import difflib
import importlib
import re
from pathlib import Path

from machinery.files import InputError

PINS = Path(__file__).resolve().parent.parent / ".ci/constraints.txt"
PARTS = {  # package: the module, names in it that are used here, and all that pip has to install
    "gradio": ("gradio", ("Blocks", "Chatbot"), ("gradio",)),
    "gguf": ("gguf", ("GGUFReader", "dequantize"), ("transformers", "accelerate", "gguf")),
    "openai": ("openai", ("OpenAI", "AsyncOpenAI", "OpenAIError"), ("openai",)),
    "peft": ("peft", ("LoraConfig", "load_peft_weights", "set_peft_model_state_dict"), ("transformers", "peft")),
    "pillow": ("PIL.Image", ("open", "fromarray"), ("pillow",)),
    "trackio": ("trackio", ("init", "Markdown"), ("trackio",)),
    "wandb": ("wandb", ("init", "Table"), ("wandb",)),
    "tensorboard": ("tensorboard", ("__version__",), ("tensorboard",)),
    "playwright": ("playwright.sync_api", ("sync_playwright",), ("playwright",)),
}


def pin(package):
    """A package as pip should install it: peft==0.21.2. Without a version where the project was installed by pip, which
    leaves the file of versions behind."""
    pins = PINS.read_text(encoding="utf-8") if PINS.exists() else ""
    found = re.search(rf"(?im)^{re.escape(package)}==[^\s;]+", pins)
    return found[0] if found else package


def require(package, flag, use=None):
    """Import an optional package and try what it is needed for: `use`, a function of its module. Returns the module.
    InputError, with the pip command that mends it, where it is missing or does not fit. flag: what asks for it."""
    name, needed, install = PARTS[package]
    try:
        module = importlib.import_module(name)
        for attribute in needed:
            getattr(module, attribute)
        if use:
            use(module)
    except Exception as error:  # importing runs a package's own code, which fails in its own ways
        missing = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
        fault = "is not installed" if missing else f"does not fit what else is installed ({first_line(error)})"
        raise InputError(f"{flag}: needs {package}, which {fault}: pip install "
                         f"{' '.join(map(pin, install))}") from None
    return module


def load(spec, flag, use=lambda found: found, expected="module:function, importable from here"):
    """What `use` makes of the thing that is named so, module:name. InputError, naming the flag, where it fails."""
    module, _, name = spec.partition(":")
    try:
        return use(getattr(importlib.import_module(module), name))
    except (Exception, SystemExit) as error:  # the user's code, which fails in its own ways
        raise InputError(f"{flag} {spec}: {type(error).__name__}: {first_line(error)}; expected {expected}") from None


def make(spec, flag, *methods):
    """An object of the class that is named so, module:Class, made by `Class()`. methods: what it must have, as
    "name(arguments)". InputError, naming the flag, on anything else."""
    made = load(spec, flag, lambda found: found(), "module:Class, importable from here and made by Class()")
    for method in methods:
        if not callable(getattr(made, method.partition("(")[0], None)):
            raise InputError(f"{flag} {spec}: {type(made).__name__} has no method {method}")
    return made


def find(spec, known, flag, *methods):
    """What a flag names: one of `known` {name: module:Class}, or module:Class of the user's; see `make`."""
    if spec not in known and ":" not in spec:
        near = difflib.get_close_matches(spec, known, 1)
        perhaps = f" (perhaps {near[0]})" if near else ""
        raise InputError(f"{flag} {spec}: expected {' or '.join(known)} or module:Class{perhaps}")
    return make(known.get(spec, spec), flag, *methods)


def first_line(error):
    """What an exception says, on one line and not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__
