"""Forward and backward passes of NODE and HNN written by hand, equal to the plain formulas to rounding.

What: the two functions of `models.formulas`, the network of a point and the gradient of the HNN's energy density.
Autograd keeps every intermediate result and passes over it again and again; `point_network` and `density_gradient`
here do a training step in the three or six matrix products of hidden size that it takes, and work in place.

How: `by_hand` puts the passes in the place of a formula; `rows` works on blocks of rows that stay in the caches of a
core, on up to 6 threads at once; `tanh_numba` is a tanh for processors without AVX-512.

Gain: a training step of the paper's size (10 000 rows, 200 hidden units, two cores) takes 1.0 to 1.2 times its matrix
products alone, where plain PyTorch takes 1.9 to 2.4 times; `benchmarks/training_step.py` measures it, and
docs/speed.md has the numbers.

Where it falls back to the formulas: small matrices without gradients, second derivatives, forward mode,
`torch.compile`, autocast, and on a GPU members that share weights. With more than 6 threads it leaves the rows to
PyTorch; without numba or AVX-512, the tanh.

Off: `SQUALL_FAST=0` in the environment, or `squall.models.fast.enabled = False`; both models then compute by the plain
formulas and automatic differentiation.
"""

import os

enabled = os.environ.get("SQUALL_FAST", "1") != "0"
"""Whether the passes by hand are used."""
