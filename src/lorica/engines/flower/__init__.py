"""A federation over Flower: a `ServerApp` for the server, and a `ClientApp` for each owner's node."""
