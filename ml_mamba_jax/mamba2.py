"""The Mamba-2 language model (arXiv 2405.21060): mixer, residual block, embedding and head."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

import pallas_kernels as pk
from ml_mamba_jax.config import Mamba2Config, MixerConfig
from ml_mamba_jax.layers import LowRankDense, Remat, dense, rms_norm, stack_layers, uniform_fan_in, with_axes
from ml_mamba_jax.state import MambaState
from ml_mamba_jax.typing import Hidden, SegmentIds, Tokens

LoRA = tuple[int, float] | None
"""Rank and scale of an addition to a kernel, see `ml_mamba_jax.layers.LowRankDense`."""


class ScanParameters(NamedTuple):
    """The parameters of a mixer's scan; with directions each has a leading axis k."""

    conv_weight: Float[Array, "*k c w"]
    conv_bias: Float[Array, "*k c"]
    dt_bias: Float[Array, "*k h"]
    A_log: Float[Array, "*k h"]
    D: Float[Array, "*k h"]


def declare_scan_parameters(module: nn.Module, config: MixerConfig, directions: int | None = None) -> ScanParameters:
    """Declare the scan parameters on `module`, one set or one for each direction."""
    lead, lead_axes = ((), ()) if directions is None else ((directions,), ("directions",))
    channels, heads = (*lead, config.conv_channels), (*lead, config.n_heads)
    conv_init = _uniform(config.d_conv**-0.5)  # a depthwise filter sees d_conv inputs
    return ScanParameters(
        conv_weight=module.param(
            "conv_weight", with_axes(conv_init, *lead_axes, "conv_channels", None), (*channels, config.d_conv)
        ),
        conv_bias=module.param("conv_bias", with_axes(conv_init, *lead_axes, "conv_channels"), channels),
        dt_bias=module.param("dt_bias", with_axes(_dt_bias_init(config), *lead_axes, "heads"), heads),
        A_log=module.param("A_log", with_axes(_A_log_init(config), *lead_axes, "heads"), heads),
        D=module.param("D", with_axes(nn.initializers.ones, *lead_axes, "heads"), heads),
    )


def in_projection(config: MixerConfig, dtype: jnp.dtype, lora: LoRA = None) -> nn.Module:
    return _projection("in_proj", config.in_proj_features, ("embed", "inner"), dtype, uniform_fan_in, lora)


def out_projection(config: MixerConfig, dtype: jnp.dtype, n_layers: int, lora: LoRA = None) -> nn.Module:
    """The output projection, its initial scale shrunk by the square root of the number of residual additions."""
    init = nn.initializers.variance_scaling(1 / (3 * n_layers), "fan_in", "uniform")
    return _projection("out_proj", config.d_model, ("inner", "embed"), dtype, init, lora)


def _projection(name: str, features: int, axes: tuple[str, str], dtype, kernel_init, lora: LoRA) -> nn.Module:
    if lora is None:
        return dense(features, axes, name=name, dtype=dtype, use_bias=False, kernel_init=kernel_init)
    return LowRankDense(features, axes, *lora, dtype, kernel_init, name=name)


def split_projection(zxbcdt: Float[Array, "b l e"], config: MixerConfig) -> tuple[Array, Array, Array]:
    """[z | x B C | dt] -> z [b l d_inner], xBC [b l c], dt [b l h]."""
    return tuple(jnp.split(zxbcdt, (config.d_inner, config.d_inner + config.conv_channels), axis=-1))


def split_channels(xBC: Float[Array, "*b c"], config: MixerConfig) -> tuple[Array, Array, Array]:
    """[x | B | C] -> x [.. h p], B [.. g n], C [.. g n]."""
    grouped = config.n_groups * config.d_state
    x, B, C = jnp.split(xBC, (config.d_inner, config.d_inner + grouped), axis=-1)
    lead = xBC.shape[:-1]
    return (
        x.reshape(*lead, config.n_heads, config.head_dim),
        B.reshape(*lead, config.n_groups, config.d_state),
        C.reshape(*lead, config.n_groups, config.d_state),
    )


class Mamba2Mixer(nn.Module):
    """in_proj -> causal conv + SiLU -> SSD -> gated RMS norm -> out_proj: `mamba2_sequence`, or `mamba2_step` for one token."""

    config: MixerConfig
    n_layers: int
    dtype: jnp.dtype
    lora: LoRA = None

    @nn.compact
    def __call__(
        self,
        u: Hidden,
        state: MambaState | None = None,
        segment_ids: SegmentIds | None = None,
        layer: Int[Array, ""] | None = None,
    ) -> tuple[Hidden, MambaState | None]:
        """`state` is that of all layers, this one's number is `layer`: so a loop over layers changes it in place."""
        config = self.config
        scan = declare_scan_parameters(self, config)
        norm_weight = self.param("norm_weight", with_axes(nn.initializers.ones, "inner"), (config.d_inner,))
        zxbcdt = in_projection(config, self.dtype, self.lora)(u)
        A = -jnp.exp(scan.A_log.astype(jnp.float32))
        shared = {"D": scan.D, "dt_bias": scan.dt_bias, "dt_limit": config.dt_limit}

        if state is not None and u.shape[1] == 1:
            y, *state = pk.mamba2_step(
                *state,
                zxbcdt[:, 0],
                scan.conv_weight,
                A,
                conv_bias=scan.conv_bias,
                norm_weight=norm_weight,
                norm_eps=config.norm_eps,
                norm_before_gate=config.norm_before_gate,
                layer=layer,
                active=None if segment_ids is None else segment_ids[:, 0] >= 0,
                **shared,
            )
            return out_projection(config, self.dtype, self.n_layers, self.lora)(y[:, None]), MambaState(*state)

        before = MambaState(None, None) if state is None else jax.tree.map(lambda a: a[layer], state)
        outputs = pk.mamba2_sequence(
            zxbcdt,
            scan.conv_weight,
            A,
            groups=config.n_groups,
            conv_bias=scan.conv_bias,
            norm_weight=norm_weight,
            norm_eps=config.norm_eps,
            norm_before_gate=config.norm_before_gate,
            conv_state=before.conv,
            ssm_state=before.ssm,
            segment_ids=segment_ids,
            return_states=state is not None,
            chunk_size=config.chunk_size,
            **shared,
        )
        if state is None:
            return out_projection(config, self.dtype, self.n_layers, self.lora)(outputs), None
        y, *after = outputs
        state = jax.tree.map(lambda stack, a: stack.at[layer].set(a), state, MambaState(*after))
        return out_projection(config, self.dtype, self.n_layers, self.lora)(y), state


class Mamba2Block(nn.Module):
    """residual + mixer(rms_norm(residual)). `nn.scan` over the layers carries the residual and the state of them all."""

    config: Mamba2Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, carry: tuple[Hidden, MambaState | None], layer: Int[Array, ""], segment_ids: SegmentIds | None
    ) -> tuple[tuple[Hidden, MambaState | None], None]:
        residual, state = carry
        residual = pk.keep_split(residual, "b l d")
        u = rms_norm(self.config.norm_eps, name="norm", dtype=self.dtype)(residual)
        mixer = Mamba2Mixer(self.config.mixer, self.config.n_layers, self.dtype, self.config.lora, name="mixer")
        y, state = mixer(u, state, segment_ids, layer)
        return (residual + y.astype(residual.dtype), state), None


class Mamba2(nn.Module):
    """The language model. `embed` and `logits` are separate so that visual tokens can stand before the text."""

    config: Mamba2Config
    dtype: jnp.dtype
    remat: Remat = False

    def setup(self):
        config = self.config
        rows, width = config.padded_vocab_size, config.mixer.d_model
        embedding_init = with_axes(nn.initializers.normal(config.embedding_std), "vocab", "embed")
        self.embedding = self.param("embedding", embedding_init, (rows, width))
        if not config.tie_embeddings:
            self.head = self.param("head", with_axes(uniform_fan_in, "embed", "vocab"), (width, rows))
        blocks = stack_layers(Mamba2Block, config.n_layers, remat=self.remat, in_axes=(0, nn.broadcast))
        self.blocks = blocks(config, self.dtype)
        self.norm = rms_norm(config.norm_eps, name="norm", dtype=self.dtype)

    def embed(self, tokens: Tokens) -> Hidden:
        """Token embeddings in the compute dtype. Ids outside the table give NaN, never a neighbour's row."""
        tokens = jnp.where(tokens < 0, self.embedding.shape[0], tokens)  # a negative index would count from the end
        table = pk.keep_split(self.embedding.astype(self.dtype), "c d")
        return pk.keep_split(jnp.take(table, tokens, axis=0, mode="fill"), "b l d")

    def __call__(
        self, x: Hidden, state: MambaState | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Hidden, MambaState | None]:
        """Embeddings -> normalised hidden states, and the next state where one was given."""
        residual = x.astype(jnp.float32) if self.config.residual_in_float32 else x
        layers = jnp.arange(self.config.n_layers)
        (residual, state), _ = self.blocks((residual, state), layers, segment_ids)
        return self.norm(pk.keep_split(residual, "b l d")), state

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """float32 logits over the padded vocabulary."""
        table = self.embedding.T if self.config.tie_embeddings else self.head
        table = pk.keep_split(table.astype(self.dtype), "d c")
        return jnp.matmul(hidden, table, preferred_element_type=jnp.float32)


def _uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def _dt_bias_init(config: MixerConfig, floor: float = 1e-4) -> nn.initializers.Initializer:
    """softplus(dt_bias) is log-uniform in `dt_range`."""

    def init(key, shape, dtype=jnp.float32):
        log_low, log_high = np.log(config.dt_range)
        dt = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, log_low, log_high)), floor)
        return dt + jnp.log(-jnp.expm1(-dt))

    return init


def _A_log_init(config: MixerConfig) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jnp.log(jax.random.uniform(key, shape, dtype, *config.A_range))
