"""The server's side of a federation: the round loop and the checks on replies."""
