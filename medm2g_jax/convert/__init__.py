"""Published weights in: `medm2g convert` (section 4: the paper starts from SD-1.5, CLIP, Versatile Diffusion).

    files             tensors of a file or folder, one at a time, and the folder that a conversion writes
    fields            what the config.json files beside weights say: taken, equal to ours, or refused by name
    rules             the two-way table engine: every key consumed exactly once, or an error that lists what is wrong
    unet, stable_diffusion, clip, optimus     tables and sources
    prompt_in         what lets Stable Diffusion read prompts of the shared space
    weights           a converted folder -> parameters of a group, placed on a mesh

The way back out is `medm2g_jax.export`.
"""
