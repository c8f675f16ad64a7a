# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a real model, stock vLLM over HTTP, 16-bit beside kvarn. `kvarn demo` runs it."""
