"""A federation over Flower: a `ServerApp` for the server, a `ClientApp` for each owner's node."""
