"""The owner's side of a federation: its records, its plan and its replies to the server."""
