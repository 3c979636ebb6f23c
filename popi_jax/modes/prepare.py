"""--mode=prepare: prepares the data of a config without its model, for example before a TPU slice is rented."""

import pathlib

from popi_jax.config import Config
from popi_jax.data import card, files, prepared
from popi_jax.modes import signals


def prepare(config: Config, workdir: pathlib.Path) -> None:
    """Prepares the data in data.prepared_dir, or else <workdir>/data, and writes <workdir>/data_card.json.

    A run with the same data settings finds them there. If it is killed, the same command goes on with the parts that
    are not finished.

    Raises:
        UserError: the data have a mistake; then nothing is left in the workdir.
    """
    files.check_folder(workdir, "--workdir")
    signals.say(lambda: f"{workdir} has the parts that are finished")
    found = prepared.find(config.data, workdir)
    prepared.stored(found)
    card.write(workdir, found.card)
    print(f"{found.folder}\n{workdir / 'data_card.json'}")
