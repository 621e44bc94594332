"""What a distance between two sets does not tell, each metric a short function of feature matrices with an image in each row.

The distances themselves are in fid.py.
"""
import numpy as np
import scipy.optimize


def cosine(x, y):
    """Cosine similarity of every row of x (n, d) with every row of y (m, d) -> (n, m)."""
    x, y = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (x, y))
    return x @ y.T


def fidelity(samples, references):
    """Row i of samples (n, d) was made from row i of references -> mean cosine with its own reference, and with all others."""
    c = cosine(samples, references)
    n = len(c)
    return float(np.trace(c) / n), float((c.sum() - np.trace(c)) / (n * (n - 1)))


def nearest_centroid(train, labels, x):
    """The label of the class whose mean embedding has the largest cosine with each row of x -> (n,)."""
    names = np.unique(labels)
    centroids = np.stack([train[labels == name].mean(0) for name in names])
    return names[cosine(x, centroids).argmax(1)]


def nearest(x, train):
    """For each row of x (n, d) its nearest row of train (m, d) in the Euclidean distance -> (index, distance), both (n,)."""
    squared = np.square(x).sum(1)[:, None] - 2 * x @ train.T + np.square(train).sum(1)
    index = squared.argmin(1)
    return index, np.linalg.norm(x - train[index], axis=1)      # anew: the expansion is inexact where they are equal


def bootstrap_interval(distance, x, y, repeats=200, level=0.95, seed=0):
    """Interval of distance(x, y) over the choice of the images -> (low, high). Row i of y was made from row i of x, and pairs are
    resampled: apart, they would spread more than they do. (Patches of one case are no independent choice: it is too narrow for
    that.)

    A Fréchet distance is quoted as it comes at its n, with the bias of so few images. Resampled sets, which hold images twice,
    have that bias a second time: so only the spread is taken from them, about their own mean, and put around the estimate.
    """
    rng, estimate = np.random.default_rng(seed), distance(x, y)
    values = [distance(x[i], y[i]) for i in rng.integers(len(x), size=(repeats, len(x)))]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) - np.mean(values) + estimate
    return float(low), float(high)


def fit_linear(x, labels, penalty=1.0):
    """Multinomial logistic regression on standardised features x (n, d) -> a function from features to labels.

    Minimises the mean cross-entropy plus penalty/(2n) |W|², classes weighed alike, by scipy's L-BFGS.
    """
    names, y = np.unique(labels, return_inverse=True)
    mu, spread = x.mean(0), x.std(0) + 1e-6
    z, target = (x - mu) / spread, np.eye(len(names))[y]
    weight = (len(y) / len(names) / np.bincount(y))[y] / len(y)

    def loss(flat):
        w = flat.reshape(len(names), -1)
        logits = z @ w[:, 1:].T + w[:, 0]
        log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        slope = weight[:, None] * (np.exp(log_p) - target)
        gradient = np.hstack([slope.sum(0)[:, None], slope.T @ z + penalty / len(z) * w[:, 1:]])
        value = -(weight * log_p[np.arange(len(z)), y]).sum() + penalty / (2 * len(z)) * np.square(w[:, 1:]).sum()
        return value, gradient.ravel()

    found = scipy.optimize.minimize(loss, np.zeros(len(names) * (z.shape[1] + 1)), jac=True, method="L-BFGS-B")
    w = found.x.reshape(len(names), -1)
    return lambda f: names[((f - mu) / spread @ w[:, 1:].T + w[:, 0]).argmax(1)]


def recalls(labels, guesses):
    """{class: the share of its images that is recognised}; their mean is the balanced accuracy."""
    return {str(name): float((guesses[labels == name] == name).mean()) for name in np.unique(labels)}
