"""Intervals of a mean over seeds and tasks, by drawing again.

Two things vary from one run to the next, the seed and the tasks: runs are drawn with replacement, then tasks within
each drawn run, and 95 % of the redrawn means lie in the interval. A difference of two methods is taken on the same
draws, which removes what both share. Exercised by `python -m pytest tests/test_report.py`.

Shapes: R resamples, S runs (seeds), N task results of all runs.
"""
import numpy as np


def resample_weights(sizes, resamples=2000, seed=0):
    """Two-level bootstrap as a matrix: weights_RN @ values_N are the redrawn means, except row 0, the plain mean.

    sizes: number of tasks of each of the S runs. A mean is the mean over runs of the mean over a run's tasks. A run
    that is drawn k times gets k * n of its n tasks, drawn anew each time: how often each comes is a multinomial.
    """
    rng, S = np.random.default_rng(seed), len(sizes)
    drawn_RS = rng.multinomial(S, [1 / S] * S, size=resamples)
    counts = [rng.multinomial(drawn_RS[:, s] * n, [1 / n] * n) / (S * n) for s, n in enumerate(sizes)]
    plain = np.repeat([1 / (S * n) for n in sizes], sizes)
    return np.vstack([plain, np.concatenate(counts, axis=1)])


def interval(means_R):
    """(mean, low, high): row 0, and the ends of the middle 95 % of the redrawn means."""
    return (means_R[0], *np.percentile(means_R[1:], (2.5, 97.5)))
