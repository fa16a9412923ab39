"""Array aliases and value ranges, written once.

Images in the pipeline and at the ends of the autoencoder are float32 in [-1, 1]: -1 is the lower end of the
modality's window (see `modality.Modality.window`), +1 the upper. Latents z have unit variance over the training data:
the latent scale is applied inside `model.encode` and `model.decode` and nowhere else.

Dimensions: b batch, h w pixels or latent positions, c channels, n tokens, m guide tokens, d width of the shared space,
k attention heads, v vocabulary.
"""

from typing import Any

from jax import Array
from jaxtyping import Float, Int

Image = Float[Array, "b h w 1"]  # one grey image a row, in [-1, 1]
Latent = Float[Array, "b ..."]  # (b h w c) of an image, (b d) of a text
Times = Int[Array, "b"] | Float[Array, "b"]  # noise level, 0 (clean) .. 999
Tokens = Float[Array, "b n d"]
Ids = Int[Array, "b n"]
Params = dict[str, Any]  # flat: "ct/unet/down_1/attn_0/guide/q/kernel" -> array (or its abstract value)
