"""Packages that Lorica writes for its users."""
