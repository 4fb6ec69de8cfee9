"""Mean and spread of one number over seeds."""

import math
import statistics
from collections.abc import Sequence


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, sample standard deviation and standard error of the mean. The last two are None for one value, all of them
    if any value is None (not finite)."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return dict.fromkeys(("mean", "standard_deviation", "standard_error"))
    deviation = statistics.stdev(known) if len(known) > 1 else None
    error = None if deviation is None else deviation / math.sqrt(len(known))
    return {"mean": statistics.fmean(known), "standard_deviation": deviation, "standard_error": error}
