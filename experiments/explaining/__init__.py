"""The page on why a trained run attends: its router's decisions by the features of dictionaries."""
