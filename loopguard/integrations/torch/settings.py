"""What decides about the bits of a step besides weights, data and generators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def settings(parameters: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Versions, threads, precision and devices, as JSON values. Runs that differ in one may differ in the last bit."""
    kinds = sorted({(str(p.device), str(p.dtype).removeprefix("torch.")) for p in parameters})
    found: dict[str, Any] = {
        "torch": str(torch.__version__),
        "parameters": [f"{dtype} on {device}" for device, dtype in kinds],
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found["cudnn_benchmark"] = torch.backends.cudnn.benchmark
        found["cudnn_deterministic"] = torch.backends.cudnn.deterministic
    return found


def apply_settings(found: Mapping[str, Any]) -> None:
    """Set what of such settings can be set, for a replay: threads, precision of products, deterministic kernels."""
    if "threads" in found:
        torch.set_num_threads(found["threads"])
    if "matmul" in found:
        torch.set_float32_matmul_precision(found["matmul"])
    if "deterministic" in found:
        torch.use_deterministic_algorithms(found["deterministic"])
    if "cudnn_deterministic" in found:
        torch.backends.cudnn.deterministic = found["cudnn_deterministic"]
        torch.backends.cudnn.benchmark = found["cudnn_benchmark"]
