"""The published CIFAR networks, by name."""

from fastcifar.models import (
    aw_sngan,
    aw_sngan_variants,
    dcgan,
    ds_resnet,
    modify_resnet,
    resnet_cifar10,
    small_filters_cnn,
    xception,
)
from fastcifar.models.gan import GAN
from fastcifar.models.layers import backbone
from fastcifar.models.registry import count_parameters, create_model, list_models, model_options, register

register("ds_resnet", ds_resnet.ds_resnet)
register("ds_resnet_x2", ds_resnet.ds_resnet_x2)
register("small_filters_cnn", small_filters_cnn.small_filters_cnn)
register("modify_resnet", modify_resnet.modify_resnet)
register("resnet_cifar10", resnet_cifar10.resnet_cifar10)
register("xception", xception.xception)
register("dcgan", dcgan.dcgan, gan=True)
register("aw_sngan", aw_sngan.aw_sngan, gan=True)
register("aw_sngan_res", aw_sngan_variants.aw_sngan_res, gan=True)
register("aw_sngan_light", aw_sngan_variants.aw_sngan_light, gan=True)

__all__ = ["GAN", "backbone", "count_parameters", "create_model", "list_models", "model_options", "register"]
