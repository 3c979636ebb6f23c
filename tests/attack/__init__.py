"""Attacks on whole runs: kills, damaged files, a full disk. `make attack` runs them; they take about an hour."""
