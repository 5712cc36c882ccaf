"""The claims of papers and reviews as experiments: ``mlreviews reproduce SLUG`` runs them.

Each module of this package has ``run(settings) -> Outcome``, which measures, and ``draw(outcome) -> Figure``, which
draws what was measured. `mlreviews.reproductions.protocol` says what these are.
"""
