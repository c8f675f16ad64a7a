"""How far attend may be from the float64 reference, derived from its arithmetic.

The scalar target dequantizes and sums in fp32. Its relative error stays below 2e-6: some hundred roundings of 6e-8 that
do not conspire (a random walk of 10), with scores of a few units as exponents. Queries `gain` times larger multiply it.

The others multiply codes with fixed point. An operand, q s_k or p s_v of one tile, is rounded to multiples of
unit = max / 16256, so each of its elements is wrong by unit / sqrt(12) rms. For inputs of deviation sigma = 1.16:

scores  error = t_k scale unit / sqrt(12) * sqrt(sum over d of code^2), where max |q s_k| is about 2.7 sigma s_k and the
        rms of s_k code about 2.8 sigma (half the range of 128 normal values and their spread); scale = D^-1/2 cancels
        sqrt(D): 2.7 * 2.8 * sigma^2 / (16256 * 3.46) = 1.8e-4. Each p is wrong by that factor independently, so the
        output's relative error is the same; queries `gain` times larger multiply it, soft cap only damps it.
values  error = max p s_v / 16256 / sqrt(12) * sqrt(128) * rms code, against an output of sigma sqrt(sum p^2): with
        max p of 4 times its rms and s_v code of rms 2.2 sigma, 4 * 2.2 / (16256 * 3.46) = 1.6e-4.

Allowed is twice the root of the sum of their squares (4.8e-4 at gain 1; measured are 2.0e-4 to 3.0e-4), and the
rounding of the output's dtype. A single element may be off ten times as far, relative to the largest of the step.
"""

import numpy as np

ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def relative_tolerance(target: str, dtype: str, gain: float) -> float:
    arithmetic = 2e-6 * gain if target == "scalar" else 2 * np.hypot(1.8e-4 * gain, 1.6e-4)
    return arithmetic + ROUNDING[dtype]


def assert_close(ours: np.ndarray, exact: np.ndarray, target: str, context: str, dtype="float32", gain=1.0) -> None:
    """Relative L2 over the step and the largest element's error, within the bounds above."""
    error, allowed = ours.astype(np.float64) - exact, relative_tolerance(target, dtype, gain)
    relative = np.linalg.norm(error) / max(np.linalg.norm(exact), 1e-30)
    assert relative <= allowed, f"{target}, {context}: relative L2 {relative:.2e}, allowed {allowed:.2e}"
    largest, allowed = np.abs(error).max(initial=0), 10 * allowed * np.abs(exact).max(initial=0)
    assert largest <= allowed, f"{target}, {context}: largest error {largest:.2e}, allowed {allowed:.2e}"
