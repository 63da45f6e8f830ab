"""GPUs that a run can be planned for, by their makers' figures. No torch: the command line names them."""

from dataclasses import dataclass

NODE = 8  # GPUs of a node: DGX and HGX A100, H100 and H200
GIB = 2**30
ROOM = 0.08  # of a GPU's memory left for pictures made there, a copy of the weights while they are scored, and others


@dataclass(frozen=True)
class Device:
    """What one GPU of a node can do at best; bytes a second to others are those of one direction."""

    title: str
    memory: int  # bytes that PyTorch finds on it
    bfloat16: float  # FLOP/s of matrix products, dense
    float32: float  # FLOP/s, TF32 left out, which PyTorch does not use of itself
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to the other GPUs of its node
    network: float  # bytes/s to other nodes, by a network card of its own


# NVIDIA's datasheets, "A100 80GB", "H100 Tensor Core GPU" and "H200 Tensor Core GPU", columns SXM: they give matrix
# products with sparsity, twice as many, and NVLink's both directions together (600, 900 and 900 GB/s). Network cards:
# one of 200 Gb/s a GPU (datasheet "DGX A100"), one of 400 Gb/s (datasheets "DGX H100" and "DGX H200").
# Memory is less than on the datasheet (80, 80 and 141 GB): what `torch.cuda.get_device_properties` says, rounded down.
DEVICES = {
    "h100": Device("H100 SXM", 79 * GIB, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200": Device("H200 SXM", 139 * GIB, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    "a100": Device("A100 SXM 80 GB", 79 * GIB, 312e12, 19.5e12, 2.039e12, 300e9, 25e9),
}
