"""Audits: attacks on what leaves an owner, with lower bounds on ε, and exact tests of what the mechanism promises."""
