"""From a run folder to tables, plots, an HTML page and a model card. Reads files; knows no other part of Lorica."""
