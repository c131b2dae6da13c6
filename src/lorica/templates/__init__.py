"""Templates of packages that Lorica creates for its users."""
