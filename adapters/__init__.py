"""Where people already are: exports to other tools, and ColBench as their environment. The method knows none of them.

Exercised by `python -m pytest tests/test_adapters_trl.py tests/test_adapters_verifiers.py`.
"""
from machinery.optional import load

EXPORTS = {  # command: a function of the run, module:function
    "export trl": "adapters.trl:export",
}


def export(run, command):
    """Do what `python sweet.py export NAME` asks for."""
    load(EXPORTS[command], command)(run)
