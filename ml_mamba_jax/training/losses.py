"""Next-token cross entropy over the tokens a conversation wants learnt."""

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.training.stages import join


def target_losses(model: MLMamba, params: dict, batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum of the cross entropies of all target tokens of a `Batch`, and their number, both float32.

    Sums, so that micro-batches and devices with different numbers of targets add up to the mean over tokens. Token t is predicted
    where token t - 1 was read, the first one at the last visual token; in a row without an image it is never a target. Padding
    stands to the right of all targets and cannot reach them in a causal model.
    """
    variables = {"params": params}
    if batch.segment_ids is not None:
        return _packed_losses(model, variables, batch)
    images = {"images": batch.images, "image_mask": batch.image_mask} if batch.images else {}
    hidden = model.apply(variables, batch.tokens, **images, method="hidden")
    length, first = batch.tokens.shape[1], 0 if images else 1
    logits = model.apply(variables, hidden[:, first - length - 1 : -1], method="logits")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, first:])
    is_target = batch.is_target
    if images and batch.image_mask is not None:
        is_target = is_target & (batch.image_mask[:, None] | (jnp.arange(length) > 0)[None])
    weights = is_target[:, first:].astype(jnp.float32)
    return jnp.sum(losses * weights), jnp.sum(weights)


def _packed_losses(model: MLMamba, variables: dict, batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The same of rows that hold several sequences, with the visual tokens in their places: each is predicted by the position
    before it, if that is of its sequence."""
    images = {"images": batch.images, "image_starts": batch.image_starts} if batch.images else {}
    hidden = model.apply(variables, batch.tokens, segment_ids=batch.segment_ids, **images, method="hidden")
    logits = model.apply(variables, hidden[:, :-1], method="logits")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
    follows = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    weights = (batch.is_target[:, 1:] & follows).astype(jnp.float32)
    return jnp.sum(losses * weights), jnp.sum(weights)


def mean_loss_and_gradient(model: MLMamba, params: dict, batch, micro_batches: int = 1, frozen: dict | None = None):
    """The mean loss over the target tokens of the batch, its gradient by `params`, and the number of targets.

    `frozen` are the parameters of the model that are not among `params`: nothing is computed for a gradient by them.

    With `micro_batches` > 1 the rows are taken in that many parts one after the other, in the memory of one: the result is that of
    the whole batch, whatever the number of targets in each part.
    """

    def loss_sum(params, part):
        return target_losses(model, join(params, frozen or {}), part)

    if micro_batches == 1:
        (loss, count), gradient = jax.value_and_grad(loss_sum, has_aux=True)(params, batch)
    else:
        # Rows are dealt out like cards, so that each part is spread over the devices as the batch is.
        parts = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, micro_batches, *a.shape[1:]), 0, 1), batch)

        def add(total, part):
            (loss, count), gradient = jax.value_and_grad(loss_sum, has_aux=True)(params, part)
            return jax.tree.map(jnp.add, total, (loss, count, gradient)), None

        zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (loss, count, gradient), _ = jax.lax.scan(add, zero, parts)
    count = jnp.maximum(count, 1)
    return loss / count, jax.tree.map(lambda g: g / count, gradient), count
