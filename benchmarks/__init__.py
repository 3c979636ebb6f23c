"""popi_jax and what a user would take instead, side by side on the same rows. Nothing is imported here: the peers'
environment has no JAX.
"""
