"""Float64 references for diffusion: the formulas of DDPM, IDDPM and DDIM in plain loops."""

import math

import numpy as np


def cosine_betas(T):
    f = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.array([min(0.999, 1 - f((i + 1) / T) / f(i / T)) for i in range(T)], dtype=np.float64)


def linear_betas(T):
    first, last = 1e-4 * 1000 / T, 0.02 * 1000 / T
    return np.array([first + (last - first) * i / (T - 1) for i in range(T)], dtype=np.float64)


def products(betas):
    """abar_t for each t, one multiplication at a time."""
    result, running = [], 1.0
    for beta in betas:
        running *= 1 - beta
        result.append(running)
    return np.array(result, dtype=np.float64)


def strided(T, K):
    """IDDPM's even positions: a stride that is summed up and rounded."""
    stride = (T - 1) / (K - 1)
    at, result = 0.0, []
    for _ in range(K):
        result.append(round(at))
        at += stride
    return result


def posterior(abar_t, abar_s, x0, x_t):
    """Mean and variance of q(x_s | x_t, x_0), by Bayes' rule for a product of two Gaussians."""
    ratio = abar_t / abar_s  # x_t = sqrt(ratio) x_s + sqrt(1 - ratio) n
    if abar_s == 1:
        return x0, 0.0
    precision = 1 / (1 - abar_s) + ratio / (1 - ratio)
    mean = (
        math.sqrt(abar_s) * x0 / (1 - abar_s) + math.sqrt(ratio) * x_t / (1 - ratio)
    ) / precision
    return mean, 1 / precision


def diffuse(abar_t, x0, noise):
    return math.sqrt(abar_t) * x0 + math.sqrt(1 - abar_t) * noise


def target(kind, abar_t, x0, noise):
    if kind == "eps":
        return noise
    if kind == "x0":
        return x0
    return math.sqrt(abar_t) * noise - math.sqrt(1 - abar_t) * x0


def x0_and_eps(kind, abar_t, output, x_t):
    a, s = math.sqrt(abar_t), math.sqrt(1 - abar_t)
    if kind == "eps":
        return (x_t - s * output) / a, output
    if kind == "x0":
        return output, (x_t - a * output) / s
    return a * x_t - s * output, s * x_t + a * output


def kl_by_integration(mean1, var1, mean2, var2, points=200_001):
    """KL of two normals in nats, as a Riemann sum over +-12 standard deviations of the first."""
    std = math.sqrt(var1)
    x = np.linspace(mean1 - 12 * std, mean1 + 12 * std, points)
    log1 = -0.5 * ((x - mean1) ** 2 / var1 + math.log(2 * math.pi * var1))
    log2 = -0.5 * ((x - mean2) ** 2 / var2 + math.log(2 * math.pi * var2))
    return float(np.sum(np.exp(log1) * (log1 - log2)) * (x[1] - x[0]))


def discretised_nll(x, mean, log_var):
    """-log of the normal mass in x's bin of 256 levels, open at both ends, in nats."""
    std = math.exp(0.5 * log_var)
    cdf = lambda u: 0.5 * (1 + math.erf(u / math.sqrt(2)))
    low = 0.0 if x < -0.999 else cdf((x - mean - 1 / 255) / std)
    high = 1.0 if x > 0.999 else cdf((x - mean + 1 / 255) / std)
    return -math.log(max(high - low, 1e-12))


def ddpm(predict, x, abar, timesteps, noises):
    """predict(x, t) -> (x0, eps, log_var). noises: one array per step but for the last."""
    for k, i in enumerate(reversed(range(len(timesteps)))):
        x0, _, log_var = predict(x, timesteps[i])
        mean, _ = posterior(abar[i], abar[i - 1] if i > 0 else 1.0, x0, x)
        x = mean + np.exp(0.5 * log_var) * noises[k] if i > 0 else mean
    return x


def ddim(predict, x, abar, timesteps, eta, noises):
    for k, i in enumerate(reversed(range(len(timesteps)))):
        x0, eps, _ = predict(x, timesteps[i])
        before = abar[i - 1] if i > 0 else 1.0
        sigma = eta * math.sqrt((1 - before) / (1 - abar[i])) * math.sqrt(1 - abar[i] / before)
        x = math.sqrt(before) * x0 + math.sqrt(max(0.0, 1 - before - sigma**2)) * eps
        if i > 0:
            x = x + sigma * noises[k]
    return x
