"""The store in front of model libraries and inference servers; each module needs only its own server installed."""
