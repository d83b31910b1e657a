"""Float64 references for degraded conditions, one pixel and one tap at a time.

Images are numpy arrays (H, W) or (3, H, W).
"""

import math

import numpy as np


def mirror(index, size):
    """Reflect an index at the first and last pixel until it is inside."""
    while not 0 <= index < size:
        index = -index if index < 0 else 2 * (size - 1) - index
        if size == 1:
            return 0
    return index


def convolve(picture, kernel):
    """True convolution (the kernel turned round) with mirrored borders."""
    height, width = picture.shape
    radius = len(kernel) // 2
    result = np.zeros(picture.shape)
    for y in range(height):
        for x in range(width):
            for dy in range(-radius, radius + 1):
                for dx in range(-radius, radius + 1):
                    result[y, x] += (
                        kernel[radius + dy, radius + dx]
                        * picture[mirror(y - dy, height), mirror(x - dx, width)]
                    )
    return result


def gaussian_kernel(size, covariance):
    """Density of a normal with this covariance of (x, y) on a grid around 0, scaled to sum 1."""
    precision = np.linalg.inv(covariance)
    kernel = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            at = np.array([j - size // 2, i - size // 2])
            kernel[i, j] = math.exp(-0.5 * at @ precision @ at)
    return kernel / kernel.sum()


def rotated_covariance(angle, variance1, variance2):
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return turn @ np.diag([variance1, variance2]) @ turn.T


def keys(x):
    """Keys' cubic with a = -1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def bicubic_line(line, length):
    """A line resized by a filter as wide as the larger of the two pixels."""
    size = len(line)
    stretch = max(size / length, 1.0)
    result = []
    for i in range(length):
        centre = (i + 0.5) * size / length
        weights = [keys((j + 0.5 - centre) / stretch) for j in range(size)]
        result.append(sum(w * v for w, v in zip(weights, line)) / sum(weights))
    return np.array(result)


def bicubic(picture, height, width):
    wide = np.array([bicubic_line(row, width) for row in picture])
    return np.array([bicubic_line(column, height) for column in wide.T]).T


def blur_and_subsample(picture, sigma, factor):
    """Each small pixel is a Gaussian mean, in a window of 12 pixels each way, around the centre of
    its factor x factor pixels."""
    height, width = picture.shape
    result = np.zeros((height // factor, width // factor))
    for i in range(height // factor):
        for j in range(width // factor):
            y0, x0 = factor * i + (factor - 1) / 2, factor * j + (factor - 1) / 2
            total = weights = 0.0
            for y in range(math.ceil(y0 - 12), math.floor(y0 + 12) + 1):
                for x in range(math.ceil(x0 - 12), math.floor(x0 + 12) + 1):
                    weight = math.exp(-((y - y0) ** 2 + (x - x0) ** 2) / (2 * sigma**2))
                    total += weight * picture[mirror(y, height), mirror(x, width)]
                    weights += weight
            result[i, j] = total / weights
    return result


def correlated_covariance(matrix, shares):
    """(2 / 255)^2 |U^T D U|, with U the left singular vectors of `matrix` (eigenvectors of M M^T)
    and D of `shares`."""
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    U = vectors[:, np.argsort(-values)]
    product = np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            product[i, j] = (2 / 255) ** 2 * abs(
                sum(U[k, i] * shares[k] * U[k, j] for k in range(3))
            )
    return product


def centroid(picture):
    """(y, x) centre of mass in units of the image's side, so that images of any size compare."""
    height, width = picture.shape
    y = sum((i + 0.5) / height * picture[i].sum() for i in range(height)) / picture.sum()
    x = sum((j + 0.5) / width * picture[:, j].sum() for j in range(width)) / picture.sum()
    return np.array([y, x])
