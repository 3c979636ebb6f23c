"""Installs popi_jax: `pip install -e .`, or `make setup` for the pinned environment of constraints/."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "popi_jax" / "__init__.py").read_text()).group(1)

# Flax follows JAX's internals closely: 0.12.8 fails at import on jax 0.11, 0.12.12 needs it and Python 3.12.
JAX = [
    'jax==0.10.2; python_version < "3.12"',
    'flax==0.12.8; python_version < "3.12"',
    'jax>=0.11.1; python_version >= "3.12"',
    'flax>=0.12.12; python_version >= "3.12"',
]

DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings-python>=2.0,<3"]

setuptools.setup(
    name="popi_jax",
    version=VERSION,
    description="POPI in JAX: personalizing language models through optimized natural-language preference summaries",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "."},  # An editable install puts the root on the path, so that scripts find benchmarks/.
    # popi_jax/configs is a link to configs/, so that a wheel has them.
    packages=setuptools.find_packages(include=["popi_jax", "popi_jax.*"]),
    package_data={"popi_jax": ["py.typed", "assets/*", "assets/*/*", "assets/*/*/*", "configs/shapes/*"]},
    entry_points={"console_scripts": ["popi = popi_jax.main:popi"]},
    install_requires=[
        *JAX,
        "absl-py>=2.1",
        "array_record>=0.8",
        "etils[epath]>=1.9",
        "filelock>=3.16",  # JAX's limit on the folder of compiled programs needs it, and does not require it by itself.
        "gguf>=0.17",
        "google-crc32c>=1.6",  # Checksums of checkpoints.
        "grain>=0.2.18",
        "huggingface_hub>=1.0",
        "jinja2>=3.1",  # Chat templates; transformers does not require it by itself.
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12.8",
        "pyarrow>=17",  # Reads published data sets.
        "rich>=13.9",
        "safetensors>=0.6",
        "tensorboardX>=2.6.4",
        "tensorflow-datasets>=4.9.10",  # Prepares data sets; TensorFlow itself is never imported.
        "tokenizers>=0.22",
        "transformers>=5.0",
    ],
    extras_require={
        "test": [
            "chex>=0.1.90",
            "hypothesis",
            "ipykernel",
            "mypy",
            "nbclient",
            "pytest",
            "pytest-xdist",
            "ruff",
            'libtpu==0.0.52; python_version < "3.12"',
            *DOCS,
        ],
        "docs": [*DOCS, "ruff"],  # ruff formats the signatures.
        "compile": ["libtpu"],  # The TPU compiler, for --mode=compile on a machine without a TPU.
        "torch": ["torch==2.13.0", "peft>=0.18"],  # Parity tests only.
        "gpu": ['jax[cuda12]==0.10.2; python_version < "3.12"', 'jax[cuda12]>=0.11.1; python_version >= "3.12"'],
        "tpu": ['jax[tpu]==0.10.2; python_version < "3.12"', 'jax[tpu]>=0.11.1; python_version >= "3.12"'],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
