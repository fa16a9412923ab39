"""Packaging. Ranges here, the exact versions that are tested in requirements.txt and requirements-dev.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'^__version__ = "(.+)"$', Path("medm2g_jax/__init__.py").read_text(), re.M).group(1)

setup(
    name="medm2g-jax",
    version=VERSION,
    description="MedM2G (CVPR 2024) in JAX: medical text, CT, MRI and X-ray aligned and generated, any to any",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # configs/ stands at the top of the repository, where `--config=configs/text_ct.py` finds it; installed, it is a
    # part of the package.
    packages=[*find_packages(include=["medm2g_jax", "medm2g_jax.*"]), "medm2g_jax.configs"],
    package_dir={"medm2g_jax.configs": "configs"},
    package_data={"medm2g_jax": ["models/*/*", "models/*/tokenizers/*", "models/*/tokenizers/*/*"]},
    entry_points={"console_scripts": ["medm2g = medm2g_jax.cli:main"]},
    install_requires=[
        "absl-py>=2.1",
        "clu>=0.0.12",
        "diffusers>=0.42",
        "etils[epath]>=1.9.1",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "jax>=0.10.2",
        "jaxtyping>=0.3.11",
        "ml_collections>=1.1",
        "ml_dtypes>=0.5",
        "nibabel>=5.3",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=12.0,<13",  # gradio (extra demo) asks for less than 13
        "protobuf>=5.28.3",
        "pydicom>=3.0.1",
        "safetensors>=0.8",
        "scipy>=1.14",
        "tensorboardX>=2.6.5",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.23.1",
        "transformers>=5.23",
    ],
    extras_require={
        "convert": ["torch>=2.13"],
        # Decoders of compressed DICOM that pydicom does not bring; pylibjpeg-libjpeg, for JPEG, is under the GPL.
        "dicom": ["pyjpegls>=1.4", "pylibjpeg>=2.0", "pylibjpeg-libjpeg>=2.3", "pylibjpeg-openjpeg>=2.4"],
        "itk": ["SimpleITK>=2.4"],
        "parquet": ["pyarrow>=21.0"],  # of `medm2g embed`
        "demo": ["gradio>=6.31"],
        "tpu": ["gcsfs", "jax[tpu]"],
        "cuda": ["jax[cuda13]"],
    },
)
