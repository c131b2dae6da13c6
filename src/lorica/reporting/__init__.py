"""Tables, plots, HTML reports and model cards from the files of a run folder, independent of training."""
