"""MedM2G in JAX: align, extract and generate medical text, CT, MRI and X-ray, any to any (CVPR 2024, 2403.04290).

    import medm2g_jax
    model = medm2g_jax.load("runs/phantom-tiny")
    out = model.generate(given={"text": "findings : ..."}, make=["ct"])
    out.samples["ct"]                                  # float32 (n h w), HU

Synthetic output. Not for clinical use.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    # Public names are imported on first use: `import medm2g_jax` alone starts neither JAX nor a device.
    if name == "load":
        from medm2g_jax.loading import load

        return load
    if name == "translate":
        from medm2g_jax.volumes import translate

        return translate
    if name in ("MODALITIES", "Modality", "register"):
        from medm2g_jax import modality

        return getattr(modality, name)
    if name == "MedM2G":
        from medm2g_jax.model import MedM2G

        return MedM2G
    raise AttributeError(f"module 'medm2g_jax' has no attribute {name!r}")
