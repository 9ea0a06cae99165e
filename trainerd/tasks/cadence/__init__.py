"""CADENCE: category-conditioned query language models for autosuggest (KDD 2023, doi 10.1145/3580305.3599787)."""
