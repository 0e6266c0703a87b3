"""TensorRT's published list of ONNX operators, as data.

Source: onnx-tensorrt, docs/operators.md for TensorRT 10.15 ("opset 9 to opset 24"). An operator that is in
no list here is one that TensorRT's parser does not know.
"""

from __future__ import annotations

SOURCE = "onnx-tensorrt docs/operators.md, TensorRT 10.15, opsets 9 to 24"

_ALL = "FP32 FP16 BF16"
_NUMBERS = f"{_ALL} INT32 INT64"
_ANY = f"{_NUMBERS} BOOL"

SUPPORTED: dict[str, str] = {
    **dict.fromkeys(
        ["Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "AveragePool", "BatchNormalization", "Ceil", "Celu", "Clip", "Conv", "ConvTranspose", "Cos", "Cosh", "CumSum", "Dropout", "Einsum", "Elu", "Erf", "Exp", "Floor", "GRU", "Gemm", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "GroupNormalization", "HardSigmoid", "HardSwish", "Hardmax", "InstanceNormalization", "IsInf", "LRN", "LSTM", "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "LpNormalization", "LpPool", "MatMul", "MaxPool", "MeanVarianceNormalization", "PRelu", "QuantizeLinear", "RMSNormalization", "RNN", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Reciprocal", "Resize", "RotaryEmbedding", "Round", "Scan", "Selu", "Sigmoid", "Sin", "Sinh", "Softmax", "Softplus", "Softsign", "Sqrt", "Tan", "Tanh", "ThresholdedRelu", "Upsample"], _ALL),
    **dict.fromkeys(
        ["Abs", "Add", "ArgMax", "ArgMin", "DepthToSpace", "Div", "Equal", "Greater", "GreaterOrEqual", "IsNaN", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "Pad", "Pow", "Range", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Scatter", "ScatterElements", "ScatterND", "Shrink", "Sign", "SpaceToDepth", "Sub", "Sum", "TopK"], _NUMBERS),
    **dict.fromkeys(
        ["Cast", "CastLike", "Concat", "Constant", "ConstantOfShape", "Expand", "EyeLike", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "If", "Loop", "OneHot", "Reshape", "ReverseSequence", "Shape", "Size", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where"], _ANY),
    "And": "BOOL", "Or": "BOOL", "Not": "BOOL", "Xor": "BOOL",
    "Attention": "FP32 FP16 BF16", "Gelu": f"{_ALL} INT32 INT64", "DequantizeLinear": "INT8 FP8",
    **dict.fromkeys(["BlackmanWindow", "HammingWindow", "HannWindow", "DeformConv", "GridSample", "Mish", "NonMaxSuppression", "NonZero", "RoiAlign"], "FP32 FP16"),
    "STFT": "FP32", "TensorScatter": "FP32 FP16 BF16 INT32",
}  # fmt: skip

RESTRICTIONS: dict[str, str] = {
    "Attention": "Q, K, V and the mask have 4 dimensions; no past_key, softcap or qk_matmul_output",
    "CumSum": "the axis is a constant of the graph",
    "EyeLike": "the input's size is static",
    "LayerNormalization": "the first output alone",
    "Loop": "what is scanned has no dynamic length",
    "NonZero": "the output's size depends on data",
    "ScatterND": "reduction `none` alone",
    "ScatterElements": "a reduction needs TensorRT's plugin",
    "TopK": "K below 3840",
}

SINCE: dict[str, str] = {
    "Attention": "10.14",
    "RMSNormalization": "10.15",
    "RotaryEmbedding": "10.15",
}
