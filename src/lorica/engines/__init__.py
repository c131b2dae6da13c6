"""Engines move messages between the server and the clients. They contain no learning code."""
