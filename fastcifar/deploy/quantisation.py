"""Networks in 8-bit integers for ONNX Runtime, their ranges taken from training images."""

from __future__ import annotations

import pathlib
import tempfile

import numpy

from fastcifar import validation

_BATCH = 100


def quantise(source: pathlib.Path, target: pathlib.Path, images: numpy.ndarray) -> None:
    """Writes an 8-bit copy of an ONNX file: unsigned values, signed weights with a scale for each channel.

    Of ONNX Runtime's kinds this is the fastest on x86 with VNNI; older processors add up such products in 16 bits and
    may overflow: measure the accuracy where the network will run.

    Args:
        source: an ONNX file of `deploy.programs.write` with one input.
        target: of the copy.
        images: float32 [N, 3, H, W], what the ranges of all values are taken from.

    Raises:
        ValueError: a package is missing.

    Source: Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference,
    2018.
    """
    validation.require("compress", "onnx", "onnxruntime")
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.parts = iter(range(0, len(images), _BATCH))

        def get_next(self):
            begin = next(self.parts, None)
            return None if begin is None else {"images": images[begin : begin + _BATCH]}

    with tempfile.TemporaryDirectory() as folder:
        prepared = pathlib.Path(folder) / "prepared.onnx"
        quantization.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared), str(target), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
