"""Which pictures of a set are trained on: limits, scores and near duplicates, each a step of one pipeline."""
