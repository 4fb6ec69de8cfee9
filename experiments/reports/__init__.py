"""The page of `experiments.report`: what is measured, its pictures, the page."""
