"""The page of `experiments.report`: its measurements, pictures and HTML."""
