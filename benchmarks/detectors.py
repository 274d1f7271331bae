"""Activation clustering and spectral signatures against the Adversarial Robustness Toolbox, on the same
features: 50,000 of 512 numbers in ten classes. Wants the toolbox: pip install '.[test]'."""

from __future__ import annotations

import numpy as np
import torch
from common import in_turns, report

from untrojan.defenses.cleansing.activation_clustering import two_clusters
from untrojan.defenses.cleansing.spectral_signatures import spectral_scores

CLASSES, EACH, WIDTH, POISONED = 10, 5000, 512, 250


def features() -> list[torch.Tensor]:
    """Correlated features, as a network's are; a twentieth of each class lies apart."""
    random = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, WIDTH, generator=random)
    classes = []
    for _ in range(CLASSES):
        hidden = torch.randn(EACH, 64, generator=random)
        hidden[:POISONED] += 3
        values = hidden @ mixing + torch.randn(EACH, WIDTH, generator=random)
        classes.append(values.relu())
    return classes


def main() -> None:
    from art.defences.detector.poison.activation_defence import cluster_activations
    from art.defences.detector.poison.clustering_analyzer import ClusteringAnalyzer
    from art.defences.detector.poison.spectral_signature_defense import SpectralSignatureDefense

    ours = features()
    theirs = [values.numpy() for values in ours]

    def toolbox_clusters() -> None:
        np.random.seed(0)
        clusters, points = cluster_activations(theirs, nb_dims=10, reduce="PCA")
        ClusteringAnalyzer().analyze_by_silhouette_score(clusters, points)

    def toolbox_spectra() -> None:
        for values in theirs:
            SpectralSignatureDefense.spectral_signature_scores(values)

    clustering = in_turns(
        {"toolbox": toolbox_clusters, "ours": lambda: [two_clusters(values, 10) for values in ours]}, rounds=3
    )
    report("activation-clustering", clustering, "toolbox", "ours", wanted=5.0)
    spectra = in_turns(
        {"toolbox": toolbox_spectra, "ours": lambda: [spectral_scores(values) for values in ours]}, rounds=3
    )
    report("spectral-signatures", spectra, "toolbox", "ours", wanted=5.0)


if __name__ == "__main__":
    main()
