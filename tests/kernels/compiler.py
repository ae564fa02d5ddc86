"""Compiles Triton kernels for GPUs that are not there, down to machine code."""

import torch
from torch import Tensor

NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


class Compiled:
    """Stands in for a kernel: what would be launched is compiled instead.

    Args:
        kernel: The kernel.
        capability: Of the GPU, as 80 for 8.0.
    """

    def __init__(self, kernel, capability: int) -> None:
        self.kernel, self.capability = kernel, capability
        self.results: list = []

    def __getitem__(self, grid):
        assert all(size > 0 for size in grid)
        return self.compile

    def compile(self, *args, **options):
        """Compile for the types of these arguments and, as Triton does, for what is divisible by 16."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        arguments = dict(zip(names, args, strict=False)) | {
            name: options.pop(name) for name in list(options) if name in names
        }
        assert list(arguments) == names
        signature, constants, attributes = {}, {}, {}
        for place, (name, value) in enumerate(arguments.items()):
            if isinstance(value, Tensor):
                signature[name] = "*" + NAMES[value.dtype]
            elif isinstance(value, int) and not self.kernel.params[place].is_constexpr:
                signature[name] = "i32" if value < 2**31 else "i64"
            else:
                signature[name], constants[(place,)] = "constexpr", value
                continue
            if isinstance(value, Tensor) or value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        self.results.append(triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options))
