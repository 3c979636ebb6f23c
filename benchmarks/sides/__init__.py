"""The sides of a comparison. Each module needs packages that the others' environments lack; see worker.py."""
