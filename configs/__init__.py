"""Experiments as Python files; base.py holds every key."""

from popi_jax.errors import UserError


def check_arg(arg: str, name: str, *choices: str) -> None:
    """Refuses an unknown argument, which is what follows the colon in --config=configs/NAME.py:ARG.

    Args:
        arg: the argument; "" is none and always allowed.
        name: the config's file name, without .py.
        choices: the arguments that the config takes.

    Raises:
        UserError: one line with the config, the argument and the choices.
    """
    if arg and arg not in choices:
        remedy = f"use {', '.join(choices)}, or leave it out" if choices else "leave it out"
        raise UserError(f"configs/{name}.py: the argument {arg!r} is unknown; {remedy}")
