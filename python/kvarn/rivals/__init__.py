# SPDX-License-Identifier: Apache-2.0
"""Other formats of the KV cache, simulated: what each would read back of keys and values, and its exact bytes.

    rival = kvarn.rivals.RIVALS["q4_0"]
    rival.keys(k), rival.values(v)       float32 [tokens, kv_heads, head_dim], as attention would see them
    rival.bits_per_value(head_dim)       every scale counted

Each file holds one family and names its source; none of its code is used. Where a format keeps recent tokens or whole
layers in 16 bits, it says so (`recent`, `raw_layers`). Needs torch.
"""

from kvarn.rivals.base import Recent, Rival
from kvarn.rivals.fp8 import Fp8, Fp8Calibrated, Fp8PerTokenHead
from kvarn.rivals.kivi import Kivi
from kvarn.rivals.llama_cpp import LlamaCpp
from kvarn.rivals.nvfp4 import Nvfp4
from kvarn.rivals.per_token_head import Int4PerTokenHead, Int8PerTokenHead
from kvarn.rivals.turboquant import TurboQuant

# vLLM keeps the first and last two layers of a dense model in 16 bits for TurboQuant.
_BOUNDARY = 2

_ALL: tuple[Rival, ...] = (
    Fp8(),
    Fp8Calibrated(),
    Fp8PerTokenHead(),
    Int8PerTokenHead(),
    Int4PerTokenHead(),
    Nvfp4(),
    LlamaCpp("q8_0", "q8_0"),
    LlamaCpp("q8_0", "q4_0"),
    LlamaCpp("q5_0", "q5_0"),
    LlamaCpp("q4_0", "q4_0"),
    LlamaCpp("q4_0", "q4_0", rotated=False),
    Kivi(4),
    Kivi(2),
    TurboQuant("k8v4", 8, 4, raw_layers=_BOUNDARY),
    TurboQuant("4bit_nc", 4, 4, raw_layers=_BOUNDARY),
    TurboQuant("k3v4_nc", 3, 4, raw_layers=_BOUNDARY),
    TurboQuant("3bit_nc", 3, 3, raw_layers=_BOUNDARY),
    TurboQuant("k8v4", 8, 4),
    TurboQuant("4bit_nc", 4, 4),
    TurboQuant("k3v4_nc", 3, 4),
    TurboQuant("3bit_nc", 3, 3),
)
RIVALS: dict[str, Rival] = {rival.name: rival for rival in _ALL}

__all__ = ["RIVALS", "Recent", "Rival"]
