"""From a run folder to tables, plots, an HTML page and a model card. Reads files; knows nothing of training."""
