"""One file a stage or round, for `--config=`; installed as medm2g_jax.configs, which needs this file (editable too)."""
