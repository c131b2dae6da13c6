"""One run: prepared, conducted round by round, kept in a folder, resumed."""
