"""Axis letters of every shape in this library, and the array types built from them.

b batch, m images of a row, l tokens, d model width, h heads, p head width, n state size, g groups, k scan directions,
w convolution width, l_all visual tokens and text together, c channels, v vocabulary, y x image or grid rows and columns.
`layers` is spelled out. Paper capitals (A, B, C, D) appear only inside mixers and kernels.
"""

from jax import Array
from jaxtyping import Bool, Float, Int, UInt8

Tokens = Int[Array, "b l"]
"""Token ids."""
Hidden = Float[Array, "b l d"]
"""Activations of the language model's width."""
LastLogits = Float[Array, "b v"]
"""Unnormalised log probabilities of one token per row over the padded vocabulary, float32."""
Pixels = Float[Array, "b _ _ 3"] | UInt8[Array, "b _ _ 3"]
"""RGB images [b y x 3], of another size for each encoder: uint8, or float that is already normalised for its encoder."""
Images = Pixels | dict[str, Pixels]
"""One picture for all encoders (uint8 only), or one for each encoder by its name."""
_RowPixels = Float[Array, "b m _ _ 3"] | UInt8[Array, "b m _ _ 3"]
RowImages = _RowPixels | dict[str, _RowPixels]
"""The same where a row has several images."""
ImageStarts = Int[Array, "b m"]
"""Where in its row the visual tokens of each image begin, negative for none."""
SegmentIds = Int[Array, "b l"]
"""Sequence of each token, negative for padding (see `pallas_kernels.segments`)."""
RowMask = Bool[Array, "b"]
