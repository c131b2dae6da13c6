"""One run: prepare it, run its rounds, write its folder, resume it."""
