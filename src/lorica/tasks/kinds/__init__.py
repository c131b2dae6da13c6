"""The kinds of task, one a file: each says what it reads, learns and measures, and names the pieces that do it."""
