# SPDX-License-Identifier: Apache-2.0
"""kvarn in vLLM: `vllm serve MODEL --kv-cache-dtype kvarn_k4v2_g128` on stock vLLM.

vLLM calls `register` in every process of its own (entry point `vllm.general_plugins`). Read on in this order:

hooks    what vLLM asks of us, in the order in which it asks
compat   how we get asked: every name that differs between vLLM releases, and nothing else
refuse   what cannot be served, why, and what to do instead
spec     pages: how large one is, and the pages ahead of each running request
backend  attention: append, then attend
layers   presets of their own for some layers
feedback what lets keys be rounded for the model's queries

The encoder is `weighted`; `--additional-config '{"kvarn_encoder": "varnorm"}'` or the environment variable
KVARN_ENCODER=varnorm chooses the published algorithm.
"""

import logging

_BITS = (8, 4, 3, 2)
PRESETS = tuple(f"kvarn_k{k}v{v}_g{tokens}" for tokens in (128, 64) for k in _BITS for v in _BITS)

logger = logging.getLogger("vllm.kvarn")


def register() -> None:
    """Makes vLLM know the presets. Cheap, idempotent, silent; touches no device.

    A vLLM that we cannot hook into is left as it is, with a warning that says why, because it may not have asked for
    kvarn at all. One that asks for it and lacks a hook is refused when its configuration is checked.
    """
    try:
        from . import compat, hooks

        compat.install(PRESETS, hooks)
    except Exception as error:
        logger.warning(
            "kvarn is disabled in this process, this vLLM could not be hooked: %s: %s. `kvarn doctor` says more.",
            type(error).__name__,
            error,
        )
