"""One file per task, found by its name; each turns a data source into batches, a loss and metrics."""
