"""`python -m benchmarks.gpu`, as far as a CPU can run it."""

import json
import sys

import pytest
import torch

pytest.importorskip("timm", reason="a peer that benchmarks compare with")
pytest.importorskip("vit_pytorch", reason="a peer that benchmarks compare with")

from benchmarks import gpu
from benchmarks.harness import Timing


def test_the_tiny_run_measures_all_contenders_and_writes_what_it_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--rounds", "2", "--folder", str(tmp_path)])
    gpu.main()
    found = json.loads((tmp_path / "gpu-tiny.json").read_text())["tables"]["tiny"]
    assert not found["lost"]
    assert len(found["rounds"]) == len(found["contenders"]) == 3
    assert all(len(rounds) == 2 and all(one["images"] == 24 for one in rounds) for rounds in found["rounds"].values())
    pairs = zip(found["rounds"][gpu.OURS_EAGER], found["ceiling_tflops"], strict=True)
    shares = [one["images_per_s"] * found["flops_an_image"] / 1e12 / most for one, most in pairs]
    assert found["contenders"][gpu.OURS_EAGER]["share_of_ceiling"] == pytest.approx(sum(shares) / 2)


def test_flops_are_those_of_the_products():
    patches, corrupted, d, colours, depth = 16, 8, 64, 512, 2
    tokens = patches + 1
    stem, head = patches * (3 * 8 * 8) * d, corrupted * d * colours
    block = tokens * 12 * d * d + 2 * tokens * tokens * d
    # The last block gives outputs at the corrupted patches alone: keys and values of all tokens, the rest of those.
    last = (2 * tokens + 10 * corrupted) * d * d + 2 * corrupted * tokens * d
    # Backward is forward twice, but for the images, which want no gradient.
    assert gpu.flops(gpu.TINY["tiny"]) == 2 * (2 * stem + 3 * (depth - 1) * block + 3 * last + 3 * head)


def test_a_batch_that_does_not_fit_is_halved():
    def prepare(batch):
        if batch > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: Timing(batch, 1.0)

    assert gpu.warmed(prepare, 8, "cpu").batch == 2


@pytest.mark.parametrize(
    ("kernel", "group"),
    {
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNT": "products",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>": "products",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>": "attention",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
        "triton_poi_fused_gelu_3": "compiled",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>": "optimizer",
        "Memcpy HtoD (Pageable -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<4, ...>": "other",
    }.items(),
)
def test_kernels_are_told_apart_by_their_names(kernel, group):
    assert gpu.group_of(kernel) == group
