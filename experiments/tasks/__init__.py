"""One file a task; each turns one data source into batches, a loss and metrics. Found by its name."""
