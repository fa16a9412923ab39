"""`python -m medm2g_jax VERB`: the same as the console script `medm2g VERB`."""

from medm2g_jax.cli import main

main()
