"""Where people already are: trackers, model cards, and exports to other tools. The method knows none of them.

sweet.py hands on three moments: what the bars show (trackers.py), that a stage is finished (the cards of its models,
cards.py), and `python sweet.py export NAME` (the table below).

Exercised by `python -m pytest tests/test_adapters_*.py`.
"""
from machinery.optional import load

EXPORTS = {  # command: a function of the run, module:function
    "export merged": "adapters.merged:export",
}


def export(run, command):
    """Do what `python sweet.py export NAME` asks for."""
    load(EXPORTS[command], command)(run)


def finished(run, stage):
    """What follows a stage that was made: model cards, and, at the end of the command, the table for the tracker."""
    from adapters import cards
    cards.write(run, stage)
    goal = run.options.stage
    if run.todo and stage in ("eval", "report") and goal in (stage, "all") and (stage, goal) != ("eval", "all"):
        run.track.table(*cards.results(run))
