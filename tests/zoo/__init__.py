"""Small versions of models, with random weights. Each `build` returns (model, args, kwargs)."""
