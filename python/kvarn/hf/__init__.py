# SPDX-License-Identifier: Apache-2.0
"""kvarn as the cache of a transformers model, on CPU and CUDA tensors:

    feedback = kvarn.hf.feedback(model)  # once
    model.generate(**inputs, past_key_values=kvarn.hf.Cache(model.config, "kvarn_k4v2_g128", feedback=feedback))

Importing this module registers the attention implementation "kvarn". docs/transformers.md has what works.
"""

from .cache import Cache
from .feedback import feedback

__all__ = ["Cache", "feedback"]
