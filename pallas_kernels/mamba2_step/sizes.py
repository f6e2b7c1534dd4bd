"""How the input projection of Mamba-2 is laid out: [z | x | B | C | dt]."""

from typing import NamedTuple

from jax import Array


class Sizes(NamedTuple):
    """Widths by axis letter; inner = h p."""

    heads: int
    head_dim: int
    groups: int
    state: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution: [x | B | C]."""
        return self.inner + 2 * self.groups * self.state

    @property
    def projected(self) -> int:
        return self.inner + self.channels + self.heads

    def split(self, zxbcdt: Array) -> tuple[Array, Array, Array]:
        """[b e] -> z [b h*p], [x | B | C] [b c], dt [b h]."""
        return zxbcdt[:, : self.inner], zxbcdt[:, self.inner : -self.heads], zxbcdt[:, -self.heads :]

    def split_channels(self, xBC: Array) -> tuple[Array, Array, Array]:
        """[b c] -> x [b h p], B, C [b g n]."""
        batch, grouped = xBC.shape[0], self.groups * self.state
        x, B, C = xBC[:, : self.inner], xBC[:, self.inner : -grouped], xBC[:, -grouped:]
        grouped_shape = (batch, self.groups, self.state)
        return x.reshape(batch, self.heads, self.head_dim), B.reshape(grouped_shape), C.reshape(grouped_shape)


def split_sizes(ssm_state, conv_weight) -> Sizes:
    """The sizes that a state [.. b h p n] and convolution weights [c w] belong to. ValueError where there are none."""
    heads, head_dim, state = ssm_state.shape[-3:]
    channels = conv_weight.shape[0]
    groups, rest = divmod(channels - heads * head_dim, 2 * state)
    if rest or groups < 1 or heads % groups:
        raise ValueError(
            f"conv_weight: got {channels} channels, expected h*p + 2*g*n = {heads * head_dim} + {2 * state}*g "
            f"for groups g that divide {heads} heads"
        )
    return Sizes(heads, head_dim, groups, state)
