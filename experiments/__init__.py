"""Programs around the seqboat library: training, evaluation, data."""
