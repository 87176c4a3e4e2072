"""Where people already are: trackers, model cards, and exports to other tools. The method knows none of them.

sweet.py hands on three moments: what the bars show (trackers.py), that a stage is finished (the cards of its models,
cards.py), and `python sweet.py export NAME` (the table below).

Exercised by `python -m pytest tests/test_adapters_*.py`.
"""
from machinery.optional import load

EXPORTS = {  # command: a function of the run, module:function
    "export merged": "adapters.merged:export",
    "export trl": "adapters.trl:export",
}


def export(run, command):
    """Do what `python sweet.py export NAME` asks for."""
    load(EXPORTS[command], command)(run)


def finished(run, stage):
    """What follows a stage that was made: the card of its model, or, where it made figures, all cards and the table for
    the tracker."""
    from adapters import cards
    measures = stage in ("eval", "credit", "report")
    changed = [name for name in cards.models(run) if measures or name == stage]
    if not changed:
        return
    figures = cards.measured(run)
    for name in changed:
        cards.write(run, name, run.path(name), figures)
    if stage == "eval":
        run.track.table(*cards.results(figures))
