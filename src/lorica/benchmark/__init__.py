"""A benchmark: methods tuned alike and compared over settings and seeds, from one file with one command."""
