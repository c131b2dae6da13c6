"""The server's side: the round loop, and what it accepts as a reply."""
