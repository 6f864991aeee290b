"""Encoders and decoders of feature maps; encoders are chosen by MODEL.BACKBONE.NAME."""

from nuclei_d2.modeling.backbone.unet import UNetDecoder, UNetEncoder, build_unet_encoder

__all__ = ["UNetDecoder", "UNetEncoder", "build_unet_encoder"]
