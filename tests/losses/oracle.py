"""The loss and its gradient in float64 NumPy, written from the formulas alone."""

import numpy as np
from scipy.special import logsumexp, rel_entr


def weights(errors: np.ndarray, beta: float) -> np.ndarray:
    """w ∝ exp(β l)."""
    z = beta * np.asarray(errors, dtype=np.float64).ravel()
    return np.exp(z - logsumexp(z))


def loss(prediction: np.ndarray, target: np.ndarray, beta: float) -> tuple[float, np.ndarray]:
    """Σ w l, and 2 w (prediction − target)."""
    difference = np.asarray(prediction, dtype=np.float64).ravel() - np.asarray(target, dtype=np.float64).ravel()
    w = weights(difference**2, beta)
    return float(w @ difference**2), 2 * w * difference


def kl(w: np.ndarray) -> float:
    """KL(w‖uniform)."""
    return float(rel_entr(w, 1 / w.size).sum())
