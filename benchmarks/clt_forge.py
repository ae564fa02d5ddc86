"""The activation cache of CLT-Forge, restated from its description, to compare with.

Codes: per layer and file one scale, the largest magnitude over all tokens and channels divided by 127 (7, 1); codes
packed, zstd level 3 over the whole tensor, scales in float32. Loading: one thread reads and decompresses a whole file,
makes float32 of it with numpy, multiplies, casts to bfloat16; a data loader without workers then picks the tokens of a
shuffled buffer one by one and stacks them.
"""

import json
from pathlib import Path

import numpy as np
import torch
import zstandard

LIMITS = {"int8": 127, "int4": 7, "int2": 1}


def quantise(x: np.ndarray, bits: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of activations [token layer d_model]."""
    scales = np.abs(x).max(axis=(0, 2)) / LIMITS[bits]
    scales = np.where(scales > 0, scales, 1.0).astype(np.float32)
    return np.clip(np.rint(x / scales[None, :, None]), -LIMITS[bits], LIMITS[bits]).astype(np.int8), scales


def pack(codes: np.ndarray, bits: str) -> bytes:
    """Two or four codes a byte."""
    if bits == "int8":
        return codes.tobytes()
    count = 2 if bits == "int4" else 4
    shifted = (codes.astype(np.int16) + LIMITS[bits]).astype(np.uint8).reshape(-1, count)
    packed = np.zeros(len(shifted), np.uint8)
    for index in range(count):
        packed |= shifted[:, index] << (8 // count * index)
    return packed.tobytes()


def unpack(data: bytes, bits: str) -> np.ndarray:
    """Codes of `pack`."""
    if bits == "int8":
        return np.frombuffer(data, np.int8)
    count = 2 if bits == "int4" else 4
    packed = np.frombuffer(data, np.uint8)
    width = 8 // count
    parts = [(packed >> (width * index)) & (2**width - 1) for index in range(count)]
    return np.stack(parts, axis=1).reshape(-1).astype(np.int8) - LIMITS[bits]


def save(path: Path, values: dict[str, torch.Tensor], bits: str) -> int:
    """Write a split; returns its bytes."""
    header, frames = {}, []
    for name, x in values.items():
        codes, scales = quantise(x.numpy(), bits)
        frame = zstandard.ZstdCompressor(level=3).compress(pack(codes, bits))
        header[name] = {"shape": x.shape, "bytes": len(frame), "scales": scales.tolist()}
        frames.append(frame)
    text = json.dumps({"bits": bits, "tensors": header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(frames))
    return path.stat().st_size


def load(path: Path) -> dict[str, torch.Tensor]:
    """Read a split whole."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, at, loaded = json.loads(data[8 : 8 + length]), 8 + length, {}
    for name, entry in header["tensors"].items():
        body = zstandard.ZstdDecompressor().decompress(data[at : at + entry["bytes"]])
        at += entry["bytes"]
        codes = unpack(body, header["bits"]).astype(np.float32).reshape(entry["shape"])
        codes *= np.asarray(entry["scales"], np.float32)[None, :, None]
        loaded[name] = torch.from_numpy(codes).to(torch.bfloat16)
    return loaded


def batches(buffer: dict[str, torch.Tensor], batch: int, seed: int) -> int:
    """Serve a loaded split in shuffled batches, token by token; returns how many tokens."""
    order = torch.randperm(len(buffer["inputs"]), generator=torch.Generator().manual_seed(seed)).tolist()
    served = 0
    for start in range(0, len(order) - batch + 1, batch):
        items = [(buffer["inputs"][index], buffer["outputs"][index]) for index in order[start : start + batch]]
        inputs, outputs = torch.stack([item[0] for item in items]), torch.stack([item[1] for item in items])
        served += len(inputs) if outputs is not None else 0
    return served
