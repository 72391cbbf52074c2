"""A warning for a run whose embeddings have fallen together, which its loss alone does not show.

Where labels do not look like their queries, the hardest negatives of a batch lie far above the positives,
and pulling everything together is the quickest way down for the triplet and PRIME losses. From there on no
gradient leads away: the loss stands still, and the run would go on for hours.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vixml_jax import distributed

# Collapsed: so many steps one after the other in which so many of the hardest negatives lie near a positive.
STEPS, SHARE = 100, 0.995

logger = logging.getLogger(__name__)


class CollapseWatch:
    """Warns once, when `train/violators` has stood at its highest for long."""

    def __init__(self):
        self._steps = 0
        self._has_warned = False

    def update(self, step: int, figures: Sequence[dict[str, float]]) -> None:
        """Looks at the figures of the steps up to `step`, in order."""
        for values in figures:
            self._steps = self._steps + 1 if values["train/violators"] >= SHARE else 0
        if self._steps < STEPS or self._has_warned:
            return
        self._has_warned = True
        if not distributed.is_lead():  # all processes see the same figures
            return
        logger.warning(
            "step %d: all embeddings seem to have fallen together (train/violators at %.1f for %d steps): "
            "stop, and try --config.loss.name=decoupled_softmax, a lower --config.optimizer.lr, or smaller "
            "batches, with another --workdir",
            step,
            figures[-1]["train/violators"],
            self._steps,
        )
