"""The tables of keys as a page: `python -m ml_mamba_jax.convert.keys > docs/keys.md`."""

import numpy as np
from flax.traverse_util import flatten_dict

from ml_mamba_jax.config import VISION_ENCODERS, MLMambaConfig
from ml_mamba_jax.convert import report, tables
from ml_mamba_jax.convert.pieces import Piece, by_key, torch_shape
from ml_mamba_jax.model import MLMamba

HEAD = """\
# Keys

Which tensor of PyTorch is which parameter here, written by the code that converts them
(`python -m ml_mamba_jax.convert.keys > docs/keys.md`). `{i}` is a layer; an index behind a parameter says which part of it the
tensor fills: a layer, a scan direction, rows or columns. *transposed* turns `[out in]` into `[in out]`; *depthwise* drops the axis
of size one; *patches* flattens a patch in the order row, column, channel; *added* adds to what another tensor has put there; *tied*
tensors must equal the parameter and may be absent; *of [..]* takes a part of the tensor. Layers behind the second-to-last block of
an encoder, its final norm and its heads are not needed.
"""


def sections() -> list[tuple[str, MLMambaConfig, list[Piece]]]:
    """Title, model and table of every form."""
    big = MLMambaConfig.named("ml-mamba-3b")
    dinov2, siglip = big.vision
    clip = VISION_ENCODERS["clip-vit-b"]

    def alone(encoder):
        return MLMambaConfig(language=None, vision=(encoder,))

    small = MLMambaConfig.named("mamba2-130m")
    csm, ldpnet = MLMambaConfig.named("ml-mamba-3b-csm"), MLMambaConfig.named("ml-mamba-3b-ldpnet")
    return [
        ("mamba2: state-spaces/mamba (mamba2-130m)", small, tables.mamba2(small.language)),
        (
            "hf-mamba2: Mamba2ForCausalLM of transformers (the same size)",
            small,
            tables.mamba2(small.language, embedding="embeddings"),
        ),
        ("ml-mamba: a run of ML-Mamba (ml-mamba-3b)", big, tables.ml_mamba(big)),
        ("The cross scan has two more directions (ml-mamba-3b-csm, connector)", csm, tables.connector(csm.connector)),
        (
            "fused-ldpnet has a convolution (ml-mamba-3b-ldpnet, projector)",
            ldpnet,
            [piece for piece in tables.connector(ldpnet.connector) if "projector" in piece.key],
        ),
        ("timm-vit: DINOv2 with registers", alone(dinov2), tables.timm_vit(dinov2)),
        ("timm-vit: SigLIP", alone(siglip), tables.timm_vit(siglip)),
        ("timm-vit: CLIP", alone(clip), tables.timm_vit(clip)),
        ("hf-dinov2: Dinov2WithRegistersModel", alone(dinov2), tables.hf_dinov2(dinov2)),
        ("hf-siglip: SiglipVisionModel", alone(siglip), tables.hf_clip_or_siglip(siglip)),
        ("hf-clip: CLIPVisionModel", alone(clip), tables.hf_clip_or_siglip(clip)),
    ]


def page() -> str:
    parts = [HEAD]
    for title, config, pieces in sections():
        shapes = {path: a.shape for path, a in flatten_dict(MLMamba(config).param_shapes(), sep="/").items()}
        rows = (
            (key, torch_shape(own, {piece.path: shapes[piece.path] for piece in own}), np.dtype(np.float32), own)
            for key, own in by_key(pieces).items()
        )
        parts.append(f"## {title}\n\n```text\n{report.tensors(rows, with_dtype=False)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
