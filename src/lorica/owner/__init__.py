"""An owner's side: its records, its plan, its answers to the server."""
