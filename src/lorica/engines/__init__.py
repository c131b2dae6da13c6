"""Engines move messages between server and clients; they know no learning."""
